package token_test

import (
	"os"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token"
	"p11-agent/token/module"
	"p11-agent/token/tokentest"
)

// realModule is the variable that makes this program a module process.
const realModule = "P11_TEST_MODULE"

// TestMain makes the test's own program a module process: a Fake's, or one that
// loads modules.
func TestMain(m *testing.M) {
	tokentest.Main()
	if os.Getenv(realModule) != "" {
		os.Exit(module.Main())
	}
	os.Exit(terminaltest.Without(m).Run())
}

var self = []string{"/proc/self/exe"}

// fakeSpec is the module of a Fake.
func fakeSpec(f *tokentest.Fake) token.ModuleSpec {
	return token.ModuleSpec{Name: "fake", Path: "/nowhere/fake.so", Env: f.Env()}
}

// realSpec is a module of C.
func realSpec(name, path string, env ...string) token.ModuleSpec {
	return token.ModuleSpec{
		// Of a detector of races in the child, say so and fail.
		Name: name, Path: path, Env: append(env, realModule+"=1", "GORACE=halt_on_error=1 atexit_sleep_ms=0"),
	}
}

// allKinds is an ID for each kind of key.
var allKinds = map[string]byte{
	tokentest.RSA2048: 1, tokentest.P256: 2, tokentest.P384: 3, tokentest.P521: 4, tokentest.Ed25519: 5,
}
