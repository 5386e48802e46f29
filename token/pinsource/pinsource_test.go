package pinsource

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/token/card"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

var errGuest = errors.New("the token belongs to another module")

// fake is a Token of the tests.
type fake struct {
	id       wire.TokenID
	module   string
	shows    card.Shown
	guest    bool
	matching int
}

func (f *fake) ID() wire.TokenID            { return f.id }
func (f *fake) Module() string              { return f.module }
func (f *fake) Name() string                { return fmt.Sprintf("%q", f.id.Label) }
func (f *fake) Shows() card.Shown           { return f.shows }
func (f *fake) IsOther(was card.Shown) bool { return was.Comparable(f.shows) && !was.Overlaps(f.shows) }
func (f *fake) Matching(*pkcs11uri.URI) int { return f.matching }
func (f *fake) CheckGuest(*pkcs11uri.URI) error {
	if f.guest {
		return errGuest
	}
	return nil
}

func newFake(serial string) *fake {
	return &fake{id: wire.TokenID{Label: "card", Serial: serial}, module: "m", shows: showing(1), matching: 1}
}

// showing returns what a card with one key shows.
func showing(seed byte) card.Shown {
	key := ed25519.NewKeyFromSeed(append(make([]byte, ed25519.SeedSize-1), seed))
	p := &pairs.Pair{Public: key.Public()}
	p.Modulus, p.Point = pairs.Attributes(key.Public())
	return card.ShownOf([]*pairs.Pair{p})
}

func parse(t *testing.T, text string) *pkcs11uri.URI {
	t.Helper()
	u, err := pkcs11uri.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Wipe)
	return u
}

func newList(dir string, configured ...*pkcs11uri.URI) *List {
	return New(configured, dir, slog.New(slog.DiscardHandler))
}

func always(*pkcs11uri.URI) bool { return true }

// read returns the PIN of a source. It returns "" if the source has no PIN, or may not give it to the token.
func read(t *testing.T, s *Source) string {
	t.Helper()
	if s == nil || s.Check() != nil || s.Bind() != nil {
		return ""
	}
	pin, _, err := s.Read(t.Context())
	if err != nil {
		return ""
	}
	defer pin.Wipe()
	return string(pin.Bytes())
}

func (l *List) want(t *testing.T, token Token, pin string) {
	t.Helper()
	if got := read(t, l.Of(token, always)); got != pin {
		t.Errorf("the PIN is %q, want %q", got, pin)
	}
}

// The configuration comes before clients. The first URI that means the key counts.
func TestOf(t *testing.T) {
	one, two := newFake("1"), newFake("2")
	first := parse(t, "pkcs11:serial=1?pin-value=first")
	l := newList("", first, parse(t, "pkcs11:serial=1?pin-value=second"))
	client := parse(t, "pkcs11:serial=1?pin-value=client")
	if err := l.Add(client, []Token{one}); err != nil {
		t.Fatal(err)
	}
	l.want(t, one, "first")
	if s := l.Of(one, func(u *pkcs11uri.URI) bool { return u != first }); read(t, s) != "second" {
		t.Error("a URI that does not mean the key gives the PIN")
	}
	l.Set(nil)
	if first.PIN() != nil {
		t.Error("the PIN of an old URI is not wiped")
	}
	l.want(t, one, "client")
	l.want(t, two, "")
	elsewhere := *one
	elsewhere.module = "other"
	l.want(t, &elsewhere, "")
	s := l.Of(one, always)
	l.Remove(client)
	l.want(t, one, "")
	if got := read(t, s); got != "" {
		t.Errorf("a removed PIN is %q", got)
	}
}

