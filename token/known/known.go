// Package known keeps the list of the keys that the agent has seen.
//
// The list is a file in the agent's state directory. It holds what everybody may know: tokens
// by name and serial number, and public keys. The agent offers the keys of the list before
// their module has started and while their token is away.
//
// The package reads and writes the file and keeps it within bounds. It makes key pairs of the
// entries. Package token decides which tokens are in the list, and what becomes of them.
package known

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"p11-agent/token/pace"
	"p11-agent/token/pairs"
	"p11-agent/token/statefile"
	"p11-agent/token/wire"
)

// File is the name of the list in the state directory.
const File = "known-keys"

// The bounds of the list. When the list is full, the tokens that have been away for the
// longest time leave it.
const (
	MaxTwins = 256 // the largest Token.Twin

	maxFile   = 16 << 20 // bytes
	maxTokens = 256
	maxKeys   = wire.MaxList // of all tokens together
	version   = 2

	// The pace of writing the list.
	writeBurst, writeEvery = 20, 10 * time.Second
)

// List is the content of the file. Its zero value has no tokens.
type List struct {
	Version int     `json:"version"`
	Tokens  []Token `json:"tokens"`
}

// Token is a token as one module shows it.
type Token struct {
	Module       string    `json:"module"`
	Label        string    `json:"label"`
	Serial       string    `json:"serial"`
	Manufacturer string    `json:"manufacturer"`
	Model        string    `json:"model"`
	Twin         uint32    `json:"twin,omitempty"` // see wire.TokenID
	There        bool      `json:"there"`          // the token was present when the list was written
	Seen         time.Time `json:"seen"`           // when the token was present last
	Home         bool      `json:"home,omitempty"` // the token belongs to this module
	// Login tells that the token has CKF_LOGIN_REQUIRED (PKCS#11 v2.40 section 3.3).
	Login bool  `json:"login,omitempty"`
	Keys  []Key `json:"keys"`
}

// ID returns what the token says of itself.
func (t *Token) ID() wire.TokenID {
	return wire.TokenID{Label: t.Label, Serial: t.Serial, Manufacturer: t.Manufacturer, Model: t.Model, Twin: t.Twin}
}

// Load reads the list of a state directory. The List is empty without a directory, and when the
// file is missing or cannot be used. Only the agent writes the file, so any part that makes no sense
// is an error.
func Load(dir string, log *slog.Logger) *List {
	if dir == "" {
		return new(List)
	}
	path := filepath.Join(dir, File)
	l, err := load(path)
	if err != nil {
		log.Warn("cannot read the list of known keys; starting with an empty one", "file", path, "reason", err)
		return new(List)
	}
	return l
}

func load(path string) (*List, error) {
	b, err := statefile.Read(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return new(List), nil
	}
	if err != nil {
		return nil, err
	}
	return parse(b)
}

func parse(b []byte) (*List, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	l := new(List)
	if err := d.Decode(l); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("data follows the end of the list")
	}
	switch l.Version {
	case version:
	case 1:
		l.upgrade()
	default:
		return nil, fmt.Errorf("the list has version %d, and this program reads version %d", l.Version, version)
	}
	if len(l.Tokens) > maxTokens {
		return nil, fmt.Errorf("the list has %d tokens, more than %d", len(l.Tokens), maxTokens)
	}
	keys := 0
	for i := range l.Tokens {
		t := &l.Tokens[i]
		if t.Twin > MaxTwins {
			return nil, fmt.Errorf("the twin number of a token is larger than %d", MaxTwins)
		}
		for _, text := range []string{t.Module, t.Label, t.Serial, t.Manufacturer, t.Model} {
			if len(text) > pairs.MaxText {
				return nil, fmt.Errorf("a name is longer than %d bytes", pairs.MaxText)
			}
		}
		if keys += len(t.Keys); keys > maxKeys {
			return nil, fmt.Errorf("the list has more than %d keys", maxKeys)
		}
		for j := range t.Keys {
			if _, err := t.Keys[j].pair(); err != nil {
				return nil, err
			}
		}
	}
	return l, nil
}

// upgrade brings a list of version 1 up to date. Such a list has the modules in their order.
// The agent used a token through the first module that showed the token.
func (l *List) upgrade() {
	seen := make(map[wire.TokenID]bool)
	for i := range l.Tokens {
		t := &l.Tokens[i]
		t.Home = !seen[t.ID()]
		seen[t.ID()] = true
	}
	l.Version = version
}

// Homes returns the module that each token belongs to.
func (l *List) Homes() map[wire.TokenID]string {
	all := make(map[wire.TokenID]string)
	for i := range l.Tokens {
		t := &l.Tokens[i]
		if _, ok := all[t.ID()]; t.Home && !ok {
			all[t.ID()] = t.Module
		}
	}
	return all
}

