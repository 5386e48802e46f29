// Package agent holds the keys that the agent offers, and guards their use.
//
// A Keyring has the identities of SSH: keys of tokens, keys in memory and keys of other
// agents, with their constraints. A Guard lets a request use a key, for any door. Both
// promise:
//
//   - They hold no lock while they wait for a person, a token or a process.
//   - A connection neither uses nor changes a key that it does not see.
//
// Package approval decides about uses, and package audit logs them. Other packages find
// the keys on tokens, encode messages and show prompts.
package agent

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

// An Identity is an entry of the list of keys that clients get.
type Identity struct {
	Key     ssh.PublicKey
	Comment string
	// Named says that the configuration or a client names this single key, or has added
	// it. If a list has no room for all keys, named keys come first.
	Named bool
}

// A Listing has the identities that a connection may see. It never changes.
type Listing struct {
	Identities []Identity

	once    sync.Once
	encoded []byte
}

// Encoded returns encode(l.Identities). It calls encode once for all connections that see
// the same list. So each call must pass the same encode. Callers must not change the
// result. Any goroutine may call Encoded.
func (l *Listing) Encoded(encode func([]Identity) []byte) []byte {
	l.once.Do(func() { l.encoded = encode(l.Identities) })
	return l.encoded
}

// An Upstream is another agent. The keyring lists its identities after its own, and the
// other agent makes their signatures. Any goroutine may call the methods. They end with
// ctx. They first repeat the binds of the Caller's connection, so that the other agent can
// keep its own constraints.
type Upstream interface {
	// Name returns the name of the agent for people.
	Name() string
	// List returns the identities. If the agent does not answer at once, List fails.
	List(ctx context.Context, c *request.Caller) ([]Identity, error)
	// Sign waits as long as ctx lasts: the other agent may ask a person.
	Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error)
	// Remove takes the wire form of a public key.
	Remove(ctx context.Context, c *request.Caller, key []byte) error
	// Pass sends a message unchanged and returns the answer unchanged. A refusal is an
	// error.
	Pass(ctx context.Context, c *request.Caller, message []byte) (answer []byte, err error)
}

// ErrNotPassed says that the keyring has no Upstream for a message.
var ErrNotPassed = errors.New("there is no upstream agent to ask")
