package registry

import (
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// ServerVariable is the environment variable that names the server of p11-kit-client.so.
const ServerVariable = "P11_KIT_SERVER_ADDRESS"

// Dirs tells where the configuration is, and what the environment adds to it.
type Dirs struct {
	System     string // modules as distributions ship them: /usr/share/p11-kit/modules
	Admin      string // modules of this machine: /etc/pkcs11/modules
	User       string // modules of this user: ~/.config/pkcs11/modules
	GlobalConf string // /etc/pkcs11/pkcs11.conf
	UserConf   string // ~/.config/pkcs11/pkcs11.conf
	// NoUser says why User and UserConf are not read. It is empty when they are read.
	NoUser string
	// NoUserMistake is set when NoUser is certainly a mistake. Load warns about it.
	NoUserMistake bool
	// Load searches ModuleDirs, in this order, for modules without an absolute path.
	ModuleDirs []string
	// ServerAddress is P11_KIT_SERVER_ADDRESS. p11-kit-client.so connects to it when the
	// module file names no server.
	ServerAddress string
	// UID is the user that reads the configuration. Root and this user may own
	// configuration files. Load warns about files of any other user.
	UID int
}

// DefaultDirs returns the places that p11-kit uses, for user uid. lookup reads the
// environment, as os.LookupEnv does. DefaultDirs looks up XDG_CONFIG_HOME, HOME,
// P11_KIT_NO_USER_CONFIG and P11_KIT_SERVER_ADDRESS.
//
// As in p11-kit (0.24.1, p11-kit/conf.c), root has no user configuration. A program with
// privileges that its caller does not have has no user configuration either.
func DefaultDirs(lookup func(string) (string, bool), uid int) Dirs {
	d := Dirs{
		System:     "/usr/share/p11-kit/modules",
		Admin:      "/etc/pkcs11/modules",
		GlobalConf: "/etc/pkcs11/pkcs11.conf",
		ModuleDirs: moduleDirs(),
		UID:        uid,
	}
	d.ServerAddress, _ = lookup(ServerVariable)
	// A variable that is set but empty counts, too.
	_, forbidden := lookup("P11_KIT_NO_USER_CONFIG")
	switch {
	case uid == 0:
		d.NoUser = "root has none"
	case privileged():
		d.NoUser = "the program runs with privileges its caller does not have"
	case forbidden:
		d.NoUser = "P11_KIT_NO_USER_CONFIG is set"
	default:
		config, problem, mistake := configHome(lookup, uid)
		if problem != "" {
			d.NoUser, d.NoUserMistake = problem, mistake
			break
		}
		d.User = filepath.Join(config, "pkcs11", "modules")
		d.UserConf = filepath.Join(config, "pkcs11", "pkcs11.conf")
	}
	return d
}

// configHome returns the directory that ~/.config stands for, or the reason why there is
// none. mistake tells whether the reason is a mistake: users of services often have no
// home.
func configHome(lookup func(string) (string, bool), uid int) (dir, problem string, mistake bool) {
	if dir, _ := lookup("XDG_CONFIG_HOME"); dir != "" {
		if !filepath.IsAbs(dir) {
			return "", "XDG_CONFIG_HOME is not an absolute path", true
		}
		return dir, "", false
	}
	home, _ := lookup("HOME")
	if home == "" {
		u, err := user.LookupId(strconv.Itoa(uid))
		if err != nil || u.HomeDir == "" {
			return "", "HOME is not set and user " + strconv.Itoa(uid) + " has no home directory", false
		}
		home = u.HomeDir
	}
	if !filepath.IsAbs(home) {
		return "", "HOME is not an absolute path", true
	}
	return filepath.Join(home, ".config"), "", false
}

// moduleDirs returns the possible module directories. p11-kit has one of them compiled
// in: "pkcs11" in its library directory. Debian and its derivatives have one directory
// for each architecture. The ELF header of each file shows whether the file is for
// another architecture.
func moduleDirs() []string {
	// Glob fails on malformed patterns only, and this pattern is a constant.
	dirs, _ := filepath.Glob("/usr/lib/*-linux-*/pkcs11")
	for _, dir := range []string{"/usr/lib64/pkcs11", "/usr/lib/pkcs11"} {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// privileged tells whether the kernel started this process with privileges of the
// program's file: set-user-ID, set-group-ID or file capabilities (AT_SECURE,
// getauxval(3)).
//
// The Go runtime keeps the auxiliary vector from its start, so privileged asks the
// runtime. A process of an ordinary user cannot read /proc/self/auxv after it has made
// itself undumpable. The agent makes itself undumpable to protect PINs.
func privileged() bool {
	if os.Getuid() != os.Geteuid() || os.Getgid() != os.Getegid() {
		return true
	}
	auxv, err := unix.Auxv()
	return err != nil || secureBit(auxv)
}

// secureBit finds AT_SECURE among the pairs of an auxiliary vector. If the vector lacks
// AT_SECURE, the kernel does not tell, and secureBit returns true.
func secureBit(auxv [][2]uintptr) bool {
	const atSecure = 23 // linux/auxvec.h
	for _, pair := range auxv {
		if pair[0] == atSecure {
			return pair[1] != 0
		}
	}
	return true
}
