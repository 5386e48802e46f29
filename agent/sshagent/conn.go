package sshagent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
)

// A conn is one client. One goroutine reads a message, has it answered, writes
// the answer, and so on.
type conn struct {
	server   *Server
	nc       net.Conn
	number   uint64
	listener Listener                // where it came in
	recorded peer.Peer               // who made it, without the process
	who      func() peer.Peer        // with the process; may be nil
	cancel   context.CancelCauseFunc // ends its requests
	caller   *request.Caller         // replaced, never changed: the keyring may hold on to it
	in       frames
	out      []byte   // the answer under construction, length first
	whole    []byte   // the answer in place of out, when others have it, too; nil: out is it
	rest     []func() // what is left to do when the client has its answer

	answering atomic.Bool  // a request, so that the client waits
	answered  atomic.Bool  // one or more
	active    atomic.Int64 // when it was made, or a request or an answer came last, counted from started
	used      used         // what it keeps; clients.mu guards it
	held      *holder      // nil until clients look; clients.mu guards it
	bound     int          // bytes of used that its binds keep
	emptied   bool         // the last request has removed all keys

	looked  bool           // at who the client is, or somebody is about it
	looking sync.WaitGroup // that somebody
}

// newConn makes a conn. look returns more than p when there is more to know, and may
// be nil.
func newConn(s *Server, nc net.Conn, p peer.Peer, look func() peer.Peer, rules *request.Socket) *conn {
	c := &conn{server: s, nc: nc, number: s.connections.Add(1), recorded: p, who: look, in: newFrames(nc, mayHoldSecret)}
	c.in.keep = c.keep
	c.caller = &request.Caller{Number: c.number, Peer: p, Look: look, Socket: rules, Later: c.later}
	c.active.Store(int64(time.Since(started)))
	return c
}

// keep counts n more bytes that the connection keeps, or fewer when n is negative. The
// error says why it cannot keep them.
func (c *conn) keep(r resource, n int) error {
	if c.server.clients == nil {
		return nil
	}
	victims, err := c.server.clients.charge(c, r, n)
	for _, victim := range victims {
		c.server.end(victim)
	}
	return err
}

// uncount ends what keep has begun.
func (c *conn) uncount(r resource, n int) { _ = c.keep(r, -n) } // fewer are never refused

// look has somebody look who the client is, who does so while a token signs. A list,
// which is all that many connections are made for, does not depend on it.
func (c *conn) look() {
	if look := c.caller.Look; look != nil && !c.looked {
		c.looked = true
		c.looking.Go(func() { look() })
	}
}

func (c *conn) later(f func()) { c.rest = append(c.rest, f) }

// finish does what is left of a request, whether or not its answer could be sent.
func (c *conn) finish() {
	for len(c.rest) > 0 {
		f := c.rest[0]
		c.rest = slices.Delete(c.rest, 0, 1)
		f()
	}
}

// run serves the client until it hangs up, sends something that is no message,
// does not take its answers, or until nc is closed. When ctx has ended, the client
// has to take the answer that is under way at once.
func (c *conn) run(ctx context.Context) {
	defer c.finish() // of a request that a panic ends
	for {
		message, err := c.in.next()
		if err != nil {
			c.ended(ctx, err)
			return
		}
		c.out = append(c.out[:0], 0, 0, 0, 0)
		c.active.Store(int64(time.Since(started)))
		c.answering.Store(true)
		c.answer(ctx, message)
		c.active.Store(int64(time.Since(started)))
		c.answered.Store(true)
		c.answering.Store(false)
		c.in.done()

		binary.BigEndian.PutUint32(c.out, uint32(len(c.out)-4))
		answer := c.out
		if c.whole != nil {
			answer, c.whole = c.whole, nil
		}
		within := patience
		if ctx.Err() != nil { // looked at last: see hangUp
			within = 0
		}
		err = c.in.write(answer, within)
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

// ended logs why the connection ends, unless that is what clients do, or the agent.
func (c *conn) ended(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil, errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
	case errors.Is(err, io.ErrUnexpectedEOF):
		c.refuse("connection ended", errors.New("the client hung up within a message"))
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.refuse("connection ended", fmt.Errorf("the client neither sent the rest of a message nor took its answer within %v", patience))
	default:
		c.refuse("connection ended", err)
	}
}

// survive ends a panic: it costs this connection and no other. What the panic
// says is not logged, for it may quote what the client sent.
func (c *conn) survive() {
	value := recover()
	if value == nil {
		return
	}
	var pcs [32]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	var where []string
	for {
		frame, more := frames.Next()
		where = append(where, fmt.Sprintf("%s:%d", frame.Function, frame.Line))
		if !more {
			break
		}
	}
	c.log(slog.LevelError, "connection ended by a bug, please report it", slog.String("panic", fmt.Sprintf("%T", value)), slog.Any("stack", where))
}

// refuse logs that the door itself refused something. The reason quotes nothing
// that may be a secret.
func (c *conn) refuse(what string, reason error) {
	c.log(slog.LevelInfo, what, slog.String("reason", reason.Error()))
}

func (c *conn) log(level slog.Level, message string, attrs ...slog.Attr) {
	log := c.server.log()
	ctx := context.Background()
	if !log.Enabled(ctx, level) {
		return
	}
	who := []slog.Attr{
		slog.Uint64("connection", c.caller.Number),
		slog.String("client", c.caller.Who().String()),
	}
	if c.caller.Peer.Known {
		who = append(who, slog.Int("uid", c.caller.Peer.UID))
	}
	log.LogAttrs(ctx, level, message, append(who, attrs...)...)
}
