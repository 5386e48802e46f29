package token

import (
	"slices"

	"p11-agent/token/pkcs11uri"
)

// wanted returns the URIs of the configuration and of clients that name an object of the token.
func (t *Token) wanted() []*pkcs11uri.URI {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted
	s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool { return !t.matches(u) })
}

// wantedURIs returns the URIs that name an object.
func wantedURIs(uris []*pkcs11uri.URI) []*pkcs11uri.URI {
	return slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool { return u.ID == nil && u.Object == nil })
}

// maxAsked bounds the URIs of clients that the agent searches objects for.
const maxAsked = 256

// want makes looks search for the objects of a client's URI, until unwantLocked.
func (s *Store) want(u *pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unwantLocked(u)
	if len(s.asked) == maxAsked {
		s.asked = s.asked[1:]
	}
	s.asked = append(slices.Clip(s.asked), wantedURIs([]*pkcs11uri.URI{u})...)
	s.setWantedLocked()
}

func (s *Store) unwantLocked(u *pkcs11uri.URI) {
	s.asked = slices.DeleteFunc(slices.Clone(s.asked), func(o *pkcs11uri.URI) bool { return o == u })
	s.setWantedLocked()
}

// setWantedLocked joins the URIs of the configuration and of clients.
func (s *Store) setWantedLocked() { s.wanted = slices.Concat(s.configuredNames, s.asked) }
