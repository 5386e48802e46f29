package token

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"p11-agent/pinentry/secret"
	"p11-agent/token/card"
	"p11-agent/token/homes"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A pinSource is the URI that the PIN of a key comes from.
type pinSource struct {
	token *Token
	uri   *pkcs11uri.URI
	says  *pkcs11uri.URI // a copy: another goroutine may wipe the PIN of uri
	added bool           // a client has named the URI
	shown card.Shown     // what the token showed then
}

var _ pin.Source = (*pinSource)(nil)

// An addedSource is a URI with a PIN that a client has named. The PIN is for the token and
// module that the URI was added for.
type addedSource struct {
	uri   *pkcs11uri.URI
	token *Token
	shown card.Shown // what the token showed then
}

// source returns the source of the PIN of a key; nil: a person is to be asked. URIs of the
// configuration come before those of clients.
func (s *Store) source(k *Key) *pinSource {
	s.mu.Lock()
	configured, added := s.configured, s.added
	s.mu.Unlock()
	for _, u := range configured {
		if k.MayMatch(u) {
			return s.newSource(k.token, u, false, card.Shown{})
		}
	}
	for _, a := range added {
		if a.token.ID == k.token.ID && a.token.module == k.token.module && k.MayMatch(a.uri) {
			return s.newSource(k.token, a.uri, true, a.shown)
		}
	}
	return nil
}

// newSource makes a pinSource. SetSources and RemoveSource wipe URIs under the same lock.
func (s *Store) newSource(t *Token, u *pkcs11uri.URI, added bool, shows card.Shown) *pinSource {
	s.mu.Lock()
	defer s.mu.Unlock()
	says := *u
	return &pinSource{token: t, uri: u, says: &says, added: added, shown: shows}
}

// Check fails when the PIN must not go to the token.
func (src *pinSource) Check() error {
	if !src.added {
		return src.token.mayUse(src.says)
	}
	if src.token.isOther(src.shown) {
		return errors.New("another card of the same name is there now: add the PIN again for this one")
	}
	return nil
}

// Bind binds a PIN of the configuration to the token and its module.
func (src *pinSource) Bind() error {
	if src.added {
		return nil
	}
	t := src.token
	if err := t.module.store.bindings.Add(pin.Bind(withoutPIN(src.says), t.module.identity, t.ID, t.shows().String())); err != nil {
		return fmt.Errorf("the PIN of %v: %w", src.says, err)
	}
	return nil
}

// Read returns the PIN that the URI carries or names.
func (src *pinSource) Read(ctx context.Context) (*secret.Secret, pin.Origin, error) {
	s, u := src.token.module.store, src.uri
	s.mu.Lock() // RemoveSource wipes the URI
	value := u.PIN()
	copied, err := value.Clone()
	s.mu.Unlock()
	if value != nil {
		if err == nil && copied.Len() == 0 {
			err = errors.New("pin-value is empty")
		}
		if err != nil {
			copied.Wipe()
			return nil, pin.Origin{}, err
		}
		return copied, pin.Value(), nil
	}
	copied.Wipe()
	if u.PINSource == nil {
		return nil, pin.Origin{}, errors.New("the configured PIN was just removed")
	}
	if src.added && u.PINSource.Kind != pkcs11uri.PINCommand {
		path, err := pin.SourcePath(u.PINSource)
		if err == nil && s.configuredFile(path) {
			err = fmt.Errorf("pin-source: %s is for another token in the configuration", path)
		}
		if err != nil {
			return nil, pin.Origin{}, err
		}
	}
	return pin.ReadSource(ctx, u.PINSource)
}

// AddSource has the PIN that a URI carries or names used for the keys that the URI selects now.
// The PIN is for their token and module, and comes after the sources of the configuration. The
// URI has to name exactly one token. AddSource refuses a command: only the configuration may
// name one. Without a PIN in the URI it does nothing.
func (s *Store) AddSource(u *pkcs11uri.URI, keys []*Key) error {
	if u.PIN() == nil && u.PINSource == nil {
		return nil
	}
	if err := pin.CheckClientURI(u); err != nil {
		return err
	}
	if len(keys) == 0 {
		return ErrNoMatch
	}
	t := keys[0].token
	if all := s.matching(u); len(all) > 1 || slices.ContainsFunc(keys, func(k *Key) bool { return k.token != t }) {
		return fmt.Errorf("a PIN is for one token, and %s names several: add the serial attribute (token %s is one of them)", withoutPIN(u), t.name())
	}
	if err := t.checkGuest(u); err != nil {
		return err
	}
	shows := t.shows()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.added = append(slices.Clip(s.added), addedSource{u, t, shows})
	return nil
}

