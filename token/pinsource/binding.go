package pinsource

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

	"p11-agent/token/statefile"
	"p11-agent/token/wire"
)

// bindingsFile is the name of the file of bindings in the state directory.
const bindingsFile = "pin-bindings"

// The bounds of the file. The oldest bindings go.
const (
	maxBindings     = 256
	maxBindingsFile = 8 << 20 // bytes: a URI has at most 8 KiB
	bindingsVersion = 1
)

// A binding says which token, through which module, the PIN of a URI of the configuration is
// for. The agent makes it before the token gets the PIN for the first time. It holds no PIN
// and no source of a PIN.
type binding struct {
	URI          string `json:"uri"` // without its PIN
	Module       string `json:"module"`
	Label        string `json:"label"`
	Serial       string `json:"serial"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Twin         uint32 `json:"twin,omitempty"` // see wire.TokenID
	// Keys are digests of keys that the token showed, as hexadecimal text. Another card of the
	// same name has other keys.
	Keys string `json:"keys,omitempty"`
}

// bind returns the binding of a URI, without its PIN, to a token.
func bind(uri, module string, id wire.TokenID, keys string) binding {
	return binding{uri, module, id.Label, id.Serial, id.Manufacturer, id.Model, id.Twin, keys}
}

// id returns what the token says of itself.
func (b binding) id() wire.TokenID {
	return wire.TokenID{Label: b.Label, Serial: b.Serial, Manufacturer: b.Manufacturer, Model: b.Model, Twin: b.Twin}
}

// bindings has the bindings of a state directory. Other processes of the program may add to
// the file. Methods may be called from any goroutine.
type bindings struct {
	log  *slog.Logger
	path string // empty: the bindings are only in memory

	mu  sync.Mutex
	all []binding // as read or written last; the oldest first
}

// loadBindings returns the bindings of a state directory. Without a directory they are only in
// memory.
func loadBindings(dir string, log *slog.Logger) *bindings {
	b := &bindings{log: log}
	if dir != "" {
		b.path = filepath.Join(dir, bindingsFile)
	}
	return b
}

// of returns the binding of a URI. It fails when the file cannot be read: then the PIN may be
// for any token.
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

// add adds a binding. It fails when the URI is bound to another token. A binding that cannot be
// written counts all the same, until the process ends.
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
			return errors.New("the PIN was just used for another token")
		}
		if add.Keys == "" || b.all[i] == add {
			return nil
		}
		b.all = slices.Delete(b.all, i, i+1) // the keys of the token have changed
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
		b.log.Warn("cannot write down which token a configured PIN is for", "file", b.path, "reason", err)
	}
	return nil
}

// bindingsText is the content of the file.
type bindingsText struct {
	Version  int       `json:"version"`
	Bindings []binding `json:"bindings"`
}

// readLocked adds the bindings of the file. Bindings that could not be written stay.
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
		return fmt.Errorf("cannot read from %s which token the PIN is for: %w; remove the file to begin anew", b.path, err)
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
		return nil, errors.New("data follows the end of the list")
	}
	switch {
	case f.Version != bindingsVersion:
		return nil, fmt.Errorf("the file has version %d, and this program reads version %d", f.Version, bindingsVersion)
	case len(f.Bindings) > maxBindings:
		return nil, fmt.Errorf("the file has %d entries, more than %d", len(f.Bindings), maxBindings)
	}
	return f.Bindings, nil
}
