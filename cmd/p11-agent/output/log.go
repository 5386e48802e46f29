package output

import (
	"io"
	"log/slog"
	"os"

	"p11-agent/systemd"
)

// NewLog makes a log on w for people. On stderr, if that is the journal, each entry has its attributes as
// fields and no time: the journal adds its own.
func NewLog(w io.Writer, level slog.Level) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if w != os.Stderr || !systemd.StderrIsJournal() {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(systemd.NewJournalHandler(level, slog.NewTextHandler(w, opts)))
}
