// Package door has what every door of the agent needs: sockets, connections, and clients that
// hang up. A door is a protocol by which clients reach the agent, such as agent/sshagent.
//
// It promises:
//
//   - The context of a request ends when its client hangs up, even while the request waits
//     for a person or a card. A client that has only finished sending still gets its answers.
//   - A new connection is always served. When there are too many connections, the process
//     with the most connections loses one.
//   - What the connections keep in memory is bounded, for each process and for all clients
//     together, as far as the protocol counts it ([Conn.Keep]).
//   - A panic of a protocol costs one connection.
//
// The protocol reads and writes the bytes, and limits what one connection costs.
package door

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"p11-agent/agent/peer"
)

// MaxConnections is how many connections a Server has at once unless its Limit says
// otherwise, or the process may open few files.
const MaxConnections = 1024

// A Server accepts connections and has a protocol serve them. Set its fields before Serve,
// and leave them alone afterwards. One Server may serve several listeners at once.
type Server struct {
	// Log gets one line for each connection that the Server refuses or closes, and what
	// protocols log. nil discards the lines.
	Log *slog.Logger
	// Limit bounds the connections of all listeners together. 0 means MaxConnections, or
	// half of the files that the process may open if that is less. A further connection
	// takes the place of another one.
	Limit int

	// allowed decides whether a connection is served. nil means SameUser.
	allowed func(peer.Peer) error

	connections atomic.Uint64 // so far
	crowded     rarely

	once  sync.Once
	table *table // after once
}

// A Listener is where clients come from: a *net.UnixListener or a *Socket. Close makes
// AcceptUnix return.
type Listener interface {
	AcceptUnix() (*net.UnixConn, error)
	Close() error
}

// A Protocol speaks with one client.
type Protocol interface {
	// Serve answers the client until the client hangs up, breaks the protocol, or the
	// connection is closed. ctx ends when the client hangs up, also while a request is
	// under way.
	Serve(ctx context.Context)
	// Close gives back what the protocol keeps. The Server calls it once, after Serve,
	// even if Serve panicked or was not called.
	Close()
}

// SameUser allows connections of this process's user and of root. It returns an error that
// says whose connection it is.
func SameUser(p peer.Peer) error {
	switch {
	case !p.Known:
		return errors.New("the kernel does not tell whose connection this is")
	case p.UID != 0 && p.UID != os.Geteuid():
		return fmt.Errorf("the connection is of another user (uid %d)", p.UID)
	}
	return nil
}

// Serve accepts clients on l until ctx ends, and returns nil then. For each client, it calls
// open and has the Protocol serve the client in a goroutine of its own. Serve owns l and every
// connection that it accepts: when Serve returns, all are closed and no goroutine of Serve is
// left. That takes as long as the slowest Protocol takes to notice that its ctx has ended.
//
// When file descriptors or memory run out, Serve waits and tries again. Any other failure to
// accept connections ends Serve with that error, and so does another owner that closes l.
func (s *Server) Serve(ctx context.Context, l Listener, open func(*Conn) Protocol) error {
	s.clients()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := newWatcher()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	failure := make(chan error, 1)

	// Connections end first, then what serves them: the deferred calls run from
	// the last to the first.
	var helpers, clients sync.WaitGroup
	defer helpers.Wait()
	defer w.close()
	defer clients.Wait()
	defer cancel()
	helpers.Go(func() {
		if err := w.run(); err != nil {
			failure <- err // the Server would not notice any more that clients hang up
			cancel()
		}
	})
	helpers.Go(func() {
		<-ctx.Done()
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			s.log().Warn("close the agent's socket", "error", err)
		}
		w.hangUp()
	})
	err = s.accept(ctx, l, open, w, &clients)
	select {
	case err = <-failure:
	default:
	}
	return err
}

const (
	minBackOff = 5 * time.Millisecond
	maxBackOff = time.Second
)

// clients returns the connections of the Server.
func (s *Server) clients() *table {
	s.once.Do(func() {
		limit := s.Limit
		if limit <= 0 {
			limit = defaultLimit()
		}
		s.table = newTable(limit)
	})
	return s.table
}

func (s *Server) accept(ctx context.Context, l Listener, open func(*Conn) Protocol, w *watcher, clients *sync.WaitGroup) error {
	table := s.clients()
	var pause time.Duration
	for {
		nc, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = nc.Close()
			}
			return nil // asked to stop
		}
		if err != nil {
			if !passing(err) {
				return fmt.Errorf("accept agent clients: %w", err)
			}
			switch {
			case pause == 0:
				s.log().Warn("cannot accept agent clients, trying again", "error", err)
			case errors.Is(err, syscall.EMFILE):
				// Clients may hold the files for ever.
				s.end(table.makeRoom())
			}
			pause = min(max(2*pause, minBackOff), maxBackOff)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		p, look := peer.Later(nc)
		c := NewConn(s, nc, p, look)
		c.listener = l
		if err := s.allow(p); err != nil {
			c.Refuse("connection refused", err)
			_ = nc.Close()
			continue
		}
		protocol := open(c)
		var served context.Context
		served, c.cancel = context.WithCancelCause(ctx)
		s.end(table.admit(c))
		clients.Go(func() {
			defer table.leave(c)
			defer nc.Close()
			defer c.cancel(nil)
			c.serve(served, w, protocol)
		})
	}
}

// end ends a connection, which may be nil, to make room for others.
func (s *Server) end(c *Conn) {
	if c == nil {
		return
	}
	if ok, skipped := s.crowded.now(); ok {
		c.Log(slog.LevelWarn, "connection closed to make room for others", slog.Int("connections", s.clients().limit),
			slog.Int("since-the-last-such-line", skipped))
	}
	c.cancel(ErrMadeRoom)
	c.hangUp()
}

func (s *Server) allow(p peer.Peer) error {
	if s.allowed != nil {
		return s.allowed(p)
	}
	return SameUser(p)
}

// Connections returns how many clients of a listener are connected now.
func (s *Server) Connections(l Listener) int { return s.clients().count(l) }

// Kept returns how many bytes the connections of all listeners keep now, and how many
// connections there are.
func (s *Server) Kept() (Usage, int) { return s.clients().kept() }

// passing tells whether an error of accept(2) says nothing about the listener:
// the shortage will pass, or the one client is gone again.
func passing(err error) bool {
	for _, e := range []error{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
		syscall.ECONNABORTED, syscall.EPROTO, syscall.EINTR,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// The causes with which the context of a request ends.
var (
	// ErrHungUp says that the client hung up.
	ErrHungUp = errors.New("the client hung up")
	// ErrMadeRoom says that the Server closed the connection to make room for another one.
	ErrMadeRoom = errors.New("the connection was closed to make room for another client")

	errStopping = errors.New("the agent is stopping")
)

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
