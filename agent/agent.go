// Package agent holds the keys that the agent offers, and guards their use.
//
// A Keyring has the identities of SSH: keys of tokens, keys in memory and keys of other
// agents, with their constraints. A Guard lets a request use a key, for any door. Both
// promise that no lock is held across a person, a token or a process, and that a connection
// neither uses nor changes a key that it does not see.
//
// Package approval decides about uses, package audit logs them. What is on a token, how a
// message is encoded and how a person is asked is left to others.
package agent

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

// An Identity is a key as it is listed.
type Identity struct {
	Key     ssh.PublicKey
	Comment string
	// Named tells that the configuration or a client names this single key, or has added
	// it. The key comes first where clients cannot take all keys.
	Named bool
}

// A Listing is the identities that a connection may see. It is not changed.
type Listing struct {
	Identities []Identity

	once    sync.Once
	encoded []byte
}

// Encoded returns the list in the form that encode returns. Each call must pass the same
// encode: most connections see the same list, which is encoded once for all of them.
// Callers must not change the result.
func (l *Listing) Encoded(encode func([]Identity) []byte) []byte {
	l.once.Do(func() { l.encoded = encode(l.Identities) })
	return l.encoded
}

// An Upstream is another agent: its identities are listed after ours, and it
// makes their signatures. Methods may be called from any goroutine, and take no
// longer than ctx lasts. They repeat the binds of the Caller's connection first,
// so that the other agent can keep its own constraints.
type Upstream interface {
	// Name is for people.
	Name() string
	// List returns the identities. One that does not answer at once is an error.
	List(ctx context.Context, c *request.Caller) ([]Identity, error)
	// Sign waits for the other agent as long as ctx does: a person may be asked.
	Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error)
	// Remove takes the wire form of a public key.
	Remove(ctx context.Context, c *request.Caller, key []byte) error
	// Pass hands a message on as it came and returns the answer as it came. An
	// answer that means no is an error.
	Pass(ctx context.Context, c *request.Caller, message []byte) (answer []byte, err error)
}

// ErrNotPassed is the error of a message that no Upstream could be asked about.
var ErrNotPassed = errors.New("there is no upstream agent to ask")
