package output

import (
	"bytes"
	"io"
	"sync"
)

// maxLater bounds the bytes that a Later keeps.
const maxLater = 1 << 20

// Later keeps what is written into it until Flush. After Flush it writes through. It keeps at most
// 1 MiB, and drops the rest. Its methods may be called from any goroutine.
type Later struct {
	out io.Writer

	mu      sync.Mutex
	kept    bytes.Buffer
	flushed bool
}

// NewLater returns a Later that writes to out.
func NewLater(out io.Writer) *Later { return &Later{out: out} }

// Write keeps b, or writes it after Flush.
func (w *Later) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.flushed {
		return w.out.Write(b)
	}
	if w.kept.Len()+len(b) <= maxLater {
		_, _ = w.kept.Write(b) // never fails
	}
	return len(b), nil
}

// Flush writes what was kept. A second call does nothing.
func (w *Later) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.flushed {
		w.flushed = true
		_, _ = w.kept.WriteTo(w.out) // the log has no other place to tell of an error
	}
}
