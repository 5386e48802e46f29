package registry

import (
	"os"
	"testing"

	"p11-agent/agent/peer/terminaltest"
)

// The test program also plays other roles, each in its own process.
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

// need ends the test when a required program or file is missing. The test fails where
// everything is expected to be installed; elsewhere it is skipped.
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
