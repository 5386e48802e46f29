package process

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/token/wire"
)

const (
	stderrLine    = 512 // the bytes of one line that count
	stderrPerProc = 200 // the lines of one process that are logged
	// The agent reads so many bytes in so much time. A module that prints more waits for the agent.
	stderrBurst = 1 << 20
	stderrSpan  = 100 * time.Millisecond

	// An error of a module quotes so many of the last lines, and so many bytes of each.
	quotedLines = 3
	quotedLine  = 200
)

// output is what a module process prints: its standard error, with what the module writes to the system log
// (token/module/words.c). The lines go to the log, within bounds, and errors quote the last ones.
//
// A module may print the PIN that it gets; pkcs11-spy does. It may also print why it does not decrypt something. So
// output neither logs nor quotes what a module prints while it has a PIN, decrypts, or derives. For that, the pipe is read under mu: output takes in all that the process has written before
// its answer counts.
type output struct {
	log  *slog.Logger
	pipe syscall.RawConn // nil in tests

	mu      sync.Mutex
	secrets int      // the requests under way that carry a PIN, decrypt or derive
	line    []byte   // the line that has not ended
	secret  bool     // line began during such a request
	last    []string // the last lines
	lines   uint64   // the number of lines so far
	logged  int
	dropped int
	buf     [4096]byte
}

func newOutput(pipe *os.File, log *slog.Logger) (*output, error) {
	raw, err := pipe.SyscallConn()
	return &output{log: log, pipe: raw}, err
}

// readAll reads until read fails. It reads on when it no longer logs: a module that cannot print would hang.
func (w *output) readAll(read func(limit int) (int, error)) {
	left, end := 0, time.Time{} // of this span
	for {
		now := time.Now()
		if left <= 0 {
			time.Sleep(end.Sub(now))
			now = time.Now()
		}
		if !now.Before(end) {
			left, end = stderrBurst, now.Add(stderrSpan)
		}
		n, err := read(left)
		left -= n
		if err != nil {
			break
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endLineLocked()
	if w.dropped > 0 {
		w.log.Warn("module printed too much", "lines not shown", w.dropped)
	}
}

// read waits for the process to print, and takes that in.
func (w *output) read(limit int) (n int, err error) {
	wait := w.pipe.Read(func(fd uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		n, err = w.takeLocked(int(fd), limit)
		return !errors.Is(err, unix.EAGAIN)
	})
	return n, cmp.Or(wait, err)
}

// catchUpLocked takes in what the process has printed so far, within bounds.
func (w *output) catchUpLocked() {
	if w.pipe == nil {
		return
	}
	_ = w.pipe.Control(func(fd uintptr) { // fails when the process has ended
		for left := stderrBurst; left > 0; {
			n, err := w.takeLocked(int(fd), left)
			if err != nil {
				return
			}
			left -= n
		}
	})
}

// takeLocked reads once from the pipe, without blocking.
func (w *output) takeLocked(fd, limit int) (int, error) {
	n, err := unix.Read(fd, w.buf[:min(limit, len(w.buf))])
	switch {
	case errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	w.addLocked(w.buf[:n])
	clear(w.buf[:n])
	return n, nil
}

// addLocked takes in printed bytes.
func (w *output) addLocked(b []byte) {
	for {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		w.secret = w.secret || w.secrets > 0
		w.line = append(w.line, part[:min(len(part), stderrLine-len(w.line))]...)
		if !whole {
			return
		}
		w.endLineLocked()
		b = rest
	}
}

// endLineLocked logs and keeps the line that has ended.
func (w *output) endLineLocked() {
	line, secret := w.line, w.secret
	w.line, w.secret = w.line[:0], w.secrets > 0
	defer clear(line)
	switch {
	case len(bytes.TrimSpace(line)) == 0:
	case secret:
		w.dropped++
	default:
		text := plain.Output(line)
		w.lines++
		w.last = append(w.last, text)
		w.last = w.last[max(0, len(w.last)-quotedLines):]
		if w.logged == stderrPerProc {
			w.dropped++
			return
		}
		w.logged++
		w.log.Debug("module printed", "line", text)
	}
}

// beginSecret keeps what the process prints from now on secret, until endSecret. Both nest.
func (w *output) beginSecret() { w.addSecret(+1) }

func (w *output) endSecret() { w.addSecret(-1) }

func (w *output) addSecret(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catchUpLocked()
	w.secrets += n
}

// mark returns the number of lines so far.
func (w *output) mark() uint64 {
	if w == nil {
		return 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lines
}

// since returns the last lines after a mark.
func (w *output) since(mark uint64) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catchUpLocked()
	n := min(w.lines-mark, uint64(len(w.last)))
	return slices.Clone(w.last[len(w.last)-int(n):])
}

// explain adds the lines since mark to an error of the module that gives no reason.
func (w *output) explain(err error, mark uint64) error {
	if w == nil || !saysNothing(err) {
		return err
	}
	return quote(err, w.since(mark))
}

// saysNothing reports whether modules return an error for many reasons.
func saysNothing(err error) bool {
	return wire.IsRV(err, wire.CKRGeneralError, wire.CKRFunctionFailed, wire.CKRDeviceError, wire.CKRDeviceMemory, wire.CKRHostMemory,
		wire.CKRArgumentsBad)
}

// A quotedError is an error of a module with the module's output.
type quotedError struct {
	err  error
	said []string
}

// itSaid separates an error from the output of the module.
const itSaid = "; it said: "

// WithoutOutput returns the text of an error without the output of the module, which may differ each time.
func WithoutOutput(err error) string {
	text, _, _ := strings.Cut(err.Error(), itSaid)
	return text
}

// quote adds the output of the module to an error, if there is any.
func quote(err error, said []string) error {
	if err == nil || len(said) == 0 || strings.Contains(err.Error(), itSaid) {
		return err
	}
	return &quotedError{err, said}
}

func (e *quotedError) Error() string {
	text := strings.Replace(e.err.Error(), " and does not say why", "", 1)
	for i, line := range e.said {
		text += [...]string{itSaid, " | "}[min(i, 1)] + plain.Cut(line, quotedLine)
	}
	return text
}

func (e *quotedError) Unwrap() error { return e.err }
