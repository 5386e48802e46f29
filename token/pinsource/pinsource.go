// Package pinsource says which token gets the PIN that a pkcs11: URI carries or names.
//
// A PIN is for one token and one module. The PIN of a URI of the configuration is for the token and
// module that got it first, also after a restart. The PIN of a client's URI is for the token and
// module that the client has named.
//
// Package pin reads the PIN, and decides whether the token may try it. Package token says which
// tokens are present, and which keys a URI means.
package pinsource

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"p11-agent/pinentry/secret"
	"p11-agent/token/card"
	"p11-agent/token/homes"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A Token is a token as one module shows it. Two Tokens of one token and one module are equal.
type Token interface {
	ID() wire.TokenID
	// Module returns the name of the module: see homes.Module.Identity.
	Module() string
	// Name returns a name of the token for a person.
	Name() string
	// Shows returns what the card shows of its keys.
	Shows() card.Shown
	// IsOther reports whether the card is another one than the card that showed was.
	IsOther(was card.Shown) bool
	// CheckGuest fails when the token belongs to another module, and the URI does not name the
	// module of the token.
	CheckGuest(u *pkcs11uri.URI) error
	// Matching returns how many present tokens a URI matches. The object attributes of the URI do
	// not count.
	Matching(u *pkcs11uri.URI) int
}

// A List has the URIs that carry or name PINs. Methods may be called from any goroutine. They call
// the methods of a Token without a lock.
type List struct {
	bindings *bindings

	mu         sync.Mutex       // guards the following, and the PINs of the URIs
	configured []*pkcs11uri.URI // of the configuration
	added      []added          // of clients
}

// An added is a URI that a client has named, with the token that it was named for.
type added struct {
	uri    *pkcs11uri.URI
	token  wire.TokenID
	module string
	shown  card.Shown // what the token showed then
}

// New returns the List of the URIs of the configuration. stateDir has the file of the tokens that
// PINs are for; empty: they are only in memory.
func New(configured []*pkcs11uri.URI, stateDir string, log *slog.Logger) *List {
	return &List{bindings: loadBindings(stateDir, log), configured: slices.Clone(configured)}
}

// Set replaces the URIs of the configuration, and wipes the old ones. Those of clients stay.
func (l *List) Set(all []*pkcs11uri.URI) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, u := range l.configured {
		if !slices.Contains(all, u) {
			u.Wipe()
		}
	}
	l.configured = slices.Clone(all)
}

// Add adds a client's URI for the tokens of the keys that the URI selects now. The URI has to name
// exactly one token. Add refuses a command: only the configuration may name one.
func (l *List) Add(u *pkcs11uri.URI, tokens []Token) error {
	if err := pin.CheckClientURI(u); err != nil {
		return err
	}
	t := tokens[0]
	if t.Matching(u) > 1 || slices.ContainsFunc(tokens, func(o Token) bool { return o != t }) {
		return fmt.Errorf("a PIN is for one token, and %s names several: add the serial attribute (token %s is one of them)", withoutPIN(u), t.Name())
	}
	if err := t.CheckGuest(u); err != nil {
		return err
	}
	add := added{uri: u, token: t.ID(), module: t.Module(), shown: t.Shows()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.added = append(slices.Clip(l.added), add)
	return nil
}

// Remove undoes Add, and wipes the PIN in the URI.
func (l *List) Remove(u *pkcs11uri.URI) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.added = slices.DeleteFunc(slices.Clone(l.added), func(o added) bool { return o.uri == u })
	u.Wipe()
}

// Of returns the source of the PIN of a key on a token; nil: a person is to be asked. means reports
// whether a URI means the key. URIs of the configuration come before those of clients.
func (l *List) Of(t Token, means func(*pkcs11uri.URI) bool) *Source {
	l.mu.Lock()
	configured, clients := l.configured, l.added
	l.mu.Unlock()
	for _, u := range configured {
		if means(u) {
			return l.source(t, u, nil)
		}
	}
	id, module := t.ID(), t.Module()
	for _, a := range clients {
		if a.token == id && a.module == module && means(a.uri) {
			return l.source(t, a.uri, &a.shown)
		}
	}
	return nil
}

