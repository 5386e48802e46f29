package token

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"p11-agent/agent/joined"
	"p11-agent/agent/pattern"
	"p11-agent/token/homes"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// An AllowList says which module files a client may name. It has patterns of paths: * stands for
// any run of characters, slashes too, and ? for any one character. A pattern with ! in front
// forbids the files that it matches. ssh-agent -P takes the same patterns, separated by commas.
type AllowList []string

// DefaultAllowList is the default of ssh-agent -P.
var DefaultAllowList = AllowList{"/usr/lib*/*", "/usr/local/lib*/*"}

// ParseAllowList reads the argument of -P: patterns separated by commas.
func ParseAllowList(s string) AllowList {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// Resolve returns the file that path leads to, with all links followed, when
// the list allows it.
func (a AllowList) Resolve(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", errors.New("a module is named by an absolute path")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		// The error leaves out the path, which may be a mistyped URI with a PIN.
		if p, ok := errors.AsType[*fs.PathError](err); ok {
			err = p.Err
		}
		return "", fmt.Errorf("module file: %w", err)
	}
	allowed := false
	for _, p := range a {
		if forbidden, no := strings.CutPrefix(p, "!"); no {
			if pattern.Match(forbidden, real) {
				return "", fmt.Errorf("module %s is forbidden by the pattern %q of allow-modules or -P", real, p)
			}
		} else if pattern.Match(p, real) {
			allowed = true
		}
	}
	if !allowed {
		return "", fmt.Errorf("module %s is not in the list of allowed modules (allow-modules, -P)", real)
	}
	return real, nil
}

// A Selector selects keys: those a URI matches, or those of one module.
type Selector struct {
	uri  *pkcs11uri.URI // nil: all keys
	path string         // the module's resolved file, empty: any
	text string
	// certain leaves out a key while a login may show that the URI does not mean it.
	certain bool
}

// NewSelector returns the Selector of a URI that needs no module of its own.
func NewSelector(u *pkcs11uri.URI) *Selector { return &Selector{uri: u, text: u.String()} }

// Certain returns a Selector that leaves out keys whose names the token shows only after a login.
// It is for rules that restrict a client to named keys.
func (s *Selector) Certain() *Selector {
	c := *s
	c.certain = true
	return &c
}

// URI returns the URI; nil: the Selector selects by a module file.
func (s *Selector) URI() *pkcs11uri.URI { return s.uri }

// Match reports whether the Selector selects the key, where it is now.
func (s *Selector) Match(k *Key) bool {
	if s.path != "" && k.token.module.file != s.path {
		return false
	}
	return s.uri == nil || k.matches(s.uri, s.path == "") || !s.certain && k.Unfit() == "" && k.mayMatch(s.uri, s.path == "")
}

// selects reports whether the Selector selects a token: by one of its keys, or by a URI that names
// the token and no key.
func (s *Selector) selects(t *Token) bool {
	if slices.ContainsFunc(t.keyList(), s.Match) {
		return true
	}
	if s.path != "" && t.module.file != s.path {
		return false
	}
	return s.uri == nil || s.Broad() && t.matches(s.uri, s.path == "")
}

// Broad reports whether the Selector names no key by its id or label. The callers of a broad
// Selector leave out keys that are not fit for a login.
func (s *Selector) Broad() bool {
	return s.uri == nil || s.uri.ID == nil && s.uri.Object == nil
}

// All reports whether the Selector selects every key: its URI is "pkcs11:".
func (s *Selector) All() bool { return s.path == "" && s.text == "pkcs11:" }

// String returns the URI in its redacted form, or the module's path.
func (s *Selector) String() string { return s.text }

// ParseProvider reads the provider that a client names: a URI, the label of a token
// (pkcs11uri.ParseNamed), or the path of a module. It fails when allow does not allow the module.
// It does not start a module.
func ParseProvider(provider []byte, allow AllowList) (*Selector, error) {
	if isPath(provider) {
		path := string(provider)
		real, err := allow.Resolve(path)
		if err != nil {
			return nil, err
		}
		if isDir(real) {
			return nil, fmt.Errorf("module %s is a directory", real)
		}
		return &Selector{path: real, text: real}, nil
	}
	sel, err := parseURI(provider)
	if err != nil || sel.uri.ModulePath == nil {
		return sel, err
	}
	real, err := allow.Resolve(*sel.uri.ModulePath)
	if err != nil {
		sel.uri.Wipe()
		return nil, err
	}
	// A directory selects among the known modules, and starts none.
	if !isDir(real) {
		sel.path = real
	}
	return sel, nil
}

