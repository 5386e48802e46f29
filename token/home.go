package token

import (
	"slices"

	"p11-agent/token/homes"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

// SetHomes replaces Options.Homes.
func (s *Store) SetHomes(uris []*pkcs11uri.URI) {
	s.mu.Lock()
	s.homes.Prefer(uris)
	s.wanted.Configure(uris)
	s.mu.Unlock()
	s.publish()
}

// names reports whether a URI names this module alone.
func (s *Store) names(u *pkcs11uri.URI, m *moduleState) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.homes.Names(u, m.identity)
}

// claimLocked gives a present token a home, and returns the token as the module shows it through
// which the agent uses it. claims are in the order of the modules.
func (s *Store) claimLocked(id wire.TokenID, claims []*Token) *Token {
	modules := make([]string, len(claims))
	for i, t := range claims {
		modules[i] = t.module.identity
	}
	return claims[s.homes.Claim(id, modules, s.allLooked())]
}

// allLooked reports whether the agent has looked once at each module of the start.
func (s *Store) allLooked() bool {
	select {
	case <-s.settled:
		return true
	default:
		return false
	}
}

// claims returns the name of the token's home when that is another module, and the names of the
// other modules that show the token now.
func (t *Token) claims() (belongs string, others []string) {
	s := t.module.store
	s.mu.Lock()
	defer s.mu.Unlock()
	belongs = s.homes.Other(t.ID, t.module.identity)
	for _, m := range s.modules {
		if m != t.module && slices.ContainsFunc(m.present(), func(o *Token) bool { return o.ID == t.ID }) {
			others = append(others, m.identity)
		}
	}
	return belongs, others
}

// proved notes that the token took a PIN through its module. byPerson means that a person gave the
// PIN at a prompt, which names the module when it is a guest.
func (t *Token) proved(byPerson bool) {
	s := t.module.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.homes.Proved(t.ID, t.module.identity, byPerson) {
		s.rewrite()
	}
}

// checkGuest fails with a *homes.GuestError when the token belongs to another module, and the URI
// does not name this module. u may be nil.
func (t *Token) checkGuest(u *pkcs11uri.URI) error {
	belongs, _ := t.claims()
	if belongs == "" || t.module.store.names(u, t.module) {
		return nil
	}
	return &homes.GuestError{Token: t.ID.Label, Module: t.module.identity, Home: belongs}
}

// CheckHome fails with a *homes.GuestError when a PIN that was supplied in advance, for what sel
// selects, is not for the module of a key.
func CheckHome(sel *selection.Selector, k *Key) error { return k.token.checkHome(sel) }

func (t *Token) checkHome(sel *selection.Selector) error {
	if sel == nil {
		return t.checkGuest(nil)
	}
	if err := t.checkGuest(sel.URI()); err != nil && sel.File() != t.module.file {
		return err
	}
	return nil
}