// SetSources replaces the URIs of the configuration that say where PINs come from, and wipes
// the old ones. Those that AddSource added stay.
func (s *Store) SetSources(all []*pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.configured {
		if !slices.Contains(all, u) {
			u.Wipe()
		}
	}
	s.configured = slices.Clone(all)
}

// RemoveSource undoes AddSource and Select, and wipes the PIN in the URI.
func (s *Store) RemoveSource(u *pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wanted.Drop(u)
	s.added = slices.DeleteFunc(slices.Clone(s.added), func(o addedSource) bool { return o.uri == u })
	u.Wipe()
}

// configuredFile reports whether the configuration takes a PIN from a file. A client that names
// the file gets no login by it: otherwise a client that cannot read the file could have the PIN
// of one token tried on another, or handed to another module.
func (s *Store) configuredFile(path string) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false // pin.ReadSource fails with the reason
	}
	s.mu.Lock()
	configured := s.configured
	s.mu.Unlock()
	return slices.ContainsFunc(configured, func(u *pkcs11uri.URI) bool {
		if u.PINSource == nil || u.PINSource.Kind == pkcs11uri.PINCommand {
			return false
		}
		own, err := pin.SourcePath(u.PINSource)
		if err != nil {
			return false
		}
		other, err := os.Stat(own)
		return err == nil && os.SameFile(st, other)
	})
}

// mayUse fails when the PIN of a URI of the configuration must not go to a token. A PIN that was
// used before is for that token and module alone. Before its first use, the URI has to match
// exactly one of the present tokens, and the module has to be the token's home or be named by
// the URI.
func (t *Token) mayUse(u *pkcs11uri.URI) error {
	if err := pin.CheckURI(u); err != nil {
		return err
	}
	s := t.module.store
	b, ok, err := s.bindings.Of(withoutPIN(u))
	switch {
	case err != nil:
		return err
	case ok && b.ID() != t.ID && b.ID().Texts() == t.ID.Texts():
		return fmt.Errorf("the PIN of %s is for another token of the same label and serial number since its first use: name this token by the id of its key", withoutPIN(u))
	case ok && b.ID() != t.ID:
		return fmt.Errorf("the PIN of %s is for token %q (serial %s) since its first use: to use it for this token, add its serial attribute (serial %s)",
			withoutPIN(u), b.Label, b.Serial, t.ID.Serial)
	case ok && b.Module != t.module.identity:
		return fmt.Errorf("the PIN of %s is for module %q since its first use, and module %q shows the token now: to give it to %q, add %s to the query of the URI",
			withoutPIN(u), b.Module, t.module.identity, t.module.identity, homes.Attribute(t.module.identity))
	case ok && t.isOther(card.Parse(b.Keys)):
		return fmt.Errorf("the PIN of %s is for another card of the same name since its first use, and this card has other keys: name a key of this card by its id", withoutPIN(u))
	case ok:
		return nil
	}
	if all := s.matching(u); len(all) > 1 {
		return fmt.Errorf("a PIN is for one token, and %s names %d present tokens: add the serial attribute (this token has serial %s)", withoutPIN(u), len(all), t.ID.Serial)
	}
	return t.checkGuest(u)
}

// withoutPIN returns the text of a URI without its PIN and without its pin-source.
func withoutPIN(u *pkcs11uri.URI) string {
	only := *u
	only.PINSource = nil
	return only.String()
}

// matching returns the present tokens that a URI matches, each once. The object attributes of
// the URI do not count.
func (s *Store) matching(u *pkcs11uri.URI) map[wire.TokenID]bool {
	only := *u
	only.Object, only.ID, only.Type = nil, nil, ""
	all := make(map[wire.TokenID]bool)
	for _, m := range s.modulesNow() {
		for _, t := range m.present() {
			if t.matches(&only) {
				all[t.ID] = true
			}
		}
	}
	return all
}
