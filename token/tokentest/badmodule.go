package tokentest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

//go:embed testdata/badmodule.c
var badModule []byte

// BuildBadModule compiles a PKCS#11 module that misbehaves on command and
// returns its path. The commands, which its source explains, are taken from the
// environment of the process that loads it: see BadModuleEnv.
//
// The test is skipped, or fails in CI, where there is no C compiler.
func BuildBadModule(t testing.TB) string {
	t.Helper()
	return BuildModule(t, "badmodule", badModule)
}

// BuildModule compiles a shared library from C and returns its path.
func BuildModule(t testing.TB, name string, source []byte, flags ...string) string {
	t.Helper()
	cc := program(t, "gcc")
	dir := TempDir(t)
	c, so := filepath.Join(dir, name+".c"), filepath.Join(dir, name+".so")
	if err := os.WriteFile(c, source, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-shared", "-fPIC", "-O1", "-Wall", "-o", so, c, "-lpthread", "-ldl"}, flags...)
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("compile %s: %v\n%s", c, err, out)
	}
	return so
}

// BadModuleEnv is the environment for a process that loads a bad module, to be
// added to what it has: the commands it starts with. commandFile, when not
// empty, is the path of a file; from when it exists, it holds the commands
// instead. logFile, when not empty, gets the name of each function called.
func BadModuleEnv(commands, commandFile, logFile string) []string {
	return []string{"BADMODULE=" + commands, "BADMODULE_FILE=" + commandFile, "BADMODULE_LOG=" + logFile}
}