// ParseRemoteProvider is ParseProvider for a client that may be on another machine, or that sees
// only some keys. It looks at no file: such a client must not learn which files exist, nor make
// the agent wait for a file system. So it refuses the path of a module and the file of a PIN. It
// also refuses a PIN in the URI, because that PIN would count for every key that the URI matches.
//
// The label of a token means the same as "pkcs11:token=LABEL".
func ParseRemoteProvider(provider []byte) (*Selector, error) {
	if isPath(provider) {
		return nil, errors.New("a module is named by its path, which counts on this machine only: name keys by their pkcs11: URI")
	}
	sel, err := parseURI(provider)
	if err != nil {
		return nil, err
	}
	u := sel.uri
	switch {
	case u.ModulePath != nil:
		err = errors.New("the URI has a module-path, which counts on this machine only")
	case u.PINSource != nil || u.PIN() != nil:
		err = errors.New("the URI brings a PIN, which counts on this machine only: give the PIN when ssh-add asks")
	default:
		return sel, nil
	}
	u.Wipe()
	return nil, err
}

// parseURI reads the URI, or the label of a token, that a client names.
func parseURI(text []byte) (*Selector, error) {
	u, err := pkcs11uri.ParseNamed(text)
	if err != nil {
		if !pkcs11uri.IsURI(text) {
			err = fmt.Errorf("%w; a module is named by an absolute path", err)
		}
		return nil, err
	}
	if err := cmp.Or(u.CheckNames(), checkAdded(u)); err != nil {
		u.Wipe()
		return nil, err
	}
	return NewSelector(u), nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// libraryName matches the names of module files.
var libraryName = regexp.MustCompile(`\.so(\.[0-9]+)*$`)

// skInternal is OpenSSH's name for its own support of FIDO devices (sk-api.h). Clients send it as a
// provider; it is not the label of a token.
const skInternal = "internal"

// isPath reports whether a client names a file, and neither keys nor a token. A name of a form that
// only files have counts as a path, so that the error is about modules.
func isPath(provider []byte) bool {
	if pkcs11uri.IsURI(provider) {
		return false
	}
	return len(provider) == 0 || string(provider) == skInternal || provider[0] == '.' || provider[0] == '~' || bytes.IndexByte(provider, '/') >= 0 || libraryName.Match(provider)
}

// matches reports whether a URI names the module, or no module. The module-path does not count if
// byPath is false.
func (m *module) matches(u *pkcs11uri.URI, byPath bool) bool {
	if !byPath {
		only := *u
		only.ModulePath = nil
		u = &only
	}
	return m.named().Matches(u)
}

// named returns the module as URIs name it.
func (m *module) named() homes.Module {
	return homes.Module{Identity: m.identity, Name: m.spec.Name, Path: m.spec.Path, File: m.file, ByClient: m.byClient}
}

// Select returns the keys that sel selects now. When there are none, it looks at the modules
// again. It starts the module that sel names by path. Until RemoveSource, each look searches for
// the objects that the URI of sel names. Select fails with ErrNoMatch, with an *AmbiguousError
// when sel selects one token through several modules, or with the failure of the named module.
func (s *Store) Select(ctx context.Context, sel *Selector) ([]*Key, error) {
	return s.SelectOf(ctx, sel, func(*Key) bool { return true })
}

// SelectOf is Select for a client that reaches some keys only: keys that reached refuses count as
// missing.
func (s *Store) SelectOf(ctx context.Context, sel *Selector, reached func(*Key) bool) ([]*Key, error) {
	var named *module
	if sel.path != "" {
		var err error
		if named, err = s.ensureModule(sel.path); err != nil {
			return nil, err
		}
		select {
		case <-named.supervisor.Tried():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if sel.uri != nil {
		s.want(sel.uri)
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
	if sel.uri != nil {
		s.mu.Lock()
		s.unwantLocked(sel.uri)
		s.mu.Unlock()
	}
	return nil, s.whyNone(ctx, sel, named)
}

// whyNone returns the reason why sel selects no key.
func (s *Store) whyNone(ctx context.Context, sel *Selector, named *module) error {
	for _, m := range s.modulesNow() {
		if named != nil && m != named {
			continue
		}
		for _, t := range m.present() {
			if sel.uri != nil && !t.matches(sel.uri, sel.path == "") {
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
func (s *Store) selected(sel *Selector, reached func(*Key) bool) ([]*Key, error) {
	var keys []*Key
	through := make(map[wire.TokenID][]string)
	home := make(map[wire.TokenID]*Token)
	if sel.uri != nil {
		home = s.atHome(func(t *Token) bool { return slices.ContainsFunc(t.keyList(), sel.Match) })
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
			if len(keys) > n && sel.uri != nil {
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
func (s *Store) ensureModule(real string) (*module, error) {
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
