package sshagent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"

	"p11-agent/agent/door"
	"p11-agent/agent/request"
)

// A handler answers one client. One goroutine reads a message, has the keyring answer it, writes
// the answer, and so on.
type handler struct {
	*door.Conn
	server *Door
	caller *request.Caller // replaced, never changed: the keyring may hold on to it
	in     frames
	out    []byte   // the answer under construction, length first
	whole  []byte   // the answer in place of out, if several clients share it; nil: out is the answer
	rest   []func() // work for the time after the answer

	bound   int  // bytes of memory that its binds keep
	emptied bool // the last request has removed all keys

	looked  bool           // a goroutine has looked at the client's process, or is about to
	looking sync.WaitGroup // that goroutine
}

// newHandler returns the handler of a client.
func newHandler(s *Door, c *door.Conn, rules *request.Socket) *handler {
	n := &handler{Conn: c, server: s, in: newFrames(c.Net(), mayHoldSecret)}
	n.in.keep, n.in.stream.Keep = c.Keep, c.Keep
	n.caller = &request.Caller{Number: c.Number(), Peer: c.Peer(), Look: c.Look(), Socket: rules, Later: n.later}
	return n
}

// look starts a goroutine that looks at the client's process, while a token signs. A list does not
// need it, and many connections ask for a list only.
func (c *handler) look() {
	if look := c.caller.Look; look != nil && !c.looked {
		c.looked = true
		c.looking.Go(func() { look() })
	}
}

func (c *handler) later(f func()) { c.rest = append(c.rest, f) }

// finish does the work that the request left for the time after its answer, whether or not the
// client took the answer.
func (c *handler) finish() {
	for len(c.rest) > 0 {
		f := c.rest[0]
		c.rest = slices.Delete(c.rest, 0, 1)
		f()
	}
}

// Serve answers the client until the connection closes. Serve also ends when the client
// hangs up, sends bytes that are not a message, or does not take its answers. When ctx has
// ended, the client has to take the present answer at once.
func (c *handler) Serve(ctx context.Context) {
	defer c.finish() // of a request that a panic ends
	for {
		message, err := c.in.next()
		if err != nil {
			c.ended(ctx, err)
			return
		}
		c.out = append(c.out[:0], 0, 0, 0, 0)
		c.Begin()
		c.answer(ctx, message)
		c.End()
		c.in.done()

		binary.BigEndian.PutUint32(c.out, uint32(len(c.out)-4))
		answer := c.out
		if c.whole != nil {
			answer, c.whole = c.whole, nil
		}
		within := door.Patience
		if ctx.Err() != nil { // looked at last: see hangUp
			within = 0
		}
		err = c.in.stream.Write(answer, within)
		c.finish()
		if err != nil {
			c.ended(ctx, err)
			return
		}
		if cap(c.out) > 16*bufferSize {
			c.out = nil // a long answer; do not keep its memory while the client idles
		}
	}
}

// Close gives back what the connection keeps.
func (c *handler) Close() {
	c.in.close()
	c.looking.Wait()
}

// ended logs why the connection ends, unless the end is usual: the client hung up, or the agent
// stops.
func (c *handler) ended(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil, errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
	case errors.Is(err, io.ErrUnexpectedEOF):
		c.Refuse("connection ended", errors.New("the client hung up within a message"))
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.Refuse("connection ended", fmt.Errorf("the client neither sent the rest of a message nor took its answer within %v", door.Patience))
	default:
		c.Refuse("connection ended", err)
	}
}
