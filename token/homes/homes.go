// Package homes says which module each token belongs to.
//
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
// The package decides. Package token says what the modules show, and asks for PINs.
package homes

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A Module is a module as URIs name it.
type Module struct {
	// Identity is the name of the module for homes. It comes from the configuration of the agent or
	// of p11-kit. The Identity of a module that a client has started is its file. The module itself
	// cannot change its Identity.
	Identity string
	Name     string // in the registry or the configuration
	Path     string // absolute
	File     string // Path without symbolic links
	ByClient bool   // a client has started the module
}

// at reports whether a URI names the file of the module, or no file.
func (m Module) at(u *pkcs11uri.URI) bool {
	return u.ModulePath == nil || *u.ModulePath == m.Path || *u.ModulePath == m.File
}

// Matches reports whether a URI names the module, or no module. A module-path may be the directory
// of the module (RFC 7512 section 2.3).
func (m Module) Matches(u *pkcs11uri.URI) bool {
	if u.ModuleName != nil && !u.MatchModuleName(m.Name, m.Path) {
		return false
	}
	if u.ModulePath == nil {
		return true
	}
	path := filepath.Clean(*u.ModulePath)
	return path == m.Path || path == m.File || path == filepath.Dir(m.Path) || path == filepath.Dir(m.File)
}

// A Home is the module that a token belongs to.
type Home struct {
	Module string // its Identity
	// Proved means that the home stays: it comes from the list of known keys, or the module got
	// the right PIN. After the start, until the first look at every module, an earlier module
	// takes over a home that is not proved.
	Proved bool
}

// Homes has the home of each token. The caller guards it with a lock.
type Homes struct {
	modules   []Module
	preferred []*pkcs11uri.URI // the URIs of the configuration that give a token a home
	all       map[wire.TokenID]Home
}

// New returns the Homes from the list of known keys, by the Identity of a module. These homes stay.
func New(known map[wire.TokenID]string) *Homes {
	h := &Homes{all: make(map[wire.TokenID]Home)}
	for id, module := range known {
		h.all[id] = Home{Module: module, Proved: true}
	}
	return h
}

// AddModule adds a module.
func (h *Homes) AddModule(m Module) { h.modules = append(h.modules, m) }

// Prefer replaces the URIs of the configuration. Those that name a token and a module give the
// token a home.
func (h *Homes) Prefer(uris []*pkcs11uri.URI) {
	h.preferred = slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool {
		return u.ModuleName == nil && u.ModulePath == nil || !u.NamesToken()
	})
}

// Names reports whether a URI names this module alone.
func (h *Homes) Names(u *pkcs11uri.URI, module string) bool {
	named, ok := h.named(u)
	return ok && named.Identity == module
}

// named returns the one module that a URI names. ok is false if the URI names no module, or several.
// A directory names no module. The name in the configuration counts before the name of a file,
// because another module may have a file of the same name. A module that a client has started is
// named by its path only, because the client has chosen the file.
func (h *Homes) named(u *pkcs11uri.URI) (named Module, ok bool) {
	if u == nil || u.ModuleName == nil && u.ModulePath == nil {
		return Module{}, false
	}
	for _, file := range []bool{false, true} {
		var found []Module
		for _, m := range h.modules {
			path := ""
			if file {
				path = m.Path
			}
			if m.at(u) && (u.ModuleName == nil || !m.ByClient && u.MatchModuleName(m.Name, path)) {
				found = append(found, m)
			}
		}
		if len(found) == 1 {
			return found[0], true
		}
		if len(found) > 1 || u.ModuleName == nil {
			break
		}
	}
	return Module{}, false
}

// Of returns the home of a token; empty: the agent has not seen the token.
func (h *Homes) Of(id wire.TokenID) (module string) {
	for _, u := range h.preferred {
		if u.MatchToken(id) {
			if m, ok := h.named(u); ok {
				return m.Identity
			}
		}
	}
	if home, ok := h.all[id]; ok {
		return home.Module
	}
	// A twin has the home of the token of the same texts. Otherwise a module could claim the name
	// of another module's token for a second token.
	return h.all[id.Texts()].Module
}

// Claim gives a present token a home. claims are the modules that show the token, in their order.
// Claim returns the index of the module through which the agent uses the token. settled means that
// the agent has looked once at each module of the start.
func (h *Homes) Claim(id wire.TokenID, claims []string, settled bool) int {
	switch home, ok := h.all[id]; {
	case !ok && h.Of(id) != "":
	case !ok, !home.Proved && !settled && slices.Contains(claims, home.Module):
		h.all[id] = Home{Module: claims[0]}
	}
	return max(0, slices.Index(claims, h.Of(id)))
}

// Other returns the home of a token that a module shows, if the home is another module. Otherwise it
// returns "". A token without a home gets the module as its home.
func (h *Homes) Other(id wire.TokenID, module string) (home string) {
	switch home = h.Of(id); home {
	case "":
		h.all[id] = Home{Module: module}
		return ""
	case module:
		return ""
	}
	return home
}

// Proved notes that a token took a PIN through a module. byPerson means that a person gave the PIN
// at a prompt, which names the module when it is a guest. Proved reports whether the home has
// changed.
func (h *Homes) Proved(id wire.TokenID, module string, byPerson bool) (changed bool) {
	home := h.all[id]
	gone := !slices.ContainsFunc(h.modules, func(m Module) bool { return m.Identity == home.Module })
	if home.Module != module && !(byPerson && gone) || home == (Home{module, true}) {
		return false
	}
	h.all[id] = Home{module, true}
	return true
}

// Stays reports whether a token belongs to a module for good.
func (h *Homes) Stays(id wire.TokenID, module string) bool { return h.all[id] == Home{module, true} }

// Forget forgets the home of a token if it is the module.
func (h *Homes) Forget(id wire.TokenID, module string) {
	if h.all[id].Module == module {
		delete(h.all, id)
	}
}

// All returns a copy of the homes, without those that only the configuration gives.
func (h *Homes) All() map[wire.TokenID]Home { return maps.Clone(h.all) }

// A GuestError says that a module does not get a PIN because the token belongs to another module.
type GuestError struct {
	Token  string // label
	Module string // the module that shows the token now
	Home   string // the module that the token belongs to
}

func (e *GuestError) Error() string {
	return fmt.Sprintf("token %q belongs to module %q, and module %q shows it now: to give the PIN to %q, add %s to the query of the URI",
		e.Token, e.Home, e.Module, e.Module, Attribute(e.Module))
}

// Attribute returns the attribute of a URI that names the module of an Identity.
func Attribute(identity string) string {
	if filepath.IsAbs(identity) {
		return "module-path=" + identity
	}
	return "module-name=" + identity
}
