package output

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
)

// Only stderr is the journal: the log file of an agent in the background keeps its
// times.
func TestLogIsForItsReader(t *testing.T) {
	st, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	file := st.Sys().(*syscall.Stat_t)
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", file.Dev, file.Ino)) // stderr is the journal
	var b strings.Builder
	NewLog(&b, slog.LevelInfo).Info("m")
	if !strings.HasPrefix(b.String(), "time=") {
		t.Errorf("the log has %q", &b)
	}
}
