// Package doortest makes directories for sockets. It is for tests.
package doortest

import (
	"os"
	"testing"
)

// Dir makes a directory whose files can be sockets: its path is short. The directory goes
// with the test.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "p11")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
