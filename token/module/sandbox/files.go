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

// forbidden holds the rights that the module loses outside of its writable paths. It may
// make devices nowhere, because a program that makes devices can reach every disk.
const (
	writeFile = landlock.AccessFSSet(ll.AccessFSWriteFile | ll.AccessFSTruncate)
	writeDir  = writeFile | landlock.AccessFSSet(ll.AccessFSRemoveDir|ll.AccessFSRemoveFile|
		ll.AccessFSMakeDir|ll.AccessFSMakeReg|ll.AccessFSMakeSock|ll.AccessFSMakeFifo|ll.AccessFSMakeSym|ll.AccessFSRefer)
	forbidden = writeDir | landlock.AccessFSSet(ll.AccessFSMakeChar|ll.AccessFSMakeBlock)

	// Older kernels lack these rights. There, no file can be moved from one directory to
	// another, and a module can empty a file that it may only read.
	sinceABI2 = landlock.AccessFSSet(ll.AccessFSRefer)
	sinceABI3 = landlock.AccessFSSet(ll.AccessFSTruncate)

	// scopes reach no process outside. Kernels have them from version 6 of Landlock on.
	scopes = landlock.ScopedSet(ll.ScopeSignal | ll.ScopeAbstractUnixSocket)
)

// scoped tells whether the kernel confines signals correctly. The first kernels that
// confine signals, before 6.12.26, refuse signals between threads of one process
// (Documentation/userspace-api/landlock.rst, "Erratum 2").
func scoped(abi int) bool {
	const signals = 1 << 1
	errata, err := ll.LandlockGetErrata()
	return abi >= 6 && err == nil && errata&signals != 0
}

// supported returns the rights that a version of Landlock has.
func supported(abi int, rights landlock.AccessFSSet) landlock.AccessFSSet {
	if abi < 2 {
		rights &^= sinceABI2
	}
	if abi < 3 {
		rights &^= sinceABI3
	}
	return rights
}

// restrictFiles keeps the process from writing files. If scoped returns true, it also
// keeps the process from signalling processes outside, and from connecting to their
// abstract sockets. It returns the version of Landlock in force, or 0. missing are the
// paths of o.Write that do not exist.
//
// The library can restrict all threads. It can also restrict as much as the kernel
// supports. restrictFiles does not use the latter, because that mode reports success even
// if the kernel supports nothing.
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

// Every module may write these. The devices are those behind which cards, TPMs and HSMs
// are, and harmless ones. No terminal is among them.
var anyModule = []string{
	"/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/proc/self",
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom",
	"/dev/tpm[0-9]*", "/dev/tpmrm[0-9]*", "/dev/bus/usb", "/dev/usb", "/dev/hidraw*",
}

// known returns the paths that the module is known to write. Some may not exist.
func known(o Options) []string {
	var all []string
	for _, pattern := range anyModule {
		found, _ := filepath.Glob(pattern) // the patterns are right
		all = append(all, found...)
	}
	return append(all, Own(o)...)
}

// Own returns the files and directories that belong to the module, as the configuration of the
// module names them now. Enter lets the module write them. If they change later, the module
// cannot write them.
func Own(o Options) (all []string) {
	home := o.Getenv("HOME")
	own := func(path string) {
		if acceptable(path, home) {
			all = append(all, path)
		}
	}
	own(o.Getenv("TMPDIR"))

	// p11-kit's proxy loads the other modules into this process. A path in a variable
	// counts for every module, because a module may be wrapped in another.
	file := o.Module
	if wellknown.KindOf(file) == wellknown.Spy {
		file = o.Getenv("PKCS11SPY") // the module that gets all calls from the spy
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

// nssDatabase returns the database directory in the arguments of NSS's softokn:
// configdir='sql:/home/me/.pki/nssdb' (NSS, doc/rst/legacy/pkcs11/module_specs). NSS
// locks a database with a file beside the database's files, even for reading.
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

// acceptable tells whether the module may write a path that the configuration does not
// name for writing. Such a path must not be the root or the home directory, or contain
// the home directory.
func acceptable(path, home string) bool {
	if !filepath.IsAbs(path) {
		return false
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil || real == "/" {
		return false
	}
	if home, err = filepath.EvalSymlinks(home); err != nil {
		return true // the user has no home directory
	}
	rest, err := filepath.Rel(real, home)
	return err == nil && (rest == ".." || strings.HasPrefix(rest, "../"))
}

// makeOne makes a private directory that the module would make itself. In the sandbox the
// module can no longer make it. The parent directory has to exist.
func makeOne(path string) string {
	if filepath.IsAbs(path) {
		_ = os.Mkdir(path, 0o700) // the directory may exist, or be unwanted: as without a sandbox
	}
	return path
}
