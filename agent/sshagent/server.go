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

	"p11-agent/agent"
	"p11-agent/agent/peer"
)

// DefaultMaxConnections is how many clients are served at once unless
// Server.MaxConnections says otherwise.
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
	// SameUser. It is called once for each connection, from many goroutines.
	Allowed func(peer.Peer) error
	// MaxConnections bounds the connections of each Serve; 0 means
	// DefaultMaxConnections. Further ones are closed at once.
	MaxConnections int

	connections atomic.Uint64 // so far

	mu   sync.Mutex
	open map[Listener]chan struct{} // has an element for each connection
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
func (s *Server) ServeSocket(ctx context.Context, l Listener, rules *agent.Socket) error {
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

func (s *Server) accept(ctx context.Context, l Listener, rules *agent.Socket, w *watcher, clients *sync.WaitGroup) error {
	limit := s.MaxConnections
	if limit <= 0 {
		limit = DefaultMaxConnections
	}
	free := make(chan struct{}, limit)
	s.mu.Lock()
	if s.open == nil {
		s.open = make(map[Listener]chan struct{})
	}
	s.open[l] = free
	s.mu.Unlock()
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
			if pause == 0 {
				s.log().Warn("cannot accept agent clients, trying again", "error", err)
			}
			pause = min(max(2*pause, minBackOff), maxBackOff)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		select {
		case free <- struct{}{}:
		default:
			s.log().Warn("connection refused", "client", peer.Of(nc).String(),
				"reason", fmt.Sprintf("%d connections are open, which is the limit", limit))
			_ = nc.Close()
			continue
		}
		clients.Go(func() {
			defer func() { <-free }()
			defer nc.Close()
			s.serve(ctx, nc, rules, w)
		})
	}
}

// Connections tells how many clients of a listener are connected now.
func (s *Server) Connections(l Listener) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open[l])
}

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

// serve decides about one connection and serves it. The caller closes it.
func (s *Server) serve(ctx context.Context, nc *net.UnixConn, rules *agent.Socket, w *watcher) {
	p, look := peer.Later(nc)
	allowed := s.Allowed
	if allowed == nil {
		allowed = SameUser
	}
	c := newConn(s, nc, p, look, rules)
	defer c.looking.Wait()
	defer c.in.close()
	defer c.survive()
	if err := allowed(p); err != nil {
		c.refuse("connection refused", err)
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := w.add(c.caller.Number, nc, &c.answering, cancel); err != nil {
		c.refuse("connection refused", err)
		return
	}
	defer w.remove(c.caller.Number)
	c.run(ctx)
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
