package pin

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A list of refused PINs that another user can write is not read, and a new refusal does not
// replace it.
func TestRefusalsOfOthers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, refusalsFile)
	if err := os.WriteFile(path, []byte("key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	load := func() *Refusals { return LoadRefusals(dir, slog.New(slog.NewTextHandler(&log, nil))) }
	if r := load(); !r.keys["key"] {
		t.Errorf("the file of this user is not read: %v", r.keys)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	r := load()
	if len(r.keys) > 0 || !strings.Contains(log.String(), "other users can write the file") {
		t.Errorf("read %v; the log: %s", r.keys, &log)
	}
	if err := r.save("another"); err == nil {
		t.Error("the file was replaced")
	}
}
