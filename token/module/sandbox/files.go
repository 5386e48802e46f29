package sandbox

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"p11-agent/token/wellknown"
)

// What is forbidden, but for the paths that are writable. Devices are made
// nowhere: who may make them gets at every disk.
const (
	writeFile = landlock.AccessFSSet(ll.AccessFSWriteFile | ll.AccessFSTruncate)
	writeDir  = writeFile | landlock.AccessFSSet(ll.AccessFSRemoveDir|ll.AccessFSRemoveFile|
		ll.AccessFSMakeDir|ll.AccessFSMakeReg|ll.AccessFSMakeSock|ll.AccessFSMakeFifo|ll.AccessFSMakeSym|ll.AccessFSRefer)
	forbidden = writeDir | landlock.AccessFSSet(ll.AccessFSMakeChar|ll.AccessFSMakeBlock)

	// Rights that older kernels lack: there, files are not moved from one directory
	// to another at all, and a file that may only be read can still be emptied.
	sinceABI2 = landlock.AccessFSSet(ll.AccessFSRefer)
	sinceABI3 = landlock.AccessFSSet(ll.AccessFSTruncate)

	// What reaches no process outside, and is in kernels from version 6 of Landlock on.
	scopes = landlock.ScopedSet(ll.ScopeSignal | ll.ScopeAbstractUnixSocket)
)

// scoped tells whether the kernel confines signals, and does it right: the first
// kernels that do, before 6.12.26, refuse signals between threads of one process
// (Documentation/userspace-api/landlock.rst, "Erratum 2").
func scoped(abi int) bool {
	const signals = 1 << 1
	errata, err := ll.LandlockGetErrata()
	return abi >= 6 && err == nil && errata&signals != 0
}

// supported returns those of the rights that a version of Landlock has.
func supported(abi int, rights landlock.AccessFSSet) landlock.AccessFSSet {
	if abi < 2 {
		rights &^= sinceABI2
	}
	if abi < 3 {
		rights &^= sinceABI3
	}
	return rights
}

// restrictFiles forbids to write files and, where scoped has it, to signal processes
// outside and to connect to their abstract sockets. It returns the version of Landlock
// in force, 0 for none, and those of o.Write that are not there.
//
// The library knows ways to make all threads obey, and to do as much as the
// kernel can. The latter is not used: it calls nothing at all a success.
func restrictFiles(o Options) (abi int, missing []string, err error) {
	abi, err = ll.LandlockGetABIVersion()
	if err != nil {
		return 0, nil, err
	}
	if abi < 1 {
		return 0, nil, errUnsupported
	}
	var rules []landlock.Rule
	add := func(path string) bool {
		st, err := os.Stat(path)
		if err != nil {
			return false
		}
		rights := writeFile
		if st.IsDir() {
			rights = writeDir
		}
		rules = append(rules, landlock.PathAccess(supported(abi, rights), path).IgnoreIfMissing())
		return true
	}
	for _, path := range known(o) {
		add(path)
	}
	for _, path := range o.Write {
		if !add(path) {
			missing = append(missing, path)
		}
	}
	what := []any{supported(abi, forbidden)}
	if scoped(abi) {
		what = append(what, scopes)
	}
	c, err := landlock.NewConfig(what...)
	if err == nil {
		err = c.Restrict(rules...)
	}
	if err != nil {
		return 0, missing, fmt.Errorf("refused: %w", err)
	}
	return abi, missing, nil
}

// Whatever the module is. Of devices only those are here that cards, TPMs and
// HSMs are behind, and those that hurt nobody; a terminal is none of them.
var anyModule = []string{
	"/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/proc/self",
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom",
	"/dev/tpm[0-9]*", "/dev/tpmrm[0-9]*", "/dev/bus/usb", "/dev/usb", "/dev/hidraw*",
}

// known returns what the module is known to write, some of which may not be there.
func known(o Options) []string {
	var all []string
	for _, pattern := range anyModule {
		found, _ := filepath.Glob(pattern) // the patterns are right
		all = append(all, found...)
	}
	home := o.Getenv("HOME")
	own := func(path string) {
		if acceptable(path, home) {
			all = append(all, path)
		}
	}
	own(o.Getenv("TMPDIR"))

	// p11-kit's proxy loads the others into this process. What a variable names
	// counts for every module, as one may be wrapped in another.
	file := o.Module
	if wellknown.KindOf(file) == wellknown.Spy {
		file = o.Getenv("PKCS11SPY") // the module that it hands all calls to
	}
	proxy := strings.Contains(filepath.Base(file), "p11-kit-proxy")
	is := func(kind wellknown.Kind) bool { return proxy || wellknown.KindOf(file) == kind }
	if conf := o.Getenv("SOFTHSM2_CONF"); conf != "" || is(wellknown.SoftHSM) {
		if dir, err := wellknown.SoftHSMTokens(wellknown.SoftHSMConfig(conf, home)); err == nil {
			own(dir)
		}
	}
	if store := o.Getenv("TPM2_PKCS11_STORE"); store != "" {
		own(store)
	} else if is(wellknown.TPM2) {
		const system = "/etc/tpm2_pkcs11"
		own(system)
		mine := filepath.Join(home, ".tpm2_pkcs11")
		if unix.Access(system, unix.W_OK) != nil {
			makeOne(mine)
		}
		own(mine)
	}
	if is(wellknown.OpenSC) {
		cache := cmp.Or(o.Getenv("XDG_CACHE_HOME"), filepath.Join(home, ".cache"))
		own(makeOne(filepath.Join(cache, "opensc")))
	}
	if is(wellknown.OpenCryptoki) {
		own("/var/lib/opencryptoki")
	}
	if is(wellknown.NSS) {
		own(nssDatabase(o.InitArgs))
	}
	return all
}

// nssDatabase returns the directory of the database that NSS's softokn is told to use:
// configdir='sql:/home/me/.pki/nssdb' (NSS, doc/rst/legacy/pkcs11/module_specs). NSS
// locks the files of a database with a file beside them, also to read.
func nssDatabase(args string) string {
	_, value, found := strings.Cut(args, "configdir=")
	if !found || value == "" {
		return ""
	}
	quote, value := value[:1], value[1:]
	dir, _, _ := strings.Cut(value, quote)
	if quote != "'" && quote != `"` {
		dir, _, _ = strings.Cut(quote+value, " ")
	}
	for _, kind := range []string{"sql:", "dbm:"} {
		dir = strings.TrimPrefix(dir, kind)
	}
	return dir
}

// acceptable tells whether a path may be written that nobody has named for this
// very purpose: not everything, and not the home directory.
func acceptable(path, home string) bool {
	if !filepath.IsAbs(path) {
		return false
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil || real == "/" {
		return false
	}
	if home, err = filepath.EvalSymlinks(home); err != nil {
		return true // there is none
	}
	rest, err := filepath.Rel(real, home)
	return err == nil && (rest == ".." || strings.HasPrefix(rest, "../"))
}

// makeOne makes a directory, private to the user, that the module would make: it can
// do so no more afterwards. What it is in has to be there.
func makeOne(path string) string {
	if filepath.IsAbs(path) {
		_ = os.Mkdir(path, 0o700) // it may be there, or not be wanted: as without a sandbox
	}
	return path
}
