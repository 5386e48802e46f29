package sshagent

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
	"p11-agent/agent/request"
)

// DefaultMaxConnections is how many connections a Server has at once unless
// Server.MaxConnections says otherwise, or the process may open few files.
const DefaultMaxConnections = 1024

// A Server serves the SSH agent protocol. Its fields are set before Serve and
// left alone afterwards; one Server may serve several listeners at once.
type Server struct {
	// Keyring answers the requests. Required.
	Keyring Keyring
	// Log gets one line for each connection and each request that the door
	// itself refuses; nil discards them.
	Log *slog.Logger
	// Allowed decides by its peer whether a connection is served, as far as the
	// kernel recorded it when the connection was made (peer.Later): nil means
	// SameUser. It is called once for each connection, by each Serve.
	Allowed func(peer.Peer) error
	// MaxConnections bounds the connections of all listeners together. 0 means
	// DefaultMaxConnections, or half of the files that the process may open if that
	// is less. A further connection takes the place of another one (see clients).
	MaxConnections int
	// KeepBinds keeps the messages of binds, so that an Upstream can repeat them.
	KeepBinds bool

	connections atomic.Uint64 // so far
	crowded     rarely
	cuts        cuts

	once    sync.Once
	clients *clients // after once
}

// A Listener is where clients come from: a *net.UnixListener or a *Socket.
// Close makes AcceptUnix return.
type Listener interface {
	AcceptUnix() (*net.UnixConn, error)
	Close() error
}

// SameUser allows connections of this process's user and of root.
func SameUser(p peer.Peer) error {
	switch {
	case !p.Known:
		return errors.New("the kernel does not tell whose connection this is")
	case p.UID != 0 && p.UID != os.Geteuid():
		return fmt.Errorf("the connection is of another user (uid %d)", p.UID)
	}
	return nil
}

// Serve answers clients on l until ctx ends, and returns nil then. It owns l and
// every connection that it accepts: when it returns, all are closed and no
// goroutine of its making is left. That takes as long as the slowest method of
// the keyring takes to notice that its ctx has ended.
//
// Being out of file descriptors or memory ends nothing: it waits and tries
// again. Any other failure to accept connections ends Serve with that error, and
// so does l being closed by somebody else.
func (s *Server) Serve(ctx context.Context, l Listener) error { return s.ServeSocket(ctx, l, nil) }

// ServeSocket is Serve for a socket that has rules of its own.
func (s *Server) ServeSocket(ctx context.Context, l Listener, rules *request.Socket) error {
	s.table()
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
			failure <- err // clients that hang up would not be noticed any more
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
	err = s.accept(ctx, l, rules, w, &clients)
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

// table returns the connections of the Server.
func (s *Server) table() *clients {
	s.once.Do(func() {
		limit := s.MaxConnections
		if limit <= 0 {
			limit = defaultLimit()
		}
		s.clients = newClients(limit)
	})
	return s.clients
}

func (s *Server) accept(ctx context.Context, l Listener, rules *request.Socket, w *watcher, clients *sync.WaitGroup) error {
	table := s.table()
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
		p, who := peer.Later(nc)
		c := newConn(s, nc, p, who, rules)
		c.listener = l
		if err := s.allowed(p); err != nil {
			c.refuse("connection refused", err)
			_ = nc.Close()
			continue
		}
		var served context.Context
		served, c.cancel = context.WithCancelCause(ctx)
		s.end(table.admit(c))
		clients.Go(func() {
			defer table.leave(c)
			defer nc.Close()
			defer c.cancel(nil)
			c.serve(served, w)
		})
	}
}

// end ends a connection, which may be nil, to make room for others.
func (s *Server) end(c *conn) {
	if c == nil {
		return
	}
	if ok, skipped := s.crowded.now(); ok {
		c.log(slog.LevelWarn, "connection closed to make room for others", slog.Int("connections", s.table().limit),
			slog.Int("since-the-last-such-line", skipped))
	}
	c.cancel(errMadeRoom)
	c.hangUp()
}

func (s *Server) allowed(p peer.Peer) error {
	if s.Allowed != nil {
		return s.Allowed(p)
	}
	return SameUser(p)
}

// Connections tells how many clients of a listener are connected now.
func (s *Server) Connections(l Listener) int { return s.table().count(l) }

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

var (
	errHungUp   = errors.New("the client hung up")
	errStopping = errors.New("the agent is stopping")
)

// serve serves one connection until it ends. The caller closes it.
func (c *conn) serve(ctx context.Context, w *watcher) {
	defer c.looking.Wait()
	defer c.in.close()
	defer c.survive()
	if err := w.add(c); err != nil {
		c.refuse("connection refused", err)
		return
	}
	defer w.remove(c)
	c.run(ctx)
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
