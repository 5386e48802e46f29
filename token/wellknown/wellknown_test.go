package wellknown

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKindOf(t *testing.T) {
	for path, want := range map[string]Kind{
		"/usr/lib/opensc-pkcs11.so": OpenSC, "onepin-opensc-pkcs11.so": OpenSC, "/x/libykcs11.so.2": YKCS11,
		"/usr/lib/softhsm/libsofthsm2.so": SoftHSM, "/x/libtpm2_pkcs11.so.1": TPM2, "libcoolkeypk11.so": CoolKey,
		"/x/libopencryptoki.so.0": OpenCryptoki, "PKCS11_API.so": OpenCryptoki, "libsoftokn3.so": NSS,
		"/x/pkcs11-spy.so": Spy, "p11-kit-proxy.so": P11Kit, "p11-kit-client.so": P11Kit, "gnome-keyring-pkcs11.so": GNOMEKeyring,
		"": Other, "/opt/opensc/libvendor.so": Other,
	} {
		if got := KindOf(path); got != want {
			t.Errorf("%s: kind %d, want %d", path, got, want)
		}
	}
	if debian, fedora := SoftHSM.Packages(); debian != "softhsm2" || fedora != "softhsm" {
		t.Errorf("SoftHSM is in the packages %q and %q", debian, fedora)
	}
	if debian, _ := P11Kit.Packages(); debian != "" {
		t.Errorf("the package %s brings p11-kit's proxy, which the agent does not use", debian)
	}
	if debian, _ := Other.Packages(); debian != "" || Other.Sandboxed() || Spy.Sandboxed() || !YKCS11.SmartCards() || SoftHSM.SmartCards() {
		t.Error("a module has what another one has")
	}
}

func TestSoftHSMConfig(t *testing.T) {
	home := t.TempDir()
	if got := SoftHSMConfig("/a", home); got != "/a" {
		t.Errorf("the variable names /a, and %s counts", got)
	}
	file := SoftHSMUserConfig(home)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("directories.tokendir = /b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := SoftHSMConfig("", home); got != file {
		t.Errorf("%s counts, want %s", got, file)
	}
	if dir, err := SoftHSMTokens(file); err != nil || dir != "/b" {
		t.Errorf("got %q, %v", dir, err)
	}
	if dir, err := SoftHSMTokens(filepath.Join(home, "none")); err == nil {
		t.Errorf("a file that is not there names %q", dir)
	}
}

func TestTokenDir(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		"directories.tokendir = /a/b\n":    "/a/b",
		"directories.tokendir=/a b  # c\n": "/a b",
		"# directories.tokendir = /a\n":    "",
		"directories.tokendir = /a\nlog.level = ERROR\ndirectories.tokendir = /b": "/b",
		"directories.tokendir\n": "",
		strings.Repeat("x", 2*maxConfig) + "\ndirectories.tokendir = /a\n": "",
	} {
		if got := tokenDir(strings.NewReader(text)); got != want {
			t.Errorf("%.60q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzTokenDir(f *testing.F) {
	f.Add("directories.tokendir = /var/lib/softhsm/tokens/\nobjectstore.backend = file\n")
	f.Add("directories.tokendir=/a#b=c\n=\n")
	f.Fuzz(func(t *testing.T, text string) {
		dir := tokenDir(strings.NewReader(text))
		if strings.ContainsAny(dir, "#\n") || !strings.Contains(text, dir) {
			t.Errorf("got %q", dir)
		}
	})
}
