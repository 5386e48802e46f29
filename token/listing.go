package token

import (
	"slices"

	"p11-agent/token/objects"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
)

// wanted returns the URIs of the configuration and of clients that name an object of the token.
func (t *Token) wanted() []*pkcs11uri.URI {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted.All()
	s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool { return !t.matches(u) })
}

// SetPublicKeys replaces Options.PublicKeys, from the next look at the tokens on.
func (s *Store) SetPublicKeys(list []objects.PublicKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.public = slices.Clone(list)
}

// configured returns the public keys that the configuration gives for the token.
func (t *Token) configured() []pairs.Configured {
	s := t.module.store
	s.mu.Lock()
	public := s.public
	s.mu.Unlock()
	return objects.Configured(public, t.matches)
}
