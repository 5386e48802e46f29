package readers

import (
	"context"
	"errors"

	"p11-agent/token/pcsc"
)

var (
	// ErrInUse says that another program uses a reader alone. A Watch does not notice when the reader is free.
	ErrInUse = errors.New("another program uses a reader alone")
	// ErrMissed says that the readers have changed since the last look at the module.
	ErrMissed = errors.New("the module has not noticed a card yet")
)

// A Watch notices cards that come or go while the module has no process. One goroutine may use it.
type Watch struct {
	socket  string
	service *pcsc.Service // nil: the connection is broken
	seen    []pcsc.Reader
}

// Watch begins to watch the readers. It fails if pcscd does not answer, and with ErrInUse or ErrMissed. The caller
// closes the Watch.
func (r *Readers) Watch(ctx context.Context) (*Watch, error) {
	r.mu.Lock()
	held, seen := len(r.held) > 0, r.seen
	r.mu.Unlock()
	w := &Watch{socket: r.socket}
	var err error
	if w.service, err = pcsc.Dial(ctx, w.socket); err != nil {
		return nil, err
	}
	w.seen, err = w.service.Readers(ctx)
	switch {
	case err != nil:
	case len(heldOf(w.seen)) > 0:
		err = ErrInUse
	case held || !sameCards(w.seen, seen):
		err = ErrMissed
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Changed reports whether a card has come or gone since the start. If pcscd was away and is back, Changed returns true.
func (w *Watch) Changed(ctx context.Context) bool {
	if w.service == nil {
		service, err := pcsc.Dial(ctx, w.socket)
		if err != nil {
			return false
		}
		w.service = service
		return true
	}
	now, err := w.service.Readers(ctx)
	if err != nil {
		w.Close()
		return false
	}
	return !sameCards(now, w.seen)
}

// Close ends the watch.
func (w *Watch) Close() {
	if w.service != nil {
		_ = w.service.Close()
		w.service = nil
	}
}
