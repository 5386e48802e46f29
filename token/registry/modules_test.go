package registry_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/token"
	"p11-agent/token/registry"
)

// The command of a remote module gets the same environment as a module process: both
// follow one rule.
func TestEnvironmentIsThatOfModuleProcesses(t *testing.T) {
	for _, name := range []string{
		"USER", "LOGNAME", "LANG", "TZ", "SOFTHSM2_CONF", "OPENSC_CONF", "OPENSC_DEBUG", "LC_ALL", "XDG_DATA_HOME", "TPM2_PKCS11_STORE",
		"TPM2TOOLS_TCTI", "TSS2_LOG", "PKCS11_X", "P11_KIT_X", "PCSCLITE_X",
		"SECRET_TOKEN", "SSH_AUTH_SOCK", "SOFTHSM2_X", "PKCS11", "P11_AGENT_X", "LD_X", "GNUPGHOME", "DISPLAY", "DBUS_SESSION_BUS_ADDRESS",
	} {
		t.Setenv(name, "x")
	}
	file := filepath.Join(t.TempDir(), "environment")
	own := []string{"P11_REGISTRY_TEST_ROLE=environment", "P11_REGISTRY_TEST_FILE=" + file, "SECRET_TOKEN=given"}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	store := token.Open(token.Options{
		Modules: []token.ModuleSpec{{Name: "m", Path: "/m.so", Env: own}},
		Command: []string{self},
		Log:     slog.New(slog.DiscardHandler),
	})
	<-store.Settled() // the command has ended, because it is no module process
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(string(b), "\x00")
	want := registry.Environment(os.Environ(), own)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("a module process has\n%q\nand a command\n%q", got, want)
	}
}
