package token_test

import (
	"fmt"
	"os"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token"
	"p11-agent/token/module"
	"p11-agent/token/tokentest"
)

// realModule is the variable that makes this program a module process.
const realModule = "P11_TEST_MODULE"

// TestMain makes the program of the test a module process if an environment variable says so:
// the process of a Fake, or a process that loads a module.
func TestMain(m *testing.M) {
	tokentest.Main()
	if os.Getenv(realModule) != "" {
		os.Exit(module.Main())
	}
	// Tests that run at the same time may put cards into the readers of the machine's pcscd, and
	// pull them. The agent would hurry the modules of this test. A test with cards names its pcscd.
	if err := os.Setenv("PCSCLITE_CSOCK_NAME", "/nonexistent/pcscd.comm"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(tokentest.RunAll(terminaltest.Without(m).Run))
}

var self = []string{"/proc/self/exe"}

// fakeSpec returns the module of a Fake.
func fakeSpec(f *tokentest.Fake) token.ModuleSpec {
	return token.ModuleSpec{Name: "fake", Path: "/nowhere/fake.so", Env: f.Env()}
}

// realSpec returns a module from a shared library.
func realSpec(name, path string, env ...string) token.ModuleSpec {
	return token.ModuleSpec{
		// The race detector of the child reports a race and ends the child.
		Name: name, Path: path, Env: append(env, realModule+"=1", "GORACE=halt_on_error=1 atexit_sleep_ms=0"),
	}
}

// allKinds has an ID for each kind of key.
var allKinds = map[string]byte{
	tokentest.RSA2048: 1, tokentest.P256: 2, tokentest.P384: 3, tokentest.P521: 4, tokentest.Ed25519: 5,
}
