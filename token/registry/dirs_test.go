package registry

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"
)

func TestDefaultDirs(t *testing.T) {
	tests := []struct {
		name string
		env  map[string]string
		uid  int
		user string
		no   string
	}{
		{"home", map[string]string{"HOME": "/home/u"}, 1000, "/home/u/.config/pkcs11/modules", ""},
		{"XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": "/cfg/"}, 1000, "/cfg/pkcs11/modules", ""},
		{"empty XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": ""}, 1000, "/home/u/.config/pkcs11/modules", ""},
		{"relative XDG", map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": "cfg"}, 1000, "", "XDG_CONFIG_HOME"},
		{"relative home", map[string]string{"HOME": "u"}, 1000, "", "HOME"},
		{"nobody", nil, 1 << 30, "", "no home directory"},
		{"root", map[string]string{"HOME": "/root", "XDG_CONFIG_HOME": "/cfg"}, 0, "", "root"},
		{"forbidden", map[string]string{"HOME": "/home/u", "P11_KIT_NO_USER_CONFIG": ""}, 1000, "", "P11_KIT_NO_USER_CONFIG"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := DefaultDirs(func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok }, tt.uid)
			if d.User != tt.user || !strings.Contains(d.NoUser, tt.no) || (tt.no == "") != (d.NoUser == "") {
				t.Errorf("User = %q, NoUser = %q", d.User, d.NoUser)
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
	pair := func(key, value uint64) []byte {
		return binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, key), value)
	}
	if wordSize != 8 {
		t.Skip("the vectors below are for 64 bits")
	}
	for _, tt := range []struct {
		name string
		auxv []byte
		want bool
	}{
		{"no", append(pair(6, 4096), append(pair(23, 0), pair(0, 0)...)...), false},
		{"yes", append(pair(6, 4096), pair(23, 1)...), true},
		{"not said", pair(6, 4096), true},
		{"cut off", pair(23, 0)[:12], true},
		{"empty", nil, true},
	} {
		if got := secureBit(tt.auxv); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
