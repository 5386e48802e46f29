package registry

import (
	"os"
	"testing"

	"p11-agent/agent/peer/terminaltest"
)

// The test program also plays other parts, in processes of their own.
const roleVariable = "P11_REGISTRY_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(terminaltest.Without(m).Run())
	case "namespace":
		os.Exit(namespaceMain())
	case "load":
		os.Exit(loadMain())
	case "undumpable":
		os.Exit(undumpableMain())
	case "bridge":
		os.Exit(bridgeMain())
	case "environment":
		os.Exit(environmentMain())
	default:
		panic("unknown role " + role)
	}
}

// need ends the test when something it has to have is missing: as a failure
// where everything is expected to be installed.
func need(t testing.TB, ok bool, what string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("CI") == "true":
		t.Fatal("missing: " + what)
	default:
		t.Skip("missing: " + what)
	}
}
