package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/cmd/p11-agent/paths"
)

// What was granted stays when other lines fill the log.
func TestGrantedHasItsFile(t *testing.T) {
	dir := t.TempDir()
	open := func(name string) *logFile {
		l, err := openLogFile(filepath.Join(dir, "state"), name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	all, granted := open(paths.AgentLog), open(paths.GrantedLog)
	log := slog.New(&logs{slog.NewTextHandler(all, nil), slog.NewTextHandler(granted, nil)})
	log.With("request", "sign").Info("signed", "result", "ok", "client", "ssh (1)")
	for range 3 * maxLogFile / 1000 {
		log.Warn("request refused", "result", "refused", "client", "ssh (1)", "reason", strings.Repeat("x", 1000))
	}
	text := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if strings.Contains(text(all.path)+text(all.path+".old"), "signed") {
		t.Error("the log is not full")
	}
	if got := text(granted.path); filepath.Base(granted.path) != "granted.log" || strings.Count(got, "\n") != 1 || !strings.Contains(got, `msg=signed request=sign result=ok client="ssh (1)"`) {
		t.Errorf("%s has %q", granted.path, got)
	}
}
