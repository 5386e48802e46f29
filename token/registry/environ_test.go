package registry

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestEnvironment(t *testing.T) {
	kept := []string{
		"HOME=/home/u", "PATH=/bin", "LANG=C", "LC_ALL=C", "TMPDIR=/tmp", "XDG_RUNTIME_DIR=/run/user/1", "SOFTHSM2_CONF=/s", "OPENSC_CONF=/o",
		"TPM2_PKCS11_STORE=/t", "PKCS11_X=1", "P11_KIT_DEBUG=all", "PCSCLITE_X=1",
	}
	// Near misses, too.
	dropped := []string{
		"SECRET_TOKEN=x", "SSH_AUTH_SOCK=/a", "AWS_SECRET_ACCESS_KEY=x", "LD_PRELOAD=/x.so", "HOMEX=1", "XHOME=1", "XPKCS11_=1",
		"SOFTHSM2_CONF_PIN=x", "home=/h", "", "=x", "GLIBC_TUNABLES=none",
	}
	extra := []string{"SOFTHSM2_CONF=/mine", "ANYTHING=goes"}
	got := Environment(slices.Concat(dropped, kept, dropped), extra)
	want := slices.Concat(kept, extra)
	if len(got) != len(want)+2 || !slices.Equal(got[:len(want)], want) {
		t.Errorf("%q", got)
	}
	for _, kv := range got[len(want):] {
		if !strings.HasPrefix(kv, "GLIBC_TUNABLES=glibc.malloc.perturb=") && kv != "GOTRACEBACK=none" {
			t.Errorf("%s was added", kv)
		}
	}
}

// environmentMain writes its environment to the file that a variable names.
func environmentMain() int {
	if err := os.WriteFile(os.Getenv(fileVariable), []byte(strings.Join(os.Environ(), "\x00")), 0o600); err != nil {
		panic(err)
	}
	return 0
}

// fileVariable is for the role "environment".
const fileVariable = "P11_REGISTRY_TEST_FILE"
