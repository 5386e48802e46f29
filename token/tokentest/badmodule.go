package tokentest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
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

// built holds the shared libraries that this process has compiled, by what they were made from.
var built sync.Map

// BuildModule compiles a shared library from C and returns its path. The path is the test's own.
// The compiler runs once for each source in a process.
func BuildModule(t testing.TB, name string, source []byte, flags ...string) string {
	t.Helper()
	cc := program(t, "gcc")
	compile := sync.OnceValues(func() ([]byte, error) { return compileModule(cc, name, source, flags) })
	once, _ := built.LoadOrStore(fmt.Sprintf("%s %s %q", name, flags, source), compile)
	library, err := once.(func() ([]byte, error))()
	if err != nil {
		t.Fatal(err)
	}
	so := filepath.Join(TempDir(t), name+".so")
	if err := os.WriteFile(so, library, 0o700); err != nil {
		t.Fatal(err)
	}
	return so
}

// compileModule returns the shared library as bytes.
func compileModule(cc, name string, source []byte, flags []string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "p11")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	c, so := filepath.Join(dir, name+".c"), filepath.Join(dir, name+".so")
	if err := os.WriteFile(c, source, 0o600); err != nil {
		return nil, err
	}
	args := append([]string{"-shared", "-fPIC", "-O1", "-Wall", "-o", so, c, "-lpthread", "-ldl"}, flags...)
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil || len(out) > 0 {
		return nil, fmt.Errorf("compile %s: %w\n%s", c, err, out)
	}
	return os.ReadFile(so)
}

// BadModuleEnv is the environment for a process that loads a bad module, to be
// added to what it has: the commands it starts with. commandFile, when not
// empty, is the path of a file; from when it exists, it holds the commands
// instead. logFile, when not empty, gets the name of each function called.
func BadModuleEnv(commands, commandFile, logFile string) []string {
	return []string{"BADMODULE=" + commands, "BADMODULE_FILE=" + commandFile, "BADMODULE_LOG=" + logFile}
}
