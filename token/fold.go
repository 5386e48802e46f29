package token

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// foldBurst is how many warnings of one kind are logged in a foldWindow. At the end of the
	// window, one line counts the rest.
	foldBurst  = 5
	foldWindow = time.Minute
)

// folding is a slog.Handler that folds the warnings of one module. A module that lies at each look
// must not fill the log. The kind of a warning is its message. Messages are constants of this
// package, so there are few. Lines below slog.LevelWarn pass.
type folding struct {
	next slog.Handler // with the attributes of this handler
	fold *folds
}

// folds is the state that all handlers of one module share.
type folds struct {
	mu    sync.Mutex
	kinds map[string]*fold
	over  bool // all lines pass
}

// A fold counts the warnings of one kind in the present window.
type fold struct {
	lines  int
	more   int // the lines that were not logged
	level  slog.Level
	handle slog.Handler // of the last line
	timer  *time.Timer
}

func newFolding(next slog.Handler) *folding {
	return &folding{next: next, fold: &folds{kinds: make(map[string]*fold)}}
}

// Enabled implements slog.Handler.
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

// first reports whether to log a record.
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

// end ends a window, and logs the number of the remaining lines, if any.
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

// close ends all windows. After that, all lines pass.
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
