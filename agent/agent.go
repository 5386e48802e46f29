// Package agent is the keyring and its rules: which keys there are, who may use
// which of them, and for what.
package agent

import (
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/pinentry/secret"
)

// A Caller is one connection to the agent, as it is when a request is made. A
// door hands one over with every request and never changes it afterwards: when
// the connection is bound to a session, later requests come with a new Caller.
type Caller struct {
	// Number counts the connections of this process, for the log. It is what
	// the Callers of one connection have in common.
	Number uint64
	Peer   peer.Peer
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
}

// A Bind is one SSH session that a connection was bound to.
type Bind struct {
	HostKey    ssh.PublicKey // the host at the other end of the session; may be a certificate
	SessionID  []byte        // RFC 4253 section 7.2
	Forwarding bool          // for forwarding the agent, as opposed to logging in
}

// An Identity is a key as it is listed.
type Identity struct {
	Key     ssh.PublicKey
	Comment string
}

// SignatureFlags are the flags of a sign request (RFC 9987 section 5.6.1).
type SignatureFlags uint32

// The flags. Others are refused.
const (
	SignatureRSASHA2256 SignatureFlags = 2
	SignatureRSASHA2512 SignatureFlags = 4
)

// A SignRequest asks for a signature of Data with the key whose wire form is
// Key. Both are the door's memory: not to be kept once the request is answered.
type SignRequest struct {
	Key   []byte
	Data  []byte
	Flags SignatureFlags
}

// A TokenRequest asks for the keys of a token to be added or removed (RFC 9987
// sections 5.2.6 and 5.4).
type TokenRequest struct {
	// Provider is what the client named: a pkcs11: URI or the path of a module.
	// It may hold a PIN, so it is the door's own memory and wiped afterwards.
	Provider []byte
	// PIN is empty when none was given. It belongs to the door, which wipes it
	// when the request is answered.
	PIN         *secret.Secret
	Constraints Constraints
}

// Constraints limit the use of what is added with them (RFC 9987 section 5.2.7).
type Constraints struct {
	Lifetime time.Duration // 0: for as long as the agent runs
	Confirm  bool
	// Unsupported names a constraint that was understood but cannot be kept:
	// the request is refused because of it.
	Unsupported []string
}
