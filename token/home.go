package token

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A module can claim any name for a token, so also the name of another module's token. Therefore
// each token has a home: the module that first showed the token. The list of known keys remembers
// the home over restarts. A guest is another module that shows the token. A guest gets a PIN of the
// token in two cases only: a person gives the PIN at a prompt that names the guest, or the client or
// the configuration names the module. The home moves in these cases:
//
//   - The configuration has a URI that names the token and a module. That module is the home for
//     as long as the configuration has the URI.
//   - A person gives the right PIN at a prompt that names the guest, and the agent no longer has
//     the home module.
//
// The name of a module comes from the configuration of the agent or of p11-kit. A module that a
// client has started goes by its path. The module itself cannot change its name.

// home is the module that a token belongs to.
type home struct {
	module string // its name
	// proved means that the home stays: it comes from the list of known keys, or the module got
	// the right PIN. After the start, until the first look at every module, an earlier module
	// takes over a home that is not proved.
	proved bool
}

// NamesToken reports whether a URI names one token, by label or serial number.
func NamesToken(u *pkcs11uri.URI) bool {
	given := func(s *string) bool { return s != nil && strings.Trim(*s, pkcs11uri.Padding) != "" }
	return given(u.Token) || given(u.Serial)
}

// SetHomes replaces Options.Homes.
func (s *Store) SetHomes(uris []*pkcs11uri.URI) {
	s.mu.Lock()
	s.preferred = homeURIs(uris)
	s.configuredNames = wantedURIs(uris)
	s.setWantedLocked()
	s.mu.Unlock()
	s.publish()
}

// homeURIs returns the URIs that give a token a home.
func homeURIs(uris []*pkcs11uri.URI) []*pkcs11uri.URI {
	return slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool {
		return u.ModuleName == nil && u.ModulePath == nil || !NamesToken(u)
	})
}

// namedLocked returns the one module that a URI names; nil: the URI names no module, or several. A
// directory names no module. The name in the configuration counts before the name of a file,
// because another module may have a file of the same name. A module that a client has started is
// named by its path only, because the client has chosen the file.
func (s *Store) namedLocked(u *pkcs11uri.URI) *module {
	if u.ModuleName == nil && u.ModulePath == nil {
		return nil
	}
	for _, file := range []bool{false, true} {
		var found []*module
		for _, m := range s.modules {
			path := ""
			if file {
				path = m.spec.Path
			}
			if m.at(u) && (u.ModuleName == nil || !m.byClient && u.MatchModuleName(m.spec.Name, path)) {
				found = append(found, m)
			}
		}
		if len(found) == 1 {
			return found[0]
		}
		if len(found) > 1 || u.ModuleName == nil {
			return nil
		}
	}
	return nil
}

// at reports whether the URI names the file of the module, or no file.
func (m *module) at(u *pkcs11uri.URI) bool {
	return u.ModulePath == nil || *u.ModulePath == m.spec.Path || *u.ModulePath == m.file
}

// names reports whether a URI names this module alone.
func (s *Store) names(u *pkcs11uri.URI, m *module) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return u != nil && s.namedLocked(u) == m
}

// homeLocked returns the name of the home of a token; empty: the agent has not seen the token.
func (s *Store) homeLocked(id wire.TokenID) string {
	for _, u := range s.preferred {
		if u.MatchToken(id) {
			if m := s.namedLocked(u); m != nil {
				return m.identity
			}
		}
	}
	if h, ok := s.homes[id]; ok {
		return h.module
	}
	// A twin has the home of the token of the same texts. Otherwise a module could claim the name
	// of another module's token for a second token.
	return s.homes[id.Texts()].module
}

// claimLocked gives a present token a home, and returns the token as the module shows it through
// which the agent uses it. claims are in the order of the modules.
func (s *Store) claimLocked(id wire.TokenID, claims []*Token) *Token {
	first := claims[0].module.identity
	switch h, ok := s.homes[id]; {
	case !ok && s.homeLocked(id) != "":
	case !ok:
		s.homes[id] = home{module: first}
	case !h.proved && !s.allLooked() && slices.ContainsFunc(claims, func(t *Token) bool { return t.module.identity == h.module }):
		s.homes[id] = home{module: first}
	}
	belongs := s.homeLocked(id)
	if i := slices.IndexFunc(claims, func(t *Token) bool { return t.module.identity == belongs }); i >= 0 {
		return claims[i]
	}
	return claims[0]
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
	s, name := t.module.store, t.module.identity
	s.mu.Lock()
	defer s.mu.Unlock()
	if belongs = s.homeLocked(t.ID); belongs == "" {
		s.homes[t.ID] = home{module: name} // the token appeared a moment ago
	}
	if belongs == name {
		belongs = ""
	}
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
	s, name := t.module.store, t.module.identity
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.homes[t.ID]
	gone := !slices.ContainsFunc(s.modules, func(m *module) bool { return m.identity == h.module })
	if h.module != name && !(byPerson && gone) || h == (home{name, true}) {
		return
	}
	s.homes[t.ID] = home{name, true}
	s.rewrite()
}

// A GuestError says that a module does not get a PIN because the token belongs to another module.
type GuestError struct {
	Token  string // label
	Module string // the module that shows the token now
	Home   string // the module that the token belongs to
}

func (e *GuestError) Error() string {
	return fmt.Sprintf("token %q belongs to module %q, and module %q shows it now: to give the PIN to %q, add %s to the query of the URI",
		e.Token, e.Home, e.Module, e.Module, naming(e.Module))
}

// naming returns the attribute of a URI that names a module.
func naming(identity string) string {
	if filepath.IsAbs(identity) {
		return "module-path=" + identity
	}
	return "module-name=" + identity
}

// CheckHome fails with a *GuestError when a PIN that was supplied in advance, for what sel
// selects, is not for the module of a key.
func CheckHome(sel *Selector, k *Key) error { return k.token.checkHome(sel) }

func (t *Token) checkHome(sel *Selector) error {
	belongs, _ := t.claims()
	if belongs == "" {
		return nil
	}
	if sel != nil && (sel.path != "" && sel.path == t.module.file || t.module.store.names(sel.uri, t.module)) {
		return nil
	}
	return &GuestError{Token: t.ID.Label, Module: t.module.identity, Home: belongs}
}
