package token

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
	stderrLine    = 512 // bytes kept of one line a module prints
	stderrPerProc = 200 // lines logged of one process
	// A module may print so much in so much time: who prints more waits for us, and
	// not the other way round.
	stderrBurst = 1 << 20
	stderrSpan  = 100 * time.Millisecond

	// An error of a module quotes so many of the last lines, and so much of each.
	quotedLines = 3
	quotedLine  = 200
)

// words is what a module process prints: its standard error, with what the module
// writes to the system log (token/module/words.c). The lines are logged, within bounds,
// and the last ones are quoted in errors.
//
// A module may print the PIN that it is given; pkcs11-spy does. So what a module prints
// while it has a PIN is neither logged nor quoted. For that, the pipe is read under mu:
// what the process has written before its answer is taken in before the answer counts.
type words struct {
	log  *slog.Logger
	pipe syscall.RawConn // nil in tests

	mu      sync.Mutex
	hushed  int      // requests under way that have a PIN
	line    []byte   // the line that has not ended
	secret  bool     // it began while a request had a PIN
	last    []string // the last lines
	lines   uint64   // how many there were
	logged  int
	dropped int
	buf     [4096]byte
}

func newWords(pipe *os.File, log *slog.Logger) (*words, error) {
	raw, err := pipe.SyscallConn()
	return &words{log: log, pipe: raw}, err
}

// listen takes in what read gives until that fails. It reads on when it does not log
// any more: a module that cannot print would hang.
func (w *words) listen(read func(limit int) (int, error)) {
	left, end := 0, time.Time{} // of the span
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

// read waits for the process to print, and takes it in.
func (w *words) read(limit int) (n int, err error) {
	wait := w.pipe.Read(func(fd uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		n, err = w.takeLocked(int(fd), limit)
		return !errors.Is(err, unix.EAGAIN)
	})
	return n, cmp.Or(wait, err)
}

// catchUpLocked takes in what the process has printed until now, within bounds.
func (w *words) catchUpLocked() {
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

// takeLocked reads once from the pipe, which does not block.
func (w *words) takeLocked(fd, limit int) (int, error) {
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

// add takes in what was printed.
func (w *words) add(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addLocked(b)
}

func (w *words) addLocked(b []byte) {
	for {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		w.secret = w.secret || w.hushed > 0
		w.line = append(w.line, part[:min(len(part), stderrLine-len(w.line))]...)
		if !whole {
			return
		}
		w.endLineLocked()
		b = rest
	}
}

// endLineLocked notes the line that has ended.
func (w *words) endLineLocked() {
	line, secret := w.line, w.secret
	w.line, w.secret = w.line[:0], w.hushed > 0
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

// hush has what is printed from now on kept secret, until it is called once more with
// false.
func (w *words) hush(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catchUpLocked()
	if on {
		w.hushed++
	} else {
		w.hushed--
	}
}

// mark returns how many lines there were until now.
func (w *words) mark() uint64 {
	if w == nil {
		return 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lines
}

// since returns the last lines of those that came after mark.
func (w *words) since(mark uint64) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catchUpLocked()
	n := min(w.lines-mark, uint64(len(w.last)))
	return slices.Clone(w.last[len(w.last)-int(n):])
}

// explain adds the lines since mark to an error of the module that says nothing by
// itself.
func (w *words) explain(err error, mark uint64) error {
	if w == nil || !saysNothing(err) {
		return err
	}
	return quoting(err, w.since(mark))
}

// saysNothing tells whether an error of a module is one of those that modules return
// for anything.
func saysNothing(err error) bool {
	return wire.IsRV(err, wire.CKRGeneralError, wire.CKRFunctionFailed, wire.CKRDeviceError, wire.CKRDeviceMemory, wire.CKRHostMemory,
		wire.CKRArgumentsBad)
}

// A quotedError is an error of a module with the module's own words.
type quotedError struct {
	err  error
	said []string
}

// itSaid comes before what a module has said.
const itSaid = "; it said: "

// withoutWords returns the text of an error without what the module has said, which may
// be different each time.
func withoutWords(err error) string {
	text, _, _ := strings.Cut(err.Error(), itSaid)
	return text
}

// quoting adds what a module has said, if that is anything.
func quoting(err error, said []string) error {
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
