package main

import (
	"bytes"
	"io"
	"sync"
)

// maxLater bounds what a laterWriter keeps, in bytes.
const maxLater = 1 << 20

// laterWriter keeps what is written into it until flush, and then writes it at once. It may
// be used by any goroutine.
type laterWriter struct {
	out io.Writer

	mu      sync.Mutex
	kept    bytes.Buffer
	flushed bool
}

func (w *laterWriter) Write(b []byte) (int, error) {
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

func (w *laterWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.flushed {
		w.flushed = true
		_, _ = w.kept.WriteTo(w.out) // nobody to tell
	}
}
