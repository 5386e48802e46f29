// Package agent is the keyring and its rules: which keys there are, who may use
// which of them, and for what.
package agent

import (
	"context"
	"crypto"
	"errors"
	"sync"
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

// Who returns who opened the connection, with the process.
func (c *Caller) Who() peer.Peer {
	if c.Look != nil {
		return c.Look()
	}
	return c.Peer
}

// A Socket is what the configuration says of one of the agent's sockets.
type Socket struct {
	Name string
	// Only selects the identities that it shows. nil: all.
	Only []Selection
	// Confirm has a person asked for each signature.
	Confirm bool
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

// An Identity is a key as it is listed.
type Identity struct {
	Key     ssh.PublicKey
	Comment string
	// Named tells that somebody has named the key itself, or has added it: it comes first
	// where clients cannot take all keys.
	Named bool
}

// A Listing is the identities that a connection may see. It is not changed.
type Listing struct {
	Identities []Identity

	once    sync.Once
	encoded []byte
}

// Encoded returns the list in the form that encode gives it, which has to be the
// same for whoever asks: most connections see the same list, which is encoded once
// for them all. The form is not to be changed.
func (l *Listing) Encoded(encode func([]Identity) []byte) []byte {
	l.once.Do(func() { l.encoded = encode(l.Identities) })
	return l.encoded
}

// SignatureFlags are the flags of a sign request (RFC 9987 section 5.6.1).
type SignatureFlags uint32

// The flags. Others are refused.
const (
	SignatureRSASHA2256 SignatureFlags = 2
	SignatureRSASHA2512 SignatureFlags = 4
)

// A SignRequest asks for a signature of Data with the key whose wire form is
// Key. All of it is the door's memory: not to be kept once the request is
// answered.
type SignRequest struct {
	Key   []byte
	Data  []byte
	Flags SignatureFlags
	// Content is what Data says of itself.
	Content Content
	// Login is what Data says when it is a request to be let in with this key
	// (KindLogin).
	Login *Login
}

// A Login is a request to be let in at a server with a public key (RFC 4252
// section 7, or publickey-hostbound-v00@openssh.com, OpenSSH's PROTOCOL section
// 3.1).
type Login struct {
	User      string
	SessionID []byte
	HostKey   []byte // wire form of the server's key; nil when the method has none
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

// A KeyRequest asks for a private key to be kept in memory (RFC 9987 section
// 5.2).
type KeyRequest struct {
	Private crypto.Signer // *rsa.PrivateKey, *ecdsa.PrivateKey or ed25519.PrivateKey
	// Public is its public half, or a certificate of it.
	Public      ssh.PublicKey
	Comment     string
	Constraints Constraints
}

// Constraints limit the use of what is added with them (RFC 9987 section 5.2.7
// and OpenSSH's PROTOCOL.agent).
type Constraints struct {
	Lifetime time.Duration // 0: for as long as the agent runs; NoTime: none
	Confirm  bool
	// Destinations are the hops that are permitted; none: every use is.
	Destinations []Destination
	// Certificates go with the keys of a token that they certify.
	Certificates []*ssh.Certificate
	// CertificatesOnly adds only the Certificates and no key without one.
	CertificatesOnly bool
}

// NoTime is the lifetime of what is added and gone at once. A client asks for it with a
// lifetime of 0 seconds, as ssh-agent has it.
const NoTime = time.Nanosecond

// A Destination is one hop that a key may be used for: to log in at a host, from
// another or, when From has no keys, from where the agent runs (OpenSSH's
// PROTOCOL.agent section 2).
type Destination struct{ From, To Hop }

// A Hop is a host as a Destination has it.
type Hop struct {
	User string // a pattern, only of To; empty: any
	Host string // for people, and the name that a certificate must have
	Keys []HostKey
}

// A HostKey is a key that a host may have.
type HostKey struct {
	Key ssh.PublicKey
	CA  bool // Key certifies the host's key
}

// An Upstream is another agent: its identities are listed after ours, and it
// makes their signatures. Methods may be called from any goroutine, and take no
// longer than ctx lasts. They repeat the binds of the Caller's connection first,
// so that the other agent can keep its own constraints.
type Upstream interface {
	// Name is for people.
	Name() string
	// List returns the identities. One that does not answer at once is an error.
	List(ctx context.Context, c *Caller) ([]Identity, error)
	// Sign waits for the other agent as long as ctx does: a person may be asked.
	Sign(ctx context.Context, c *Caller, r SignRequest) (*ssh.Signature, error)
	// Remove takes the wire form of a public key.
	Remove(ctx context.Context, c *Caller, key []byte) error
	// Pass hands a message on as it came and returns the answer as it came. An
	// answer that means no is an error.
	Pass(ctx context.Context, c *Caller, message []byte) (answer []byte, err error)
}

// ErrNotPassed is the error of a message that no Upstream could be asked about.
var ErrNotPassed = errors.New("there is no upstream agent to ask")
