package advice

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/token"
	"p11-agent/token/wire"
)

// programs makes PATH have these programs only.
func programs(t *testing.T, names ...string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

// file makes an empty file of this name, and returns its path.
func file(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstall(t *testing.T) {
	for _, tt := range []struct {
		name     string
		programs []string
		want     string
	}{
		{"Debian", []string{"apt-get", "dnf"}, "sudo apt install d"},
		{"Fedora", []string{"dnf"}, "sudo dnf install f"},
		{"another system", nil, "install the package d (Debian's name; Fedora's is f)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			programs(t, tt.programs...)
			if got := Install("d", "f"); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	programs(t)
	if got := Install("p", "p"); got != "install the package p" {
		t.Errorf("one name in both: got %q", got)
	}
}

// Without a module for smart cards, the package that brings it is named.
func TestFirstSteps(t *testing.T) {
	without := FirstSteps(nil)
	with := FirstSteps([]token.ModuleStatus{{Path: "/usr/lib/opensc-pkcs11.so"}})
	if !strings.Contains(without[0], "opensc") || strings.Contains(with[0], "opensc") || without[1] != with[1] {
		t.Errorf("%q and %q", without, with)
	}
}

// Each failure of a module has its step.
func TestModule(t *testing.T) {
	programs(t, "apt-get")
	for _, name := range []string{"SOFTHSM2_CONF", "TPM2_PKCS11_TCTI", "TCTI"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", "/home/me")
	refused := func(function string) error { return &wire.Error{Function: function, RV: wire.CKRGeneralError} }
	off := "to do without the module, write into the configuration:\n[[module]]\nname = \"m\"\nenabled = false"
	for _, tt := range []struct {
		name string
		file string // of the module; "" without a file
		err  error
		want []string
	}{
		{"no file", "", errors.New("no such file"), []string{"set the right path in the [[module]] table, or install what brings the file"}},
		{"a library of pcscd is missing", "m.so", errors.New("dlopen: libpcsclite.so.1: cannot open shared object file: No such file or directory"), []string{"sudo apt install libpcsclite1"}},
		{"another library is missing", "my m.so", errors.New("dlopen: libx.so.1: cannot open shared object file"), []string{"ldd 'PATH' | grep 'not found'  # install the packages that bring these libraries"}},
		{"a library is missing, with musl", "m.so", errors.New("Error loading shared library libx.so.1: No such file"), []string{"ldd PATH | grep 'not found'  # install the packages that bring these libraries"}},
		{"another architecture", "m.so", errors.New("wrong ELF class: ELFCLASS32"), []string{"install the module for this program's architecture"}},
		{"a remote module", "m.so", errors.New(`the module failed; its command "ssh" ended`), []string{"run the command after remote: in the module's file by hand, with </dev/null", off}},
		{"no server", "p11-kit-client.so", errors.New("the module failed; its server cannot be reached"), []string{StartServer, off}},
		{"slow", "m.so", errors.New("the module did not answer within 30s"), []string{"if the token is slow, give the module more time in the configuration:\n[[module]]\nname = \"m\"\ntimeout = \"2m\"", off}},
		{"OpenSC does not start", "opensc-pkcs11.so", refused("C_Initialize"), []string{"sudo apt install libpcsclite1"}},
		{"CoolKey does not start", "libcoolkeypk11.so", refused("C_Initialize"), []string{"systemctl status pcscd.socket  # the module starts only where pcscd answers"}},
		{"NSS", "libsoftokn3.so", refused("C_Initialize"), []string{"tell the module where its database is, in the configuration:\n[[module]]\nname = \"m\"\ninit-args = \"configdir='sql:/home/me/.pki/nssdb'\""}},
		{"the spy", "pkcs11-spy.so", errors.New("PKCS11SPY is not set"), []string{"tell pkcs11-spy which module to watch, in the configuration:\n[[module]]\nname = \"m\"\nenv = { PKCS11SPY = \"/path/to/module.so\" }"}},
		{"another library", "m.so", errors.New("no function C_GetFunctionList"), []string{"name a PKCS#11 module in path: this file is another library", off}},
		{"a general error", "m.so", refused("C_Initialize"), []string{"check that the module finds its own configuration and may read it; if a variable names the file, set it with env in the [[module]] table"}},
		{"an unknown error", "m.so", errors.New("it crashed"), []string{off}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "m.so")
			if tt.file != "" {
				path = file(t, tt.file)
			}
			want := slices.Clone(tt.want)
			for i := range want {
				want[i] = strings.ReplaceAll(want[i], "PATH", path)
			}
			reason, got := Trouble(token.ModuleStatus{Name: "m", Path: path, Err: tt.err})
			if !slices.Equal(got, want) || reason != tt.err.Error() {
				t.Errorf("got %q, %q; want %q", reason, got, want)
			}
			if failure := Failure(&token.ModuleError{Module: "m", Path: path, Err: tt.err}); !slices.Equal(failure, want) {
				t.Errorf("as an error: got %q", failure)
			}
		})
	}
	if reason, next := Trouble(token.ModuleStatus{Name: "m"}); reason != "" || next != nil {
		t.Errorf("a module that works: %q, %q", reason, next)
	}
}

// A module whose file is missing comes with a package, when its kind is known.
func TestInstallModule(t *testing.T) {
	programs(t, "dnf")
	if got := Module(token.ModuleStatus{Path: "/missing/libsofthsm2.so", Err: errors.New("no such file")}); !slices.Equal(got, []string{"sudo dnf install softhsm"}) {
		t.Errorf("got %q", got)
	}
	if got := InstallModule("/missing/p11-kit-proxy.so"); got != "" {
		t.Errorf("a package helps nothing: got %q", got)
	}
}

// SoftHSM needs its configuration and its directory of tokens.
func TestSoftHSM(t *testing.T) {
	module := file(t, "libsofthsm2.so")
	m := token.ModuleStatus{Name: "softhsm2", Path: module, Err: &wire.Error{Function: "C_Initialize", RV: wire.CKRGeneralError}}
	dir := t.TempDir()
	config := filepath.Join(dir, "softhsm2.conf")
	t.Setenv("SOFTHSM2_CONF", config)
	if got := Module(m); len(got) != 1 || got[0] != "SOFTHSM2_CONF names "+config+", which cannot be read (no such file or directory): correct or unset the variable" {
		t.Errorf("without the file: %q", got)
	}
	tokens := filepath.Join(dir, "my tokens")
	if err := os.WriteFile(config, []byte("directories.tokendir = "+tokens+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Module(m); len(got) != 1 || got[0] != "mkdir -p -m 700 '"+tokens+"'" {
		t.Errorf("without the directory: %q", got)
	}
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := Module(m); len(got) != 1 || got[0] != "softhsm2-util --show-slots  # says more" {
		t.Errorf("with both: %q", got)
	}
}

// A machine without a TPM needs no step, and the error about the TPM goes when there are
// others.
func TestWithoutTPM(t *testing.T) {
	t.Setenv("TCTI", "")
	t.Setenv("TPM2_PKCS11_TCTI", "swtpm:port=1")
	tpm := &token.ModuleError{Module: "tpm2", Path: "/libtpm2_pkcs11.so", Err: errors.New("no TPM")}
	other := &token.ModuleError{Module: "m", Path: "/m.so", Err: errors.New("no such file")}
	all := []error{tpm, other}
	if got := WithoutTPM(all); !slices.Equal(got, all) {
		t.Errorf("a variable names a TPM: got %v", got)
	}
	t.Setenv("TPM2_PKCS11_TCTI", "")
	if !NoTPM() {
		t.Skip("this machine has a TPM")
	}
	if got := WithoutTPM(all); !slices.Equal(got, []error{other}) {
		t.Errorf("got %v", got)
	}
	if got := WithoutTPM(all[:1]); !slices.Equal(got, all[:1]) {
		t.Errorf("the only error: got %v", got)
	}
	reason, next := Trouble(token.ModuleStatus{Path: tpm.Path, Err: tpm.Err})
	if reason != "there is no TPM on this machine" || next != nil {
		t.Errorf("got %q, %q", reason, next)
	}
}

func TestFirst(t *testing.T) {
	soft, tpm, card := token.ModuleStatus{Path: "/libsofthsm2.so"}, token.ModuleStatus{Path: "/libtpm2_pkcs11.so"}, token.ModuleStatus{Path: "/opensc-pkcs11.so"}
	for _, tt := range []struct {
		name, got, want string
	}{
		{"a token of SoftHSM", FirstToken(soft), "softhsm2-util --init-token --free --label NAME"},
		{"a token of the TPM", FirstToken(tpm), "pkcs11-tool --module /libtpm2_pkcs11.so --init-token --slot-index 0 --label NAME"},
		{"a smart card", FirstToken(card), ""},
		{"a key", FirstKey(soft, token.TokenStatus{ID: wire.TokenID{Label: "it's"}}), `pkcs11-tool --module /libsofthsm2.so --token-label 'it'\''s' --login --keypairgen --key-type EC:prime256v1 --id 01 --label login --usage-sign`},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, tt.got, tt.want)
		}
	}
	if got := FirstKey(card, token.TokenStatus{ID: wire.TokenID{Manufacturer: "piv_II"}}); !strings.HasPrefix(got, "ykman piv keys generate 9a ") {
		t.Errorf("a key of a PIV card: got %q", got)
	}
}

func TestUnlock(t *testing.T) {
	for _, tt := range []struct {
		name, module string
		token        token.TokenStatus
		want         string
	}{
		{"a YubiKey with OpenSC", "/opensc-pkcs11.so", token.TokenStatus{ID: wire.TokenID{Manufacturer: "piv_II"}, Slot: "Yubico YubiKey"}, "ykman piv access unblock-pin "},
		{"another PIV card", "/opensc-pkcs11.so", token.TokenStatus{ID: wire.TokenID{Manufacturer: "piv_II"}, Slot: "Reader"}, "pkcs15-tool --unblock-pin "},
		{"a YubiKey", "/libykcs11.so.2", token.TokenStatus{}, "ykman piv access unblock-pin "},
		{"the TPM", "/libtpm2_pkcs11.so", token.TokenStatus{}, "wait, "},
		{"others", "/m.so", token.TokenStatus{ID: wire.TokenID{Label: "a b"}}, "pkcs11-tool --module /m.so --token-label 'a b' --login --login-type so --init-pin  #"},
	} {
		if got := Unlock(token.ModuleStatus{Path: tt.module}, tt.token); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
