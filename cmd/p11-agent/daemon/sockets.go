package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net"

	"p11-agent/agent/door"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
)

// A socket is a listener, and the rules for its clients. Without rules, those of the configuration hold for all.
type socket struct {
	listener door.Listener
	rules    *request.Socket
}

// listen makes the socket, and its directory when that is the agent's own.
func listen(path string) (*door.Socket, error) {
	l, err := door.Listen(path)
	if errors.Is(err, door.ErrInUse) {
		return nil, fmt.Errorf("%w: use it with SSH_AUTH_SOCK=%s, or end it first", err, path)
	}
	return l, err
}

// listenNamed makes the sockets that the configuration names. Those without a path are in dir, which is empty
// for the agent at the usual socket. An agent elsewhere leaves out sockets that are in use. The sockets are the
// caller's to close, also after an error.
func listenNamed(c *config.File, dir string, log *slog.Logger) (all []socket, err error) {
	for _, sc := range c.Sockets {
		l, err := listenAt(sc, dir)
		if dir != "" && errors.Is(err, door.ErrInUse) {
			log.Warn("a [[socket]] is left out", "name", sc.Name, "reason", err)
			continue
		}
		if err != nil {
			return all, fmt.Errorf("socket %q: %w", sc.Name, err)
		}
		all = append(all, socket{l, sc.Rules()})
	}
	return all, nil
}

func listenAt(sc config.SocketTable, dir string) (*door.Socket, error) {
	path, err := sc.SocketPath(dir)
	if err != nil {
		return nil, err
	}
	return listen(path)
}

// pathOf returns the path of a listener's socket.
func pathOf(l door.Listener) string {
	switch l := l.(type) {
	case *door.Socket:
		return l.Path()
	case *net.UnixListener:
		return l.Addr().String()
	}
	return ""
}
