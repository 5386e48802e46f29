package token

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/statefile"
	"p11-agent/token/wire"
)

// bindingsFile is the name of the file in Options.StateDir that tells which token each
// PIN of the configuration belongs to.
const bindingsFile = "pin-bindings"

// What the file may hold; the oldest bindings go.
const (
	maxBindings     = 256
	maxBindingsFile = 8 << 20 // bytes: a URI has 8 KiB at the most
	bindingsVersion = 1
)

// A binding says which token, through which module, the PIN of a URI of the
// configuration is for. It is made before the PIN is handed out for the first time, and
// holds no PIN and no source of one.
type binding struct {
	URI          string `json:"uri"` // without its PIN
	Module       string `json:"module"`
	Label        string `json:"label"`
	Serial       string `json:"serial"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Twin         uint32 `json:"twin,omitempty"` // see wire.TokenID
	// Keys are digests of keys that the token showed, as hexadecimal text: a card of the
	// same name has others.
	Keys string `json:"keys,omitempty"`
}

func bindingOf(uri string, t *Token) binding {
	return binding{uri, t.module.identity, t.ID.Label, t.ID.Serial, t.ID.Manufacturer, t.ID.Model, t.ID.Twin, t.shows().text()}
}

func (b binding) id() wire.TokenID {
	return wire.TokenID{Label: b.Label, Serial: b.Serial, Manufacturer: b.Manufacturer, Model: b.Model, Twin: b.Twin}
}

// bindings are those that there are. Other processes of the program may add to the file.
type bindings struct {
	log  *slog.Logger
	path string // empty: they are only in memory

	mu  sync.Mutex
	all []binding // as read or written last; the oldest first
}

func loadBindings(dir string, log *slog.Logger) *bindings {
	b := &bindings{log: log}
	if dir != "" {
		b.path = filepath.Join(dir, bindingsFile)
	}
	return b
}

// of returns the binding of a URI. It fails when the file cannot be read: then nobody
// knows which token the PIN is for.
func (b *bindings) of(uri string) (found binding, ok bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.readLocked(); err != nil {
		return found, false, err
	}
	i := slices.IndexFunc(b.all, func(o binding) bool { return o.URI == uri })
	if i < 0 {
		return found, false, nil
	}
	return b.all[i], true, nil
}

// add adds a binding, and fails when there is another one for the URI.
func (b *bindings) add(add binding) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.readLocked(); err != nil {
		return err
	}
	if i := slices.IndexFunc(b.all, func(o binding) bool { return o.URI == add.URI }); i >= 0 {
		old := b.all[i]
		old.Keys = add.Keys
		if old != add {
			return errors.New("it was just used for another token")
		}
		if add.Keys == "" || b.all[i] == add {
			return nil
		}
		b.all = slices.Delete(b.all, i, i+1) // its keys have changed
	}
	b.all = append(b.all, add)
	b.all = b.all[max(0, len(b.all)-maxBindings):]
	if b.path == "" {
		return nil
	}
	text, err := json.MarshalIndent(bindingsText{bindingsVersion, b.all}, "", " ")
	if err == nil {
		err = statefile.Write(b.path, append(text, '\n'))
	}
	if err != nil {
		b.log.Warn("cannot remember which token a configured PIN is for", "file", b.path, "reason", err)
	}
	return nil
}

// bindingsText is the file.
type bindingsText struct {
	Version  int       `json:"version"`
	Bindings []binding `json:"bindings"`
}

// readLocked adds what the file has. Bindings that could not be written stay.
func (b *bindings) readLocked() error {
	if b.path == "" {
		return nil
	}
	text, err := statefile.Read(b.path, maxBindingsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var all []binding
	if err == nil {
		all, err = parseBindings(text)
	}
	if err != nil {
		return fmt.Errorf("%s does not tell which token it is for: %w; remove the file to begin anew", b.path, err)
	}
	for _, o := range all {
		if !slices.ContainsFunc(b.all, func(known binding) bool { return known.URI == o.URI }) {
			b.all = append(b.all, o)
		}
	}
	return nil
}

// parseBindings reads the file. Only the program writes it.
func parseBindings(text []byte) ([]binding, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	var f bindingsText
	if err := d.Decode(&f); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("there is more behind its end")
	}
	switch {
	case f.Version != bindingsVersion:
		return nil, fmt.Errorf("its version is %d, and %d is known here", f.Version, bindingsVersion)
	case len(f.Bindings) > maxBindings:
		return nil, fmt.Errorf("it has %d entries", len(f.Bindings))
	}
	return f.Bindings, nil
}

// CheckPIN tells whether the PIN or pin-source of a URI, if it has one, is for one token:
// the URI has to name the token by its label or serial number.
func CheckPIN(u *pkcs11uri.URI) error {
	if u.PIN() == nil && u.PINSource == nil || NamesToken(u) {
		return nil
	}
	return errors.New("a PIN is for one token, and this URI names none: add the token attribute, and the serial attribute where several tokens have one label")
}

// mayUse tells whether the PIN of a URI of the configuration may go to a token. A PIN
// that was never used needs a URI that exactly one of the tokens that are there matches,
// and the module that the token belongs to, or that the URI names. A PIN that was used
// is for that token and that module alone.
func (t *Token) mayUse(u *pkcs11uri.URI) error {
	if err := CheckPIN(u); err != nil {
		return err
	}
	s := t.module.store
	b, ok, err := s.bindings.of(selection(u))
	switch {
	case err != nil:
		return err
	case ok && b.id() != t.ID && b.id().Texts() == t.ID.Texts():
		return fmt.Errorf("the PIN of %s is for another token of the same label and serial number, which it was used for first: name this one by the id of its key", selection(u))
	case ok && b.id() != t.ID:
		return fmt.Errorf("the PIN of %s is for token %q (serial %s) since it was used first: to use it for this one, name this one by its serial attribute (serial %s)",
			selection(u), b.Label, b.Serial, t.ID.Serial)
	case ok && b.Module != t.module.identity:
		return fmt.Errorf("the PIN of %s is for module %q since it was used first, and module %q shows the token now: to give it to %q, add %s to the query of the URI",
			selection(u), b.Module, t.module.identity, t.module.identity, naming(t.module.identity))
	case ok && t.isOther(parseShown(b.Keys)):
		return fmt.Errorf("the PIN of %s is for another card of the same name since it was used first, and this one has other keys: name the key of this one by its id", selection(u))
	case ok:
		return nil
	}
	if all := s.matching(u); len(all) > 1 {
		return fmt.Errorf("a PIN is for one token, and %s names %d that are there: add the serial attribute (this one has serial %s)", selection(u), len(all), t.ID.Serial)
	}
	if belongs, _ := t.claims(); belongs != "" && !s.names(u, t.module) {
		return &GuestError{Token: t.ID.Label, Module: t.module.identity, Home: belongs}
	}
	return nil
}

// selection is the text of a URI without its PIN, and without where the PIN comes from.
func selection(u *pkcs11uri.URI) string {
	only := *u
	only.PINSource = nil
	return only.String()
}

// matching returns the tokens that are there and that a URI matches, whatever it says of
// objects, each once.
func (s *Store) matching(u *pkcs11uri.URI) map[wire.TokenID]bool {
	only := *u
	only.Object, only.ID, only.Type = nil, nil, ""
	all := make(map[wire.TokenID]bool)
	for _, m := range s.modulesNow() {
		for _, t := range m.present() {
			if t.matches(&only, true) {
				all[t.ID] = true
			}
		}
	}
	return all
}
