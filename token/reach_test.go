package token_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
)

// The agent parses the path that a remote client names, and does not look the path up. So the
// answer is the same with and without a file at the path.
func TestAttack16RemoteProvider(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "module.so")
	noError(t, os.WriteFile(there, nil, 0o700))
	allow := selection.AllowList{"*"}
	if _, err := selection.Parse([]byte(there), allow); err != nil {
		t.Fatal(err) // the path is right for a client of this machine
	}
	for _, paths := range [][2]string{
		{there, filepath.Join(dir, "missing.so")},
		{dir, "relative.so"},
		{"pkcs11:token=a?module-path=" + there, "pkcs11:token=a?module-path=" + filepath.Join(dir, "missing.so")},
		{"pkcs11:token=a?pin-source=" + there, "pkcs11:token=a?pin-source=" + filepath.Join(dir, "missing.so")},
		{"pkcs11:token=a?pin-value=1234", "pkcs11:token=b?pin-value=1"},
	} {
		var said []string
		for _, text := range paths {
			s, err := selection.ParseRemote([]byte(text))
			if err == nil {
				t.Fatalf("%q is taken: %v", text, s)
			}
			said = append(said, err.Error())
			if strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "1234") {
				t.Errorf("%q is quoted: %v", text, err)
			}
		}
		if said[0] != said[1] {
			t.Errorf("the answers differ: %q", said)
		}
	}
	for _, text := range []string{"pkcs11:", "pkcs11:token=a;id=%01", "PKCS11:token=a?module-name=m"} {
		if _, err := selection.ParseRemote([]byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := selection.ParseRemote([]byte("pkcs11:colour=red")); err == nil {
		t.Error("an unknown attribute is taken")
	}
}

// SelectOf treats keys that a client may not reach as absent.
func TestSelectOf(t *testing.T) {
	f := tokentest.NewFake(t)
	for _, name := range []string{"one", "two"} {
		f.AddToken(name, rightPIN).AddKey(tokentest.P256, 1, "key", nil)
	}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self}, rightPIN)
	tokentest.Keys(t, s, 2)
	one := func(k *token.Key) bool { return k.Token().Label == "one" }
	keys, err := s.SelectOf(t.Context(), selection.New(uri(t, "pkcs11:")), one)
	noError(t, err)
	if len(keys) != 1 || !one(keys[0]) {
		t.Errorf("selected %v", keys)
	}
	for _, text := range []string{"pkcs11:token=two", "pkcs11:token=three"} {
		if _, err := s.SelectOf(t.Context(), selection.New(uri(t, text)), one); !errors.Is(err, token.ErrNoMatch) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// LogoutOf logs out of the chosen tokens, and forgets their PINs.
func TestLogoutOf(t *testing.T) {
	f := tokentest.NewFake(t)
	one, two := f.AddToken("one", rightPIN), f.AddToken("two", rightPIN)
	one.AddKey(tokentest.P256, 1, "a", nil)
	two.AddKey(tokentest.P256, 2, "b", nil)
	p := &tokentest.Person{Always: rightPIN}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: p}, rightPIN)
	noError(t, s.LoginAsk(t.Context(), tokentest.Keys(t, s, 2)))
	noError(t, s.LogoutOf(t.Context(), func(keys []*token.Key) bool {
		return slices.ContainsFunc(keys, func(k *token.Key) bool { return k.Token().Label == "one" })
	}))
	want(t, "logged in", [2]bool{one.LoggedIn(), two.LoggedIn()}, [2]bool{false, true})
}

// AsksPIN reports before a signature whether the signature would ask a person for the PIN.
func TestAsksPIN(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	k := b.key(1)
	want(t, "asks before the login", k.AsksPIN(), true)
	wrong, err := secret.From([]byte("0000"))
	noError(t, err)
	defer wrong.Wipe()
	if _, err := b.store.Login(t.Context(), nil, []*token.Key{k}, wrong); err == nil {
		t.Error("a wrong PIN logs in")
	}
	want(t, "asks after a wrong PIN", k.AsksPIN(), true)
	b.mustSign()
	want(t, "asks after the login", k.AsksPIN(), false)
	noError(t, b.store.LogoutAll(t.Context()))
	want(t, "asks after the logout", k.AsksPIN(), true)
	noError(t, b.store.AddSource(uri(t, k.URI()+"?pin-value="+rightPIN), []*token.Key{k}))
	want(t, "asks with a client's PIN", k.AsksPIN(), false)
	b.store.SetSources([]*pkcs11uri.URI{uri(t, k.URI()+"?pin-value="+rightPIN)})
	want(t, "asks with a configured PIN", k.AsksPIN(), false)
}

// Login reports a PIN as taken only if the token has taken it. If the token is logged in, the
// agent logs the token out first, and then tries the PIN.
func TestLoginTellsIfTokenTookPIN(t *testing.T) {
	b := newBench(t, nil, nil)
	for _, tt := range []struct {
		rightPIN string
		taken    bool
	}{{"0000", false}, {rightPIN, true}, {rightPIN, true}, {"0000", false}, {rightPIN, true}} {
		taken, err := b.store.Login(t.Context(), nil, []*token.Key{b.key(1)}, tokentest.Secret(t, tt.rightPIN))
		want(t, "taken "+tt.rightPIN, taken, tt.taken)
		want(t, "refused", err != nil, !tt.taken)
		want(t, "logged in", b.card.LoggedIn(), tt.taken)
	}
}
