package token

import (
	"cmp"

	"p11-agent/token/card"
	"p11-agent/token/pin"
	"p11-agent/token/pinsource"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// source returns the source of the PIN of a key; nil: a person is to be asked.
func (s *Store) source(k *Key) *pinsource.Source {
	return s.sources.Of(sourceToken{k.token}, k.MayMatch)
}

// AddSource has the PIN that a URI carries or names used for the keys that the URI selects now.
// The PIN is for their token and module, and comes after the sources of the configuration. The
// URI has to name exactly one token. AddSource refuses a command: only the configuration may
// name one. Without a PIN in the URI it does nothing.
func (s *Store) AddSource(u *pkcs11uri.URI, keys []*Key) error {
	if u.PIN() == nil && u.PINSource == nil {
		return nil
	}
	if len(keys) == 0 {
		return cmp.Or(pin.CheckClientURI(u), ErrNoMatch)
	}
	var tokens []pinsource.Token
	for _, k := range keys {
		tokens = append(tokens, sourceToken{k.token})
	}
	return s.sources.Add(u, tokens)
}

// SetSources replaces the URIs of the configuration that say where PINs come from, and wipes
// the old ones. Those that AddSource added stay.
func (s *Store) SetSources(all []*pkcs11uri.URI) { s.sources.Set(all) }

// RemoveSource undoes AddSource and Select, and wipes the PIN in the URI.
func (s *Store) RemoveSource(u *pkcs11uri.URI) {
	s.mu.Lock()
	s.wanted.Drop(u)
	s.mu.Unlock()
	s.sources.Remove(u)
}

// A sourceToken is a Token that may get the PIN of a URI.
type sourceToken struct{ *Token }

func (t sourceToken) ID() wire.TokenID                  { return t.Token.ID }
func (t sourceToken) Module() string                    { return t.module.identity }
func (t sourceToken) Name() string                      { return t.name() }
func (t sourceToken) Shows() card.Shown                 { return t.stay().Shown }
func (t sourceToken) IsOther(was card.Shown) bool       { return t.isOther(was) }
func (t sourceToken) CheckGuest(u *pkcs11uri.URI) error { return t.checkGuest(u) }

// Matching returns how many present tokens a URI matches, each once.
func (t sourceToken) Matching(u *pkcs11uri.URI) int {
	only := *u
	only.Object, only.ID, only.Type = nil, nil, ""
	all := make(map[wire.TokenID]bool)
	for _, m := range t.module.store.modulesNow() {
		for _, o := range m.present() {
			if o.matches(&only) {
				all[o.ID] = true
			}
		}
	}
	return len(all)
}
