package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"p11-agent/agent/door"
	"p11-agent/cmd/p11-agent/paths"
)

// A Launch is one way to run a daemon: in the foreground, in the background, or on the sockets of a service manager.
type Launch struct {
	Options   Options
	Elsewhere bool        // another agent at the socket makes this one take a private socket
	Warn      func(error) // tells the person who starts the agent
}

// signals are the signals that a running daemon heeds.
type signals struct {
	hangup chan os.Signal // SIGHUP: read the configuration again
	clear  chan os.Signal // SIGUSR1: remove all keys
}

// catchSignals makes ctx end with one of these signals, and keeps SIGHUP and SIGUSR1 for the daemon. It is
// called before the agent tells where its socket is. From then on a signal may come at any time, and must not
// end the agent with its socket left.
func catchSignals(ctx context.Context, end ...os.Signal) (context.Context, *signals, func()) {
	s := &signals{hangup: make(chan os.Signal, 1), clear: make(chan os.Signal, 1)}
	signal.Notify(s.hangup, syscall.SIGHUP)
	signal.Notify(s.clear, syscall.SIGUSR1)
	// Nothing reads these. Otherwise a log whose reader has gone would end the agent.
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(ctx, end...)
	return ctx, s, func() {
		cancel()
		for _, c := range []chan os.Signal{s.hangup, s.clear, pipes} {
			signal.Stop(c)
		}
	}
}

// InForeground runs the agent at the terminal. announce tells where the agent listens.
func (l *Launch) InForeground(ctx context.Context, path string, log *slog.Logger, announce func(path string) error) error {
	terminal := controllingTerminal()
	ctx, signals, stop := catchSignals(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	socket, err := l.listen(path)
	if err != nil {
		return err
	}
	defer paths.RemovePrivateDir(socket.Path())
	if err := announce(socket.Path()); err != nil {
		return errors.Join(err, socket.Close())
	}
	return l.run(ctx, []door.Listener{socket}, log, signals, terminal)
}

// OnInherited runs the agent on the sockets of a service manager.
func (l *Launch) OnInherited(ctx context.Context, inherited []*net.UnixListener, log *slog.Logger) error {
	ctx, signals, stop := catchSignals(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	var all []door.Listener
	for _, socket := range inherited {
		all = append(all, socket)
	}
	return l.run(ctx, all, log, signals, nil)
}

// run opens the daemon, and serves until ctx ends.
func (l *Launch) run(ctx context.Context, listeners []door.Listener, log *slog.Logger, signals *signals, terminal *terminal) error {
	d, err := Open(l.Options, listeners, log)
	if err != nil {
		return err
	}
	defer d.Close()
	d.signals, d.terminal = signals, terminal
	return d.Serve(ctx)
}

// listen makes the first socket. Where another agent listens, the agent may take a private socket.
func (l *Launch) listen(path string) (*door.Socket, error) {
	s, err := listen(path)
	if err != nil && errors.Is(err, door.ErrInUse) && l.Elsewhere {
		if path, err = paths.PrivateSocket(l.Warn); err == nil {
			if s, err = listen(path); err != nil {
				paths.RemovePrivateDir(path)
			}
		}
	}
	if err == nil && s.Shared() {
		l.Warn(fmt.Errorf("others may write to the directory of %s: a module could put a socket of its own in that place", s.Path()))
	}
	return s, err
}
