package token

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"p11-agent/agent/joined"
	"p11-agent/token/homes"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

var (
	_ selection.Key   = (*Key)(nil)
	_ selection.Token = namedToken{}
)

// ModuleFile returns the file of the module, with all links followed.
func (k *Key) ModuleFile() string { return k.token.module.file }

// A namedToken is a Token as a Selector sees it.
type namedToken struct{ *Token }

func (t namedToken) ModuleFile() string            { return t.module.file }
func (t namedToken) Matches(u *pkcs11uri.URI) bool { return t.matches(u) }

// selectedBy reports whether a Selector selects the token: by one of its keys, or by a URI that names
// the token and no key.
func (t *Token) selectedBy(sel *selection.Selector) bool {
	return slices.ContainsFunc(t.keyList(), func(k *Key) bool { return sel.Match(k) }) ||
		sel.Broad() && sel.MatchToken(namedToken{t})
}

// named returns the module as URIs name it.
func (m *moduleState) named() homes.Module {
	return homes.Module{Identity: m.identity, Name: m.spec.Name, Path: m.spec.Path, File: m.file, ByClient: m.byClient}
}

// Select returns the keys that sel selects now. When there are none, it looks at the modules
// again. It starts the module that sel names by path. Until RemoveSource, each look searches for
// the objects that the URI of sel names. Select fails with ErrNoMatch, with an *AmbiguousError
// when sel selects one token through several modules, or with the failure of the named module.
func (s *Store) Select(ctx context.Context, sel *selection.Selector) ([]*Key, error) {
	return s.SelectOf(ctx, sel, func(*Key) bool { return true })
}

// SelectOf is Select for a client that reaches some keys only: keys that reached refuses count as
// missing.
func (s *Store) SelectOf(ctx context.Context, sel *selection.Selector, reached func(*Key) bool) ([]*Key, error) {
	var named *moduleState
	if sel.File() != "" {
		var err error
		if named, err = s.ensureModule(sel.File()); err != nil {
			return nil, err
		}
		select {
		case <-named.supervisor.Tried():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if sel.URI() != nil {
		s.mu.Lock()
		s.wanted.Ask(sel.URI())
		s.mu.Unlock()
	}
	keys, err := s.selected(sel, reached)
	if len(keys) > 0 || err != nil {
		return keys, err
	}
	if named != nil {
		if err := named.supervisor.Rescan(ctx); err != nil {
			return nil, err
		}
	} else if err := s.Rescan(ctx); err != nil {
		return nil, err
	}
	keys, err = s.selected(sel, reached)
	if len(keys) > 0 || err != nil {
		return keys, err
	}
	if sel.URI() != nil {
		s.mu.Lock()
		s.wanted.Drop(sel.URI())
		s.mu.Unlock()
	}
	return nil, s.whyNone(ctx, sel, named)
}

// whyNone returns the reason why sel selects no key.
func (s *Store) whyNone(ctx context.Context, sel *selection.Selector, named *moduleState) error {
	for _, m := range s.modulesNow() {
		if named != nil && m != named {
			continue
		}
		for _, t := range m.present() {
			if !sel.MatchToken(namedToken{t}) {
				continue
			}
			if len(t.keyList()) == 0 {
				return fmt.Errorf("%w: token %q shows no key that can be used with SSH", ErrNoMatch, t.ID.Label)
			}
			return fmt.Errorf("%w: token %q has no such key", ErrNoMatch, t.ID.Label)
		}
	}
	var failed []error
	for _, m := range s.modulesNow() {
		if err := m.supervisor.Failure(); err != nil && (named == nil || m == named) {
			failed = append(failed, err)
		}
	}
	failed = append(failed, s.inUse(ctx, named)...)
	return joined.Errors(append([]error{fmt.Errorf("%w: no such token is present", ErrNoMatch)}, failed...)...)
}

// selected returns the known keys that sel selects and reached accepts. Of the modules that show a
// token, its home counts. When a URI selects a token through several other modules, selected
// fails: it is open which module gets the PIN.
func (s *Store) selected(sel *selection.Selector, reached func(*Key) bool) ([]*Key, error) {
	var keys []*Key
	through := make(map[wire.TokenID][]string)
	home := make(map[wire.TokenID]*Token)
	if sel.URI() != nil {
		home = s.atHome(func(t *Token) bool {
			return slices.ContainsFunc(t.keyList(), func(k *Key) bool { return sel.Match(k) })
		})
	}
	for _, m := range s.modulesNow() {
		for _, t := range m.present() {
			if h := home[t.ID]; h != nil && h != t {
				continue
			}
			n := len(keys)
			for _, k := range t.keyList() {
				if sel.Match(k) && (k.Unfit() == "" || !sel.Broad()) && reached(k) {
					keys = append(keys, k)
				}
			}
			if len(keys) > n && sel.URI() != nil {
				through[t.ID] = append(through[t.ID], m.spec.Name)
				if len(through[t.ID]) > 1 {
					return nil, &AmbiguousError{Token: t.ID.Label, Modules: through[t.ID]}
				}
			}
		}
	}
	return keys, nil
}

// atHome returns the present tokens that meant accepts, each as its home shows it.
func (s *Store) atHome(meant func(*Token) bool) map[wire.TokenID]*Token {
	found := make(map[wire.TokenID]*Token)
	for _, m := range s.modulesNow() {
		for _, t := range m.present() {
			s.mu.Lock()
			belongs := s.homes.Of(t.ID)
			s.mu.Unlock()
			if belongs == m.identity && meant(t) {
				found[t.ID] = t
			}
		}
	}
	return found
}

// ensureModule returns the module of a file. It starts the module when none runs the file.
func (s *Store) ensureModule(real string) (*moduleState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	name := filepath.Base(real)
	for _, m := range s.modules {
		if m.file == real {
			return m, nil
		}
		if m.spec.Name == name {
			name = real
		}
	}
	return s.startLocked(ModuleSpec{Name: name, Path: real}, real), nil
}
