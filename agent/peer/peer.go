// Package peer tells who is at the other end of a Unix socket: the credentials
// that the kernel recorded when the connection was made, and the chain of
// programs that led to it.
//
// It promises that a Chain describes the very process that made the connection,
// not another one that got its number later, and that a name in it can be put
// in front of a person: it holds no control character and cannot imitate the
// links of the chain. The names are what the processes' owner chose; they help a
// person to recognise a request and prove nothing.
//
// Later, when a person is to be asked, [Peer.Desk] tells where the one is who
// uses that process: which display and which terminal. Then, too, it is the very
// process or none. A terminal is opened through the process, so that it is the
// right one also in a container, and only while the process is the job in the
// foreground there.
//
// The process that made a connection need not be the one that uses it: sockets
// are inherited and passed on, and a forwarded agent has ssh as its peer. What
// to make of a peer is left to others.
package peer

import (
	"context"
	"fmt"
	"strings"
)

// A Peer is the process that opened a connection, as the kernel knows it. What
// could not be found out is left at its zero value (Known says so for the
// whole); a Peer is a value and is not changed once made.
type Peer struct {
	Known bool // the kernel told the credentials below
	PID   int  // 0 when the process is in a PID namespace that is not visible here
	UID   int
	GID   int
	// Chain is the process and its ancestors, nearest first, as far as they
	// can be read; each program says of itself what it is called. It is empty
	// when the process has ended, also if another one uses its socket now.
	Chain []Process
	// id tells the process from another one that gets its number.
	id identity
}

// A Process is one link of the chain.
type Process struct {
	PID  int
	Name string // the program's file name, or the name it gave itself, made printable
}

// String returns the chain for a person, such as
// "ssh (1234) ← git (1230) ← bash (99)", or as much as is known.
func (p Peer) String() string {
	switch {
	case !p.Known:
		return "unknown process"
	case len(p.Chain) > 0:
		var b strings.Builder
		for i, link := range p.Chain {
			if i > 0 {
				b.WriteString(arrow)
			}
			fmt.Fprintf(&b, "%s (%d)", link.Name, link.PID)
		}
		return b.String()
	case p.PID > 0:
		return fmt.Sprintf("process %d", p.PID)
	}
	return "process out of sight"
}

type contextKey struct{}

// NewContext returns a context that carries p.
func NewContext(ctx context.Context, p Peer) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// FromContext returns the Peer that ctx carries, or one that is not Known.
func FromContext(ctx context.Context) Peer {
	p, _ := ctx.Value(contextKey{}).(Peer)
	return p
}
