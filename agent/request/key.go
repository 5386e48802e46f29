package request

import (
	"context"
	"crypto"
)

// A Key is a private key on a token. Two of them are compared with ==.
type Key interface {
	// Public is comparable by its Equal method, as keys of the standard library
	// are.
	Public() crypto.PublicKey
	// URI names the key, and is its comment.
	URI() string
	// Unfit says why the key is not offered unless it is named; empty: it is.
	Unfit() string
	// Insertions counts how often the token of the key has appeared.
	Insertions() uint64
	// Present tells whether the token of the key is there.
	Present() bool
	// TokenName names that token to a person.
	TokenName() string
	// AsksPIN tells whether a signature that begins now asks a person for the PIN, as far
	// as is known. It does not if a login is in force, if the PIN comes from another source,
	// or while a login is running, whose prompt may be about another key. waiting.Accepted
	// tells the request whose person gave the PIN.
	AsksPIN() bool
	// SignMessageContext signs as crypto.MessageSigner does: ECDSA in ASN.1.
	SignMessageContext(ctx context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error)
}

// A Selection is what a client or the configuration names: it selects keys,
// also those that come later.
type Selection interface {
	String() string // for the log, and to know it again
	Match(Key) bool
	// Broad tells whether it selects keys without naming them one by one.
	Broad() bool
	// All tells whether it selects every key there is.
	All() bool
}

// A Target is the key that a request is about, with every token that has it.
type Target struct {
	ID          string // tells keys apart. Of an SSH identity: the wire form of its public key
	Comment     string // names the key to people, as the configuration or a client has named it
	Fingerprint string // names the public key
	PublicKey   crypto.PublicKey
	Homes       []Key // the key on each token that has it; none: it is elsewhere
}

// Home returns the key that signs first: the first one whose token is present, or else the
// first one. nil: no token has the key.
func (t *Target) Home() Key {
	for _, key := range t.Homes {
		if key.Present() {
			return key
		}
	}
	if len(t.Homes) > 0 {
		return t.Homes[0]
	}
	return nil
}