// source makes a Source. Set and Remove wipe URIs under the same lock.
func (l *List) source(t Token, u *pkcs11uri.URI, shown *card.Shown) *Source {
	l.mu.Lock()
	defer l.mu.Unlock()
	says := *u
	return &Source{list: l, token: t, uri: u, says: &says, shown: shown}
}

// A Source is the URI that the PIN of a key comes from.
type Source struct {
	list  *List
	token Token
	uri   *pkcs11uri.URI
	says  *pkcs11uri.URI // a copy: another goroutine may wipe the PIN of uri
	shown *card.Shown    // what the token showed when a client named the URI; nil: the configuration has the URI
}

var _ pin.Source = (*Source)(nil)

// Check fails when the PIN must not go to the token.
func (s *Source) Check() error {
	if s.shown == nil {
		return s.list.mayUse(s.token, s.says)
	}
	if s.token.IsOther(*s.shown) {
		return errors.New("another card of the same name is there now: add the PIN again for this one")
	}
	return nil
}

// Bind binds a PIN of the configuration to the token and its module.
func (s *Source) Bind() error {
	if s.shown != nil {
		return nil
	}
	if err := s.list.bindings.add(bind(withoutPIN(s.says), s.token.Module(), s.token.ID(), s.token.Shows().String())); err != nil {
		return fmt.Errorf("the PIN of %v: %w", s.says, err)
	}
	return nil
}

// Read returns the PIN that the URI carries or names.
func (s *Source) Read(ctx context.Context) (*secret.Secret, pin.Origin, error) {
	u := s.uri
	s.list.mu.Lock() // Remove wipes the URI
	value := u.PIN()
	copied, err := value.Clone()
	s.list.mu.Unlock()
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
	if s.shown != nil && u.PINSource.Kind != pkcs11uri.PINCommand {
		path, err := pin.SourcePath(u.PINSource)
		if err == nil && s.list.configuredFile(path) {
			err = fmt.Errorf("pin-source: %s is for another token in the configuration", path)
		}
		if err != nil {
			return nil, pin.Origin{}, err
		}
	}
	return pin.ReadSource(ctx, u.PINSource)
}

// configuredFile reports whether the configuration takes a PIN from a file. A client that names
// the file gets no login by it: otherwise a client that cannot read the file could have the PIN
// of one token tried on another, or handed to another module.
func (l *List) configuredFile(path string) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false // pin.ReadSource fails with the reason
	}
	l.mu.Lock()
	configured := l.configured
	l.mu.Unlock()
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
func (l *List) mayUse(t Token, u *pkcs11uri.URI) error {
	if err := pin.CheckURI(u); err != nil {
		return err
	}
	text, id, module := withoutPIN(u), t.ID(), t.Module()
	b, ok, err := l.bindings.of(text)
	switch {
	case err != nil:
		return err
	case ok && b.id() != id && b.id().Texts() == id.Texts():
		return fmt.Errorf("the PIN of %s is for another token of the same label and serial number since its first use: name this token by the id of its key", text)
	case ok && b.id() != id:
		return fmt.Errorf("the PIN of %s is for token %q (serial %s) since its first use: to use it for this token, add its serial attribute (serial %s)",
			text, b.Label, b.Serial, id.Serial)
	case ok && b.Module != module:
		return fmt.Errorf("the PIN of %s is for module %q since its first use, and module %q shows the token now: to give it to %q, add %s to the query of the URI",
			text, b.Module, module, module, homes.Attribute(module))
	case ok && t.IsOther(card.Parse(b.Keys)):
		return fmt.Errorf("the PIN of %s is for another card of the same name since its first use, and this card has other keys: name a key of this card by its id", text)
	case ok:
		return nil
	}
	if n := t.Matching(u); n > 1 {
		return fmt.Errorf("a PIN is for one token, and %s names %d present tokens: add the serial attribute (this token has serial %s)", text, n, id.Serial)
	}
	return t.CheckGuest(u)
}

// withoutPIN returns the text of a URI without its PIN and without its pin-source.
func withoutPIN(u *pkcs11uri.URI) string {
	only := *u
	only.PINSource = nil
	return only.String()
}
