// Package selection says which keys a person or a client means: by a pkcs11: URI, by the label of a
// token, or by the path of a module. It also says which modules a client may name.
//
// The package reads names and compares them. Package token has the keys, and starts modules.
package selection

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"

	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
)

// A Selector selects keys: those a URI matches, or those of one module.
type Selector struct {
	uri   *pkcs11uri.URI // nil: all keys
	means *pkcs11uri.URI // a copy of uri, without a module-path that leads to file
	file  string         // of the module, with all links followed; empty: any
	text  string
	// certain leaves out a key while a login may show that the URI does not mean it.
	certain bool
}

// A Token is a token that a Selector may select.
type Token interface {
	// ModuleFile returns the file of the module that shows the token, with all links followed.
	ModuleFile() string
	// Matches reports whether a URI selects the token, or the key.
	Matches(u *pkcs11uri.URI) bool
}

// A Key is a key that a Selector may select.
type Key interface {
	Token
	// MayMatch reports whether a URI may select the key: a login may show another name of the key.
	MayMatch(u *pkcs11uri.URI) bool
	// Unfit returns the reason not to offer the key unless a user names it, or "".
	Unfit() string
}

// New returns the Selector of a URI that needs no module of its own.
func New(u *pkcs11uri.URI) *Selector {
	means := *u
	return &Selector{uri: u, means: &means, text: u.String()}
}

// inModule makes the Selector select keys of one module, by its file.
func (s *Selector) inModule(file string) {
	s.file, s.means.ModulePath = file, nil
}

// Certain returns a Selector that leaves out keys whose names the token shows only after a login.
// It is for rules that restrict a client to named keys.
func (s *Selector) Certain() *Selector {
	c := *s
	c.certain = true
	return &c
}

// URI returns the URI; nil: the Selector selects by a module file.
func (s *Selector) URI() *pkcs11uri.URI { return s.uri }

// File returns the file of the module that the Selector names by path, with all links followed;
// empty: it names none.
func (s *Selector) File() string { return s.file }

// Match reports whether the Selector selects the key, where it is now.
func (s *Selector) Match(k Key) bool {
	if s.file != "" && k.ModuleFile() != s.file {
		return false
	}
	return s.uri == nil || k.Matches(s.means) || !s.certain && k.Unfit() == "" && k.MayMatch(s.means)
}

// MatchToken reports whether the Selector selects a token. What the URI says about objects does not
// count.
func (s *Selector) MatchToken(t Token) bool {
	if s.file != "" && t.ModuleFile() != s.file {
		return false
	}
	return s.uri == nil || t.Matches(s.means)
}

// Broad reports whether the Selector names no key by its id or label. The callers of a broad
// Selector leave out keys that are not fit for a login.
func (s *Selector) Broad() bool {
	return s.uri == nil || s.uri.ID == nil && s.uri.Object == nil
}

// All reports whether the Selector selects every key: its URI is "pkcs11:".
func (s *Selector) All() bool { return s.file == "" && s.text == "pkcs11:" }

// String returns the URI in its redacted form, or the module's path.
func (s *Selector) String() string { return s.text }

// Parse reads the provider that a client names: a URI, the label of a token
// (pkcs11uri.ParseNamed), or the path of a module. It fails when allow does not allow the module.
// It does not start a module.
func Parse(provider []byte, allow AllowList) (*Selector, error) {
	if isPath(provider) {
		path := string(provider)
		real, err := allow.Resolve(path)
		if err != nil {
			return nil, err
		}
		if isDir(real) {
			return nil, fmt.Errorf("module %s is a directory", real)
		}
		return &Selector{file: real, text: real}, nil
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
		sel.inModule(real)
	}
	return sel, nil
}

// ParseRemote is Parse for a client that may be on another machine, or that sees
// only some keys. It looks at no file: such a client must not learn which files exist, nor make
// the agent wait for a file system. So it refuses the path of a module and the file of a PIN. It
// also refuses a PIN in the URI, because that PIN would count for every key that the URI matches.
//
// The label of a token means the same as "pkcs11:token=LABEL".
func ParseRemote(provider []byte) (*Selector, error) {
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
	if err := cmp.Or(u.CheckNames(), pin.CheckClientURI(u)); err != nil {
		u.Wipe()
		return nil, err
	}
	return New(u), nil
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
