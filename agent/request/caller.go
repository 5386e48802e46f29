package request

import (
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
)

// A Caller is a connection to the agent at the time of a request. A door passes one with
// each request, and does not change it afterwards. Once the connection is bound to another
// session, later requests come with a new Caller.
type Caller struct {
	// Number counts the connections of the agent, for the log. All Callers of one connection
	// have the same Number.
	Number uint64
	// Peer is the process that opened the connection, as far as the kernel told at that
	// time.
	Peer peer.Peer
	// Look returns Peer with the chain of processes. The first call looks at the processes,
	// and must come before the request is answered. Later calls return the same. Look may be
	// called from any goroutine. nil: only Peer is known.
	Look func() peer.Peer
	// Binds are the SSH sessions that the connection was bound to, in order
	// (session-bind@openssh.com, OpenSSH's PROTOCOL.agent section 1). Each was
	// proved by a signature of its host key.
	Binds []Bind
	// BindFailed says that a bind of the connection failed: its proof or its order was
	// wrong.
	BindFailed bool
	// Forwarded says that requests may come from another host: a bind was for forwarding,
	// or a bind failed. A client that does not bind (OpenSSH before 8.9) looks like a local
	// one.
	Forwarded bool
	// Socket has the rules of the socket that accepted the connection; nil: no rules.
	Socket *Socket
	// Later runs a function for which the client need not wait: after the answer, and
	// before the door reads the next request of the connection. nil: it runs at once.
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

// A Socket has the configuration of one socket of the agent.
type Socket struct {
	Name string
	// Only selects the identities that the socket shows. nil: all.
	Only []Selection
	// Confirm says when the agent asks a person before a key signs for a client of this
	// socket, besides what the policy of the key says. Empty: never.
	Confirm Confirm
	// ReadOnly refuses to add and remove identities, and to lock and unlock. A socket
	// with Only never locks or unlocks, and takes no keys for memory.
	ReadOnly bool
}

// A Bind is an SSH session to which a connection is bound.
type Bind struct {
	HostKey    ssh.PublicKey // the host at the other end of the session; may be a certificate
	SessionID  []byte        // RFC 4253 section 7.2
	Forwarding bool          // for forwarding the agent, as opposed to logging in
	// Message is the door's own form of the bind, for an Upstream to repeat.
	Message []byte
}

// An Origin is where requests come from, as far as the client cannot choose it: the host
// to which the agent is forwarded, or the programs on this machine. A host on the way
// cannot change the first bind, which the ssh of this machine makes. Programs choose their
// own names, and the binds of the connections that they make themselves. The limits of the
// Group apply to both.
type Origin struct {
	Group
	From string // forwarded: wire form of the first host's key; else names of programs
}

// A Group is all Origins that a client may take on, one after the other. A client that has
// only a socket uses up no questions of the person's own programs and hosts.
type Group struct {
	Forwarded bool
	Socket    string // the name of the [[socket]]
	UID       int    // of the client; -1: not known
	// Apart says that the client runs in namespaces of its own, or has ended. A program
	// cannot leave its sandbox.
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
