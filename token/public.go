package token

import (
	"crypto"
	"errors"
	"slices"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
)

// A PublicKey is a public key that the configuration gives for a private key whose token shows
// none.
type PublicKey struct {
	// URI names the private key. It must have an id or an object.
	URI *pkcs11uri.URI
	// Key is *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey.
	Key crypto.PublicKey
}

// CheckPublicKey returns the reason why the agent cannot use a PublicKey, or nil.
func CheckPublicKey(p PublicKey) error {
	if p.URI.ID == nil && p.URI.Object == nil {
		return errors.New("the URI must name one key by its id or object")
	}
	if _, ok := pairs.KeyType(p.Key); !ok {
		return errors.New("no token has keys of this type that SSH can use")
	}
	return pairs.Usable(p.Key)
}

// SetPublicKeys replaces Options.PublicKeys, from the next look at the tokens on.
func (s *Store) SetPublicKeys(list []PublicKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.public = slices.Clone(list)
}

// configured returns the public keys that the configuration gives for the token.
func (t *Token) configured() (all []pairs.Configured) {
	s := t.module.store
	s.mu.Lock()
	public := s.public
	s.mu.Unlock()
	for _, p := range public {
		if CheckPublicKey(p) == nil && t.matches(p.URI) {
			all = append(all, pairs.Configured{ID: p.URI.ID, Label: p.URI.Object, Key: p.Key})
		}
	}
	return all
}
