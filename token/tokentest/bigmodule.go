package tokentest

import (
	_ "embed"
	"fmt"
	"testing"
)

//go:embed testdata/bigmodule.c
var bigModule []byte

// BuildBigModule compiles a PKCS#11 module that adds a crowd of key pairs to the tokens of
// another module, and returns its path: see BigModuleEnv.
//
// The test is skipped, or fails in CI, where there is no C compiler.
func BuildBigModule(t testing.TB) string {
	t.Helper()
	return BuildModule(t, "bigmodule", bigModule)
}

// BigModuleEnv is the environment for a process that loads a big module, to be added to
// what it has. wrap is the path of the module whose tokens get so many pairs of keys that
// cannot sign. While the file hold exists, no attribute of these is read. The file counts
// has how often C_FindObjects and C_GetAttributeValue were called. Either may be empty.
func BigModuleEnv(wrap string, pairs int, hold, counts string) []string {
	return []string{
		"BIGMODULE_WRAP=" + wrap, fmt.Sprintf("BIGMODULE_PAIRS=%d", pairs),
		"BIGMODULE_HOLD=" + hold, "BIGMODULE_COUNT=" + counts,
	}
}
