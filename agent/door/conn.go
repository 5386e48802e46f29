package door

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"p11-agent/agent/peer"
)

// A Conn is the connection of one client. Its Protocol calls the methods. All of them but
// Begin and End may be called by several goroutines at once.
type Conn struct {
	server   *Server
	net      net.Conn
	number   uint64
	listener Listener         // where the client came in
	recorded peer.Peer        // who made the connection, without the process
	look     func() peer.Peer // with the process; may be nil
	cancel   context.CancelCauseFunc

	// What the client does. The table reads it.
	answering atomic.Bool  // a request is answered, so that the client waits
	answered  atomic.Bool  // one or more requests were
	active    atomic.Int64 // when the connection was made, or a request or an answer came last, counted from started

	// table.mu guards these.
	used Usage   // what the connection keeps
	held *holder // nil until the table looks
}

// NewConn returns the connection of a client that a Server has not accepted, for tests of a
// protocol. The Server logs for it and bounds nothing. look returns more than p when there is
// more to know, and may be nil.
func NewConn(s *Server, nc net.Conn, p peer.Peer, look func() peer.Peer) *Conn {
	c := &Conn{server: s, net: nc, number: s.connections.Add(1), recorded: p, look: look}
	c.active.Store(int64(time.Since(started)))
	return c
}

// Net returns what the client's bytes come from and go to. The Server closes it.
func (c *Conn) Net() net.Conn { return c.net }

// Number returns the number of the connection. The Server numbers its connections from 1.
func (c *Conn) Number() uint64 { return c.number }

// Peer returns who made the connection, as far as the kernel recorded it then.
func (c *Conn) Peer() peer.Peer { return c.recorded }

// Look returns the function that looks at the client's process, or nil when there is nothing
// more to know than Peer returns. See peer.Later.
func (c *Conn) Look() func() peer.Peer { return c.look }

// who returns who made the connection, with the process.
func (c *Conn) who() peer.Peer {
	if c.look != nil {
		return c.look()
	}
	return c.recorded
}

// Begin says that a request is under way, so that the client waits for an answer.
func (c *Conn) Begin() {
	c.active.Store(int64(time.Since(started)))
	c.answering.Store(true)
}

// End says that the request is answered. The Protocol calls it before it sends the answer.
func (c *Conn) End() {
	c.active.Store(int64(time.Since(started)))
	c.answered.Store(true)
	c.answering.Store(false)
}

// Keep counts n more bytes that the connection keeps, or fewer when n is negative. The error
// says why the connection cannot keep them. Other connections may end to make room.
func (c *Conn) Keep(r Resource, n int) error {
	if c.server.table == nil {
		return nil
	}
	victims, err := c.server.table.charge(c, r, n)
	for _, victim := range victims {
		c.server.end(victim)
	}
	return err
}

// Release undoes Keep.
func (c *Conn) Release(r Resource, n int) { _ = c.Keep(r, -n) } // fewer are never refused

// serve serves the client until the connection ends. The caller closes it.
func (c *Conn) serve(ctx context.Context, w *watcher, protocol Protocol) {
	defer protocol.Close()
	defer c.Survive()
	if err := w.add(c); err != nil {
		c.Refuse("connection refused", err)
		return
	}
	defer w.remove(c)
	protocol.Serve(ctx)
}

// Survive ends a panic of the protocol, and logs where it happened. Survive is deferred. It does
// not log what the panic says, which may quote what the client sent.
func (c *Conn) Survive() {
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
	c.Log(slog.LevelError, "connection ended by a bug, please report it", slog.String("panic", fmt.Sprintf("%T", value)), slog.Any("stack", where))
}

// hangUp ends a connection from another goroutine. A client that waits gets its answer
// first: it goes on when its prompt has gone from the terminal, not before.
func (c *Conn) hangUp() {
	if c.answering.Load() {
		if nc, ok := c.net.(*net.UnixConn); ok {
			_ = nc.CloseRead()
			return
		}
	}
	_ = c.net.Close()
}

// Refuse logs that the door refused something. The reason must quote nothing that may be a
// secret.
func (c *Conn) Refuse(what string, reason error) {
	c.Log(slog.LevelInfo, what, slog.String("reason", reason.Error()))
}

// Log writes a line with the connection's number and its client.
func (c *Conn) Log(level slog.Level, message string, attrs ...slog.Attr) {
	log := c.server.log()
	ctx := context.Background()
	if !log.Enabled(ctx, level) {
		return
	}
	who := []slog.Attr{
		slog.Uint64("connection", c.number),
		slog.String("client", c.who().String()),
	}
	if c.recorded.Known {
		who = append(who, slog.Int("uid", c.recorded.UID))
	}
	log.LogAttrs(ctx, level, message, append(who, attrs...)...)
}
