package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"p11-agent/agent/door"
	"p11-agent/agent/logfold"
	"p11-agent/cmd/p11-agent/paths"
)

// logs writes all lines into one log. It writes the lines about what was granted into a second log, too.
type logs struct{ all, granted slog.Handler }

var _ slog.Handler = (*logs)(nil)

func (l *logs) Enabled(ctx context.Context, level slog.Level) bool { return l.all.Enabled(ctx, level) }

func (l *logs) Handle(ctx context.Context, r slog.Record) error {
	err := l.all.Handle(ctx, r.Clone())
	if logfold.Granted(r) {
		err = errors.Join(err, l.granted.Handle(ctx, r))
	}
	return err
}

func (l *logs) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logs{l.all.WithAttrs(attrs), l.granted.WithAttrs(attrs)}
}

func (l *logs) WithGroup(name string) slog.Handler {
	return &logs{l.all.WithGroup(name), l.granted.WithGroup(name)}
}

// maxLogFile is the size at which a log file becomes the old one.
const maxLogFile = 1 << 20

// A logFile is the log of an agent without terminal and journal. It is two files of at most 1 MiB.
type logFile struct {
	path    string
	passing bool // Close removes the file

	mu   sync.Mutex
	file *os.File
	size int64
}

// openLogs opens the logs of the agent with this socket. They are in the state directory, or next to the socket if the
// state directory cannot be written. They are never in a directory that others may write to. Without a place, the
// agent writes no log.
func openLogs(socket *door.Socket, warn func(error)) (all, granted io.WriteCloser) {
	var errs []error
	dirs := []string{paths.StateDir()}
	if !socket.Shared() {
		dirs = append(dirs, filepath.Dir(socket.Path()))
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		all, err := openLogFile(dir, paths.AgentLog)
		if err == nil {
			var granted *logFile
			if granted, err = openLogFile(dir, paths.GrantedLog); err == nil {
				// A directory that ends with the agent is removed, if it is empty.
				all.passing = paths.PrivateDir(socket.Path()) == dir
				granted.passing = all.passing
				if len(errs) > 0 {
					warn(fmt.Errorf("open the log: %w: it is %s now", errors.Join(errs...), all.path))
				}
				return all, granted
			}
			_ = all.Close()
		}
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		warn(fmt.Errorf("open the log: %w: the agent writes none", errors.Join(errs...)))
	}
	return noLog{io.Discard}, noLog{io.Discard}
}

// noLog keeps nothing.
type noLog struct{ io.Writer }

func (noLog) Close() error { return nil }

// openLogFile opens a log in a directory, which it makes.
func openLogFile(dir, name string) (*logFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &logFile{path: filepath.Join(dir, name)}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size = f, st.Size()
	return nil
}

func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > maxLogFile {
		// If the file cannot be renamed, it grows: that is better than no log.
		if err := os.Rename(l.path, l.path+".old"); err == nil {
			old := l.file
			if err := l.open(); err == nil {
				_ = old.Close()
			}
		}
	}
	n, err := l.file.Write(b)
	l.size += int64(n)
	return n, err
}

// Close closes the file. A file beside a private socket is removed.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.passing {
		_ = os.Remove(l.path)          // a file that stays keeps its directory
		_ = os.Remove(l.path + ".old") // the file may not exist
	}
	return l.file.Close()
}
