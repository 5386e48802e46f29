package sshagent

import (
	"context"
	"log/slog"
	"sync"

	"p11-agent/agent/door"
	"p11-agent/agent/request"
)

// A Door serves the SSH agent protocol. Set its fields before Serve, and leave them alone
// afterwards. One Door may serve several listeners at once.
type Door struct {
	// Keyring answers the requests. Required.
	Keyring Keyring
	// Log gets one line for each connection and each request that the door refuses by
	// itself. nil discards the lines.
	Log *slog.Logger
	// KeepBinds keeps the messages of binds, so that an Upstream can repeat them.
	KeepBinds bool

	limit int // of connections: see door.Server.Limit
	cuts  cuts

	once sync.Once
	door *door.Server // after once
}

// Serve answers clients of l until ctx ends. The socket may have rules of its own; nil stands
// for none. See [door.Server.Serve] for what Serve owns and returns.
func (s *Door) Serve(ctx context.Context, l door.Listener, rules *request.Socket) error {
	return s.connections().Serve(ctx, l, func(c *door.Conn) door.Protocol { return newHandler(s, c, rules) })
}

// Connections returns how many clients of a listener are connected now.
func (s *Door) Connections(l door.Listener) int { return s.connections().Connections(l) }

// connections returns the server that has the connections of the Door.
func (s *Door) connections() *door.Server {
	s.once.Do(func() { s.door = &door.Server{Log: s.Log, Limit: s.limit} })
	return s.door
}
