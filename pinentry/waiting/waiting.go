// Package waiting keeps those together who wait for one answer, of whom one at a
// time is asked: the prompt is where the one is who has waited longest, and when
// that one leaves it goes on where the next one is.
//
// It promises that nobody who has left is asked any longer: the context of a
// question ends with that of the one who is asked. Who waits, and for what, is
// decided by others.
package waiting

import (
	"context"
	"errors"
	"sync"
)

// A List has the requests that wait for an answer, as their contexts. The zero
// value is empty and ready to use. Its methods are safe for concurrent use.
type List struct {
	mu    sync.Mutex
	all   []context.Context // in the order they came
	added chan struct{}     // closed and replaced when one comes
	asked context.Context   // the request that is asked, or was asked last
	ended chan struct{}     // closed when nobody is asked for it any more
}

// Add adds a request. It is on the list for as long as its context lasts.
func (l *List) Add(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pruneLocked()
	l.all = append(l.all, ctx)
	if l.added != nil {
		close(l.added)
		l.added = nil
	}
}

func (l *List) pruneLocked() {
	kept := l.all[:0]
	for _, ctx := range l.all {
		if ctx.Err() == nil {
			kept = append(kept, ctx)
		}
	}
	clear(l.all[len(kept):])
	l.all = kept
}

// Leave is called by a request whose context has ended. It returns when nobody is
// asked on its behalf any more, which takes as long as a question takes to notice:
// who has asked does not go on while the prompt is still in the terminal.
func (l *List) Leave(ctx context.Context) {
	l.mu.Lock()
	var ended chan struct{}
	if l.asked == ctx {
		ended = l.ended
	}
	l.mu.Unlock()
	if ended != nil {
		<-ended
	}
}

// first returns the request that has waited longest, which is asked until ended is
// closed, or a channel that is closed when there is one.
func (l *List) first() (one context.Context, ended chan<- struct{}, added <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pruneLocked()
	if len(l.all) > 0 {
		l.asked, l.ended = l.all[0], make(chan struct{})
		return l.asked, l.ended, nil
	}
	if l.added == nil {
		l.added = make(chan struct{})
	}
	return nil, nil, l.added
}

type listKey struct{}

// NewContext returns a context that carries the list.
func NewContext(ctx context.Context, l *List) context.Context {
	return context.WithValue(ctx, listKey{}, l)
}

// Ask has a question asked until there is an answer, or an error other than that
// of a context. The context that ask gets has the values of the request that has
// waited longest, and ends with that request or with ctx, whichever is first.
// When it was the request, and ask has returned for that reason, ask is called
// again for the next one; it waits for one if there is none.
//
// Without a list in ctx, ask gets ctx itself.
func Ask(ctx context.Context, ask func(context.Context) error) error {
	l, _ := ctx.Value(listKey{}).(*List)
	if l == nil {
		return ask(ctx)
	}
	for {
		one, ended, added := l.first()
		if one == nil {
			select {
			case <-added:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := during(ctx, one, ended, ask)
		if ctx.Err() != nil || one.Err() == nil || !errors.Is(err, one.Err()) {
			return err
		}
	}
}

// during calls ask with the values of one, for as long as both contexts last, and
// closes ended then, also should ask panic.
func during(ctx, one context.Context, ended chan<- struct{}, ask func(context.Context) error) error {
	defer close(ended)
	both, cancel := context.WithCancelCause(one)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })()
	return ask(both)
}
