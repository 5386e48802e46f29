package token

import (
	"slices"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// maxNameBytes bounds the names in one request, which must fit into wire.MaxRequest.
const maxNameBytes = wire.MaxRequest / 2

// named returns the objects of the token that the configuration or a client has named. The module
// process finds them even if the token has more objects than the listing.
func (t *Token) named() (all []wire.ObjectName) {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted
	s.mu.Unlock()
	size := 0
	for _, u := range uris {
		if !t.matches(u, true) {
			continue
		}
		name := wire.ObjectName{ID: u.ID}
		// The module process converts labels to UTF-8, and this label may be a result of that.
		if u.Object != nil && !strings.ContainsRune(*u.Object, '\uFFFD') {
			name.Label = *u.Object
		}
		size += len(name.ID) + len(name.Label) + 8
		if len(name.ID) == 0 && name.Label == "" || len(name.Label) > wire.MaxText {
			continue
		}
		if size > maxNameBytes || len(all) == wire.MaxNames {
			break
		}
		all = append(all, name)
	}
	return all
}

// isNamed reports whether the configuration or a client has named a key of the token.
func (t *Token) isNamed(p *pairs.Pair) bool {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted
	s.mu.Unlock()
	return slices.ContainsFunc(uris, func(u *pkcs11uri.URI) bool { return namedBy(p, u) && t.matches(u, true) })
}

// namedBy reports whether the object attributes of a URI name the key.
func namedBy(p *pairs.Pair, u *pkcs11uri.URI) bool {
	return (u.ID == nil || p.HasID(u.ID)) && (u.Object == nil || p.HasLabel(*u.Object))
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

// idsOf counts the keys of each ID.
func idsOf(all []*pairs.Pair) map[string]int {
	ids := make(map[string]int, len(all))
	for _, p := range all {
		ids[string(p.ID)]++
	}
	return ids
}
