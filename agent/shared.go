package agent

import (
	"context"
	"sync"

	"p11-agent/pinentry/waiting"
)

// A shared has something done once for everybody who waits for it at the same
// time: fifty logins are one prompt. The zero value is ready to use, from any
// goroutine.
type shared[T any] struct {
	mu    sync.Mutex
	calls map[string]*sharedCall[T] // under way, by what they are about
}

// sharedCall is one call, and its outcome.
type sharedCall[T any] struct {
	done    chan struct{}
	value   T
	err     error
	waiters int
	cancel  context.CancelFunc
	waiting waiting.List // the same, for whoever asks: one of them is asked
}

// do calls f, or waits for a call with the same key that is under way, and returns
// its outcome. f goes on for as long as anybody waits, with the values of the first
// one's context; who comes after its end, or when nobody waits for it any more, has
// it called anew. The error is that of f or of ctx.
func (s *shared[T]) do(ctx context.Context, key string, f func(context.Context) (T, error)) (T, error) {
	s.mu.Lock()
	c := s.calls[key]
	if c == nil {
		c = &sharedCall[T]{done: make(chan struct{})}
		together, cancel := context.WithCancel(waiting.NewContext(context.WithoutCancel(ctx), &c.waiting))
		c.cancel = cancel
		if s.calls == nil {
			s.calls = make(map[string]*sharedCall[T])
		}
		s.calls[key] = c
		go func() {
			defer cancel()
			value, err := f(together)
			s.mu.Lock()
			c.value, c.err = value, err
			s.endLocked(key, c)
			s.mu.Unlock()
			close(c.done)
		}()
	}
	c.waiters++
	c.waiting.Add(ctx)
	s.mu.Unlock()
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	if c.waiters--; c.waiters == 0 {
		c.cancel()
		s.endLocked(key, c)
	}
	s.mu.Unlock()
	c.waiting.Leave(ctx)
	var none T
	return none, ctx.Err()
}

// endLocked makes room for the next call.
func (s *shared[T]) endLocked(key string, c *sharedCall[T]) {
	if s.calls[key] == c {
		delete(s.calls, key)
	}
}
