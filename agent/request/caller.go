package request

import (
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
)

// A Caller is one connection to the agent, as it is when a request is made. A
// door hands one over with every request and never changes it afterwards: when
// the connection is bound to a session, later requests come with a new Caller.
type Caller struct {
	// Number counts the connections of this process, for the log. It is what
	// the Callers of one connection have in common.
	Number uint64
	// Peer is who opened the connection, as far as that was known when it was opened.
	Peer peer.Peer
	// Look returns the same with the process, which is looked at when it is called
	// first. It may be called from any goroutine until the request is answered, and
	// returns what it has returned before afterwards. nil: Peer is all there is.
	Look func() peer.Peer
	// Binds are the SSH sessions that the connection was bound to, in order
	// (session-bind@openssh.com, OpenSSH's PROTOCOL.agent section 1). Each was
	// proved by a signature of its host key.
	Binds []Bind
	// BindFailed says that the connection was to be bound to a session and the
	// proof or the order of things was wrong.
	BindFailed bool
	// Forwarded says that requests may come from another host: a bind was for
	// forwarding, or one failed. A client that binds nothing (OpenSSH before
	// 8.9) is not told from a local one.
	Forwarded bool
	// Socket has the rules of the socket that the connection came in at; nil:
	// there are none.
	Socket *Socket
	// Later has done what the client need not wait for, once it has its answer or
	// cannot have it, before the next request of the connection is read. nil: there is
	// no door, and it is done at once.
	Later func(func())
}

// Client returns the process that opened the connection, and looks at it if necessary.
func (c *Caller) Client() peer.Peer {
	if c.Look != nil {
		return c.Look()
	}
	return c.Peer
}

// A Confirm says when the agent asks a person before a key signs. The configuration uses
// these words. Package approval has the values.
type Confirm string

// A Socket is what the configuration says of one of the agent's sockets.
type Socket struct {
	Name string
	// Only selects the identities that it shows. nil: all.
	Only []Selection
	// Confirm says when the agent asks a person before a key signs for a client of this
	// socket, besides what the policy of the key says. Empty: never.
	Confirm Confirm
	// ReadOnly refuses to add and remove identities, and to lock and unlock. A socket
	// with Only never locks or unlocks, and takes no keys for memory.
	ReadOnly bool
}

// A Bind is one SSH session that a connection was bound to.
type Bind struct {
	HostKey    ssh.PublicKey // the host at the other end of the session; may be a certificate
	SessionID  []byte        // RFC 4253 section 7.2
	Forwarding bool          // for forwarding the agent, as opposed to logging in
	// Message is the door's own form of the bind, for an Upstream to repeat.
	Message []byte
}

// An Origin is where requests come from, as far as the one who makes them has no say:
// the host that the agent is forwarded to, or the programs on this machine. A host
// on the way cannot change the first bind, which is made by the ssh here. The names
// of programs are of their own choosing, and so are all binds of a connection that
// a program here makes itself: against both there are limits for the group.
type Origin struct {
	Group
	From string // forwarded: wire form of the first host's key; else names of programs
}

// A Group is all Origins that a client may turn one into the other. A client that has nothing
// but a socket uses up no questions of the person's own programs and hosts.
type Group struct {
	Forwarded bool
	Socket    string // the name of the [[socket]]
	UID       int    // of the client; -1: not known
	// Apart says that the client lives in namespaces of its own, or has ended. A program
	// in a sandbox cannot leave it.
	Apart bool
}

// Origin returns where the requests of a connection come from. It does not look at the
// client's namespaces, which takes a dozen system calls: see OriginApart.
func (c *Caller) Origin() Origin {
	who := c.Client()
	w := Origin{Group: Group{Forwarded: c.Forwarded, UID: -1}}
	if who.Known {
		w.UID = who.UID
	}
	if c.Socket != nil {
		w.Socket = c.Socket.Name
	}
	switch {
	case !c.Forwarded:
		w.From = strings.Join(ProgramNames(who), " ")
	case len(c.Binds) > 0:
		w.From = string(c.Binds[0].HostKey.Marshal())
	}
	return w
}

// OriginApart is Origin with Apart, for a client whose person is to be asked.
func (c *Caller) OriginApart() Origin {
	w := c.Origin()
	w.Apart = c.Client().Apart() != nil
	return w
}

// ProgramNames returns the names of the programs that a client comes from, the
// nearest first. A program that starts itself, as git does, is there once.
func ProgramNames(p peer.Peer) (names []string) {
	for _, link := range p.Chain {
		names = append(names, link.Name)
	}
	return slices.Compact(names)
}
