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

// A handler speaks with one client. One goroutine reads a message, has it answered, writes
// the answer, and so on.
type handler struct {
	*door.Conn
	server *Door
	caller *request.Caller // replaced, never changed: the keyring may hold on to it
	in     frames
	out    []byte   // the answer under construction, length first
	whole  []byte   // the answer in place of out, when others have it, too; nil: out is it
	rest   []func() // what is left to do when the client has its answer

	bound   int  // bytes of memory that its binds keep
	emptied bool // the last request has removed all keys

	looked  bool           // a goroutine has looked at the client's process, or is about to
	looking sync.WaitGroup // that goroutine
}

// newHandler returns what speaks with the client of c.
func newHandler(s *Door, c *door.Conn, rules *request.Socket) *handler {
	n := &handler{Conn: c, server: s, in: newFrames(c.Net(), mayHoldSecret)}
	n.in.keep, n.in.stream.Keep = c.Keep, c.Keep
	n.caller = &request.Caller{Number: c.Number(), Peer: c.Peer(), Look: c.Look(), Socket: rules, Later: n.later}
	return n
}

// look has somebody look who the client is, who does so while a token signs. A list,
// which is all that many connections are made for, does not depend on it.
func (c *handler) look() {
	if look := c.caller.Look; look != nil && !c.looked {
		c.looked = true
		c.looking.Go(func() { look() })
	}
}

func (c *handler) later(f func()) { c.rest = append(c.rest, f) }

// finish does what is left of a request, whether or not its answer could be sent.
func (c *handler) finish() {
	for len(c.rest) > 0 {
		f := c.rest[0]
		c.rest = slices.Delete(c.rest, 0, 1)
		f()
	}
}

// Serve serves the client until it hangs up, sends something that is no message,
// does not take its answers, or until nc is closed. When ctx has ended, the client
// has to take the answer that is under way at once.
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

// ended logs why the connection ends, unless that is what clients do, or the agent.
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