// The PIN of the configuration stays with the token, the module and the keys that it was for first.
// Another process of the agent sees that in the file.
func TestBound(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*fake)
		says   string // of the error; empty: the token gets the PIN
	}{
		"the same token":                 {func(*fake) {}, ""},
		"another token":                  {func(f *fake) { f.id.Serial = "2" }, "is for token \"card\" (serial 1)"},
		"a twin":                         {func(f *fake) { f.id.Twin = 1 }, "same label and serial number"},
		"another module":                 {func(f *fake) { f.module = "other" }, "add module-name=other"},
		"another card":                   {func(f *fake) { f.shows = showing(2) }, "this card has other keys"},
		"the same token, with a second":  {func(f *fake) { f.matching = 2 }, ""},
		"the same token, now of a guest": {func(f *fake) { f.guest = true }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			const text = "pkcs11:token=card?pin-value=1234"
			newList(dir, parse(t, text)).want(t, newFake("1"), "1234")
			f := newFake("1")
			tt.change(f)
			err := newList(dir, parse(t, text)).Of(f, always).Check()
			if (err == nil) != (tt.says == "") || err != nil && (!strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "1234")) {
				t.Errorf("got %v, want %q", err, tt.says)
			}
		})
	}
}

// Before its first use, a PIN of the configuration needs one token, in its home.
func TestFirstUse(t *testing.T) {
	for name, tt := range map[string]struct {
		uri    string
		change func(*fake)
		want   bool
	}{
		"one token":   {"pkcs11:token=card?pin-value=1234", func(*fake) {}, true},
		"no token":    {"pkcs11:?pin-value=1234", func(*fake) {}, false},
		"two tokens":  {"pkcs11:token=card?pin-value=1234", func(f *fake) { f.matching = 2 }, false},
		"for a guest": {"pkcs11:token=card?pin-value=1234", func(f *fake) { f.guest = true }, false},
	} {
		f := newFake("1")
		tt.change(f)
		if got := read(t, newList("", parse(t, tt.uri)).Of(f, always)); (got != "") != tt.want {
			t.Errorf("%s: the token gets %q", name, got)
		}
	}
}

func TestAddRefuses(t *testing.T) {
	one, two, guest, several := newFake("1"), newFake("2"), newFake("1"), newFake("1")
	guest.guest, several.matching = true, 2
	for name, tt := range map[string]struct {
		uri    string
		tokens []Token
	}{
		"a command":         {"pkcs11:token=card?pin-source=|/bin/true", []Token{one}},
		"a credential":      {"pkcs11:token=card?pin-source=credential:card", []Token{one}},
		"a URI of any card": {"pkcs11:?pin-value=1234", []Token{one}},
		"keys of two cards": {"pkcs11:token=card?pin-value=1234", []Token{one, two}},
		"two cards":         {"pkcs11:token=card?pin-value=1234", []Token{several}},
		"a guest":           {"pkcs11:token=card?pin-value=1234", []Token{guest}},
	} {
		l := newList("")
		if err := l.Add(parse(t, tt.uri), tt.tokens); err == nil || len(l.added) > 0 || strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: %d sources, %v", name, len(l.added), err)
		}
	}
}

// The PIN of a client is for the card that was there.
func TestAddedForOneCard(t *testing.T) {
	f, l := newFake("1"), newList("")
	if err := l.Add(parse(t, "pkcs11:token=card?pin-value=1234"), []Token{f}); err != nil {
		t.Fatal(err)
	}
	l.want(t, f, "1234")
	f.shows = showing(2)
	l.want(t, f, "")
}

// A client gets no login by a file of the configuration.
func TestConfiguredFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pin")
	link := file + ".link"
	if err := errors.Join(os.WriteFile(file, []byte("1234\n"), 0o600), os.Symlink(file, link)); err != nil {
		t.Fatal(err)
	}
	f := newFake("1")
	l := newList("")
	if err := l.Add(parse(t, "pkcs11:token=card?pin-source="+link), []Token{f}); err != nil {
		t.Fatal(err)
	}
	l.want(t, f, "1234")
	l.Set([]*pkcs11uri.URI{parse(t, "pkcs11:token=other?pin-source="+file)})
	if got := read(t, l.Of(f, func(u *pkcs11uri.URI) bool { return *u.Token == "card" })); got != "" {
		t.Errorf("the token gets %q", got)
	}
}
