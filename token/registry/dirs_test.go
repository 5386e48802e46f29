package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDefaultDirs(t *testing.T) {
	tests := []struct {
		name string
		env  map[string]string
		uid  int
		user string
		no   string
		bad  bool // NoUserMistake
	}{
		{"home", map[string]string{"HOME": "/home/u"}, 1000, "/home/u/.config/pkcs11/modules", "", false},
		{"XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": "/cfg/"}, 1000, "/cfg/pkcs11/modules", "", false},
		{"empty XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": ""}, 1000, "/home/u/.config/pkcs11/modules", "", false},
		{"relative XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": "cfg"}, 1000, "", "XDG_CONFIG_HOME", true},
		{"relative home", map[string]string{"HOME": "u"}, 1000, "", "HOME", true},
		{"unknown user", nil, 1 << 30, "", "no home directory", false},
		{"root", map[string]string{"HOME": "/root", "XDG_CONFIG_HOME": "/cfg"}, 0, "", "root", false},
		{"forbidden", map[string]string{"HOME": "/home/u", "P11_KIT_NO_USER_CONFIG": ""}, 1000, "", "P11_KIT_NO_USER_CONFIG", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := DefaultDirs(func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok }, tt.uid)
			if d.User != tt.user || !strings.Contains(d.NoUser, tt.no) || (tt.no == "") != (d.NoUser == "") {
				t.Errorf("User = %q, NoUser = %q", d.User, d.NoUser)
			}
			if d.NoUserMistake != tt.bad {
				t.Errorf("%s is a mistake: %v", d.NoUser, d.NoUserMistake)
			}
			if strings.TrimSuffix(d.UserConf, "pkcs11.conf") != strings.TrimSuffix(tt.user, "modules") {
				t.Errorf("UserConf = %q", d.UserConf)
			}
			if d.UID != tt.uid || d.System == "" || d.Admin == "" || d.GlobalConf == "" {
				t.Errorf("%+v", d)
			}
		})
	}
}

func TestModuleDirs(t *testing.T) {
	for _, dir := range moduleDirs() {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			t.Errorf("%s is no directory", dir)
		}
	}
	path, err := FindClient(moduleDirs())
	need(t, err == nil, "the package p11-kit-modules")
	if !strings.HasSuffix(path, "/pkcs11/p11-kit-client.so") {
		t.Errorf("client: %s", path)
	}
	if _, err := FindClient(nil); err == nil || !strings.Contains(err.Error(), "p11-kit-modules") {
		t.Errorf("without directories: %v", err)
	}
}

func TestSecureBit(t *testing.T) {
	if privileged() {
		t.Error("the test program counts as one with privileges")
	}
	for _, tt := range []struct {
		name string
		auxv [][2]uintptr
		want bool
	}{
		{"no", [][2]uintptr{{6, 4096}, {23, 0}, {0, 0}}, false},
		{"yes", [][2]uintptr{{6, 4096}, {23, 1}}, true},
		{"not said", [][2]uintptr{{6, 4096}}, true},
		{"empty", nil, true},
	} {
		if got := secureBit(tt.auxv); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// undumpableMain runs as an ordinary user in a process that makes itself undumpable, as
// the agent does. It prints whether privileged returns true.
func undumpableMain() int {
	if os.Geteuid() == 0 {
		if err := errors.Join(syscall.Setresgid(ordinary, ordinary, ordinary), syscall.Setresuid(ordinary, ordinary, ordinary)); err != nil {
			panic(err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		panic(err)
	}
	_, err := os.ReadFile("/proc/self/auxv")
	fmt.Print(privileged(), errors.Is(err, fs.ErrPermission))
	return 0
}

// The agent makes itself undumpable before it reads the configuration. privileged must
// still return false then. Otherwise the agent would leave out the user's modules.
func TestUndumpableIsNotPrivileged(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleVariable+"=undumpable")
	out, err := cmd.Output()
	must(t, err)
	// The test needs a /proc that refuses to show the vector.
	if string(out) != "false true" {
		t.Errorf("privileged, and kept from /proc/self/auxv: %s", out)
	}
}
