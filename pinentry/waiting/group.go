package waiting

import (
	"context"
	"sync"
)

// A Group makes one call for all requests that wait for the same outcome: fifty logins
// are one prompt. The zero value is ready to use, from any goroutine.
//
// The login to a token is no Group: it belongs to the request whose person gave the PIN,
// and ends with the token.
type Group[T any] struct {
	mu    sync.Mutex
	calls map[string]*groupCall[T] // under way, by what they are about
}

// groupCall is one call, and its outcome.
type groupCall[T any] struct {
	done    chan struct{}
	value   T
	err     error
	waiters int
	cancel  context.CancelFunc
	waiting List // the same requests; a person is asked for one of them
}

// Do calls f and returns its outcome. If a call with the same key is running, Do waits for
// that call instead. f gets the values of the first request's context, and a List of all
// requests that wait. Its context ends when no request waits any more. The next Do then
// calls f again. The error is that of f or of ctx.
func (g *Group[T]) Do(ctx context.Context, key string, f func(context.Context, *List) (T, error)) (T, error) {
	g.mu.Lock()
	c := g.calls[key]
	if c == nil {
		c = &groupCall[T]{done: make(chan struct{})}
		together, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c.cancel = cancel
		if g.calls == nil {
			g.calls = make(map[string]*groupCall[T])
		}
		g.calls[key] = c
		go func() {
			defer cancel()
			value, err := f(together, &c.waiting)
			g.mu.Lock()
			c.value, c.err = value, err
			g.endLocked(key, c)
			g.mu.Unlock()
			close(c.done)
		}()
	}
	c.waiters++
	c.waiting.Add(ctx)
	g.mu.Unlock()
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
	}
	g.mu.Lock()
	if c.waiters--; c.waiters == 0 {
		c.cancel()
		g.endLocked(key, c)
	}
	g.mu.Unlock()
	c.waiting.Leave(ctx)
	var none T
	return none, ctx.Err()
}

// endLocked makes room for the next call.
func (g *Group[T]) endLocked(key string, c *groupCall[T]) {
	if g.calls[key] == c {
		delete(g.calls, key)
	}
}