// Take removes the tokens of a module from the list, and returns them.
func (l *List) Take(module string) (taken []Token) {
	var rest []Token
	for _, t := range l.Tokens {
		if t.Module == module {
			taken = append(taken, t)
		} else {
			rest = append(rest, t)
		}
	}
	l.Tokens = rest
	return taken
}

// Keep writes the list of a state directory whenever changed has an element, and once more when
// ctx ends. now returns the tokens of that moment. Keep bounds how often it writes, and what it
// writes.
func Keep(ctx context.Context, dir string, changed <-chan struct{}, now func() []Token, log *slog.Logger) {
	w := writer{path: filepath.Join(dir, File)}
	save := func() {
		if err := w.write(now()); err != nil {
			log.Warn("cannot write the list of known keys", "file", w.path, "reason", err)
		}
	}
	rate := pace.Limit{Burst: writeBurst, Every: writeEvery}
	for {
		select {
		case <-changed:
			rate.Wait(ctx) // or until the end: the list is written at once
			save()
		case <-ctx.Done():
			select {
			case <-changed:
				save()
			default:
			}
			return
		}
	}
}

// A writer writes the list to a file.
type writer struct {
	path    string
	written []byte
}

// write bounds the list, and writes it when it differs from the last one that was written.
func (w *writer) write(tokens []Token) error {
	l := &List{Version: version, Tokens: bounded(tokens)}
	b, err := json.MarshalIndent(l, "", " ")
	if err != nil || bytes.Equal(b, w.written) {
		return err
	}
	if err := statefile.Write(w.path, append(b, '\n')); err != nil {
		return err
	}
	w.written = b
	return nil
}

// Remove removes the list from a state directory. It is no error when there is no list.
func Remove(dir string) error {
	err := os.Remove(filepath.Join(dir, File))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// size estimates the bytes that a token takes in the file. JSON encodes one byte of a text in
// at most six bytes.
func (t *Token) size() int {
	n := 256 + 6*(len(t.Module)+len(t.Label)+len(t.Serial)+len(t.Manufacturer)+len(t.Model))
	for _, key := range t.Keys {
		n += 128 + 6*(len(key.Label)+len(key.Shown)+len(key.Unfit)) + 2*(len(key.ID)+len(key.Public))
	}
	return n
}

// A share is a part of the list.
type share struct{ tokens, keys, bytes int }

func (a share) minus(b share) share {
	return share{a.tokens - b.tokens, a.keys - b.keys, a.bytes - b.bytes}
}

func (a share) least(b share) share {
	return share{min(a.tokens, b.tokens), min(a.keys, b.keys), min(a.bytes, b.bytes)}
}

func (a share) within(b share) bool {
	return a.tokens <= b.tokens && a.keys <= b.keys && a.bytes <= b.bytes
}

func (t *Token) share() share { return share{1, len(t.Keys), t.size()} }

// bounded returns the tokens that the list has room for. The modules share the room equally,
// and share what one module leaves. So a module that shows ever new tokens drops its own.
func bounded(tokens []Token) []Token {
	byModule := make(map[string][]int) // indices into tokens, the most important first
	for i := range tokens {
		byModule[tokens[i].Module] = append(byModule[tokens[i].Module], i)
	}
	names := slices.Sorted(maps.Keys(byModule))
	for _, list := range byModule {
		slices.SortStableFunc(list, func(a, b int) int { return byImportance(&tokens[a], &tokens[b]) })
	}
	left := share{maxTokens, maxKeys, maxFile / 2} // half: line ends and indentation take the rest
	keep := make(map[int]bool)
	// In the last round a single large token can take all the room that is left.
	for parts := len(names); parts > 0; parts /= 2 {
		for before := -1; len(keep) > before; {
			before = len(keep)
			most := share{left.tokens / parts, left.keys / parts, left.bytes / parts}
			for _, name := range names {
				room := left.least(most)
				for _, i := range byModule[name] {
					if s := tokens[i].share(); !keep[i] && s.within(room) {
						room, left, keep[i] = room.minus(s), left.minus(s), true
					}
				}
			}
		}
	}
	kept := make([]Token, 0, len(keep))
	for i := range tokens {
		if keep[i] {
			kept = append(kept, tokens[i])
		}
	}
	return kept
}

// byImportance puts present tokens first, then those that were present last.
func byImportance(a, b *Token) int {
	if a.There != b.There {
		if a.There {
			return -1
		}
		return 1
	}
	return b.Seen.Compare(a.Seen)
}
