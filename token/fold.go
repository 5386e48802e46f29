package token

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// foldBurst is how often the same is logged within a foldWindow. What comes more often
	// is one line with a count at the window's end.
	foldBurst  = 5
	foldWindow = time.Minute
)

// folding is a slog.Handler that folds the warnings of one module: a module that lies at
// each look must not push everything else out of the log. The kinds are the messages, which
// are constants of this package, so there are few. Lines below slog.LevelWarn pass.
type folding struct {
	next slog.Handler // with the attributes of this handler
	fold *folds
}

// folds is what the handlers of one module share.
type folds struct {
	mu    sync.Mutex
	kinds map[string]*fold
	over  bool // everything passes
}

// fold is what was logged of one kind in the present window.
type fold struct {
	lines  int
	more   int // that were not logged
	level  slog.Level
	handle slog.Handler // of the last of them
	timer  *time.Timer
}

func newFolding(next slog.Handler) *folding {
	return &folding{next: next, fold: &folds{kinds: make(map[string]*fold)}}
}

// Enabled is that of the handler behind.
func (f *folding) Enabled(ctx context.Context, l slog.Level) bool { return f.next.Enabled(ctx, l) }

// WithAttrs returns a handler that shares the counts.
func (f *folding) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &folding{next: f.next.WithAttrs(attrs), fold: f.fold}
}

// WithGroup returns a handler that shares the counts.
func (f *folding) WithGroup(name string) slog.Handler {
	return &folding{next: f.next.WithGroup(name), fold: f.fold}
}

// Handle logs the record, or counts it.
func (f *folding) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelWarn || f.fold.first(f.next, r) {
		return f.next.Handle(ctx, r)
	}
	return nil
}

// first tells whether a record is to be logged.
func (fs *folds) first(next slog.Handler, r slog.Record) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.over {
		return true
	}
	k := fs.kinds[r.Message]
	if k == nil {
		k = new(fold)
		k.timer = time.AfterFunc(foldWindow, func() { fs.end(r.Message, k) })
		fs.kinds[r.Message] = k
	}
	k.level, k.handle = max(k.level, r.Level), next
	if k.lines < foldBurst {
		k.lines++
		return true
	}
	k.more++
	return false
}

// end ends a window with one line, if there is something to tell.
func (fs *folds) end(message string, k *fold) {
	fs.mu.Lock()
	if fs.kinds[message] == k {
		delete(fs.kinds, message)
	}
	more, level, handle := k.more, k.level, k.handle
	k.more = 0
	fs.mu.Unlock()
	if more == 0 || !handle.Enabled(context.Background(), level) {
		return
	}
	r := slog.NewRecord(time.Now(), level, message, 0)
	r.AddAttrs(slog.Int("more like this", more), slog.Duration("within", foldWindow))
	_ = handle.Handle(context.Background(), r) // as slog does
}

// close ends all windows, and folds no more.
func (f *folding) close() {
	fs := f.fold
	fs.mu.Lock()
	all := fs.kinds
	fs.kinds, fs.over = make(map[string]*fold), true
	fs.mu.Unlock()
	for message, k := range all {
		k.timer.Stop()
		fs.end(message, k)
	}
}
