package token_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/token"
	"p11-agent/token/homes"
	"p11-agent/token/known"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// A claim has two modules: the first has a token, and the second claims to have the token too.
type claim struct {
	t              *testing.T
	dir            string // of the list of known keys
	good, bad      *tokentest.Fake
	card, imposter *tokentest.FakeToken
	person         *tokentest.Person
	opts           token.Options // without modules
}

// newClaim makes the two modules. The agent has seen the token through "good" before, and the
// list of known keys says so.
func newClaim(t *testing.T, p *tokentest.Person) *claim {
	t.Helper()
	c := &claim{t: t, dir: tokentest.TempDir(t), good: tokentest.NewFake(t), bad: tokentest.NewFake(t), person: p}
	c.card = c.good.AddToken("card", rightPIN)
	c.card.AddKey(tokentest.P256, 1, "one", nil)
	c.imposter = c.bad.AddTwin(c.card)
	c.imposter.AddKey(tokentest.P256, 1, "one", nil)
	c.opts = token.Options{Command: self, PINs: p, StateDir: c.dir, Known: token.KnownKept}
	s := c.open("good")
	tokentest.Keys(t, s, 1)
	untilWritten(t, c.dir, `"home": true`, true)
	noError(t, s.Close())
	return c
}

// open opens a Store with these modules, in this order.
func (c *claim) open(names ...string) *token.Store {
	c.t.Helper()
	opts := c.opts
	for _, name := range names {
		f := c.good
		if name == "bad" {
			f = c.bad
		}
		spec := fakeSpec(f)
		spec.Name = name
		opts.Modules = append(opts.Modules, spec)
	}
	s := tokentest.Store(c.t, opts, rightPIN)
	tokentest.Wait(c.t, s.Settled())
	return s
}

// stop ends the module "good", and prevents a new start.
func (c *claim) stop(s *token.Store) {
	c.t.Helper()
	c.good.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeHello {
			p.Fail(r, &wire.Error{Reason: wire.ReasonLoad, Text: "it is broken"})
		}
		return r.Type == wire.TypeHello
	})
	for _, p := range c.good.Processes() {
		p.Kill()
	}
	tokentest.Until(c.t, "the token is used through the other module", func() bool {
		keys := s.Keys()
		return len(keys) == 1 && keys[0].Module() == "bad"
	})
}

// only returns the only key. It fails the test if another module shows the key.
func only(t *testing.T, s *token.Store, module string) *token.Key {
	t.Helper()
	keys := s.Keys()
	if len(keys) != 1 || keys[0].Module() != module {
		t.Fatalf("keys are %v, want one of module %s", keys, module)
	}
	return keys[0]
}

// tried counts the PINs that reached a token.
func tried(f *tokentest.FakeToken) int { return f.Right() + f.Wrong() }

// A module that comes first in the order does not take over a token of another module.
func TestAttack05FirstInOrder(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	c := newClaim(t, p)
	s := c.open("bad", "good")
	noError(t, tokentest.Sign(t.Context(), only(t, s, "good")))
	want(t, "PINs that the imposter got", tried(c.imposter), 0)
	want(t, "prompts", p.Prompts(), 1)
	asked := p.Asked()[0]
	want(t, "module in the prompt", asked.Module, "good")
	want(t, "home in the prompt", asked.Home, "")
	want(t, "others in the prompt", strings.Join(asked.Others, " "), "bad")
}

// A kept PIN stays with its module when the module stops. Another module gets a PIN only from a
// person at a prompt that names this module, or if the client names it. That does not move the
// home.
func TestAttack05KeptPIN(t *testing.T) {
	p := &tokentest.Person{PINs: []string{rightPIN}}
	c := newClaim(t, p)
	c.opts.Policy = func(*token.Key) token.Policy { return token.Policy{Remember: true, Reuse: true} }
	s := c.open("good", "bad")
	noError(t, tokentest.Sign(t.Context(), only(t, s, "good")))
	c.stop(s)
	k := only(t, s, "bad")
	if err := tokentest.Sign(t.Context(), k); !errors.Is(err, pin.ErrCancelled) {
		t.Errorf("got %v, want a prompt that the person declines", err)
	}
	asked := p.Asked()
	want(t, "prompts", len(asked), 2)
	want(t, "module in the prompt", asked[1].Module, "bad")
	want(t, "home in the prompt", asked[1].Home, "good")
	_, given := s.Login(t.Context(), nil, []*token.Key{k}, tokentest.Secret(t, rightPIN))
	for what, err := range map[string]error{
		"a PIN given in advance":        given,
		"a URI that a client has added": s.AddSource(parse(t, "pkcs11:token=card?pin-value="+rightPIN), []*token.Key{k}),
	} {
		if _, ok := errors.AsType[*homes.GuestError](err); !ok {
			t.Errorf("%s: got %v", what, err)
		}
	}
	want(t, "PINs that the imposter got", tried(c.imposter), 0)

	// A client that names the module may give the PIN to it.
	sel, err := selection.Parse([]byte("pkcs11:token=card?module-name=bad"), nil)
	noError(t, err)
	_, err = s.Login(t.Context(), sel, []*token.Key{k}, tokentest.Secret(t, rightPIN))
	noError(t, err)
	want(t, "PINs that the named module got", tried(c.imposter), 1)
	want(t, "home", s.Modules()[1].Tokens[0].Home, "good")
}

// A token refuses a PIN through one module. The agent does not try the PIN through another
// module. The other module cannot make the agent forget the refusal.
func TestAttack05RefusedPINIsKnown(t *testing.T) {
	p := &tokentest.Person{PINs: []string{"wrong-1", "", "wrong-1", ""}}
	c := newClaim(t, p)
	s := c.open("good", "bad")
	if err := tokentest.Sign(t.Context(), only(t, s, "good")); err == nil {
		t.Fatal("signed")
	}
	want(t, "wrong PINs", c.card.Wrong(), 1)
	c.stop(s)
	c.imposter.SetTries(2, 3)
	if err := tokentest.Sign(t.Context(), only(t, s, "bad")); err == nil {
		t.Fatal("signed")
	}
	want(t, "PINs tried through the other", tried(c.imposter), 0)
	if told := strings.Join(p.Problems(), "\n"); !strings.Contains(told, "was refused a moment ago") {
		t.Errorf("the person was told %q", told)
	}
}

// A person moves the home by giving the right PIN to the only module that is left. The
// configuration moves the home at once.
func TestHomeMoves(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	c := newClaim(t, p)
	s := c.open("bad")
	want(t, "home", s.Modules()[0].Tokens[0].Home, "good")
	noError(t, s.Close())
	s = c.open("bad", "good")
	only(t, s, "good") // a look alone does not move the home
	noError(t, s.Close())

	s = c.open("bad")
	noError(t, tokentest.Sign(t.Context(), only(t, s, "bad")))
	want(t, "home in the prompt", p.Asked()[0].Home, "good")
	tokentest.Until(t, "the list tells of the new home", func() bool {
		b, err := os.ReadFile(filepath.Join(c.dir, known.File))
		return err == nil && strings.Count(string(b), `"home": true`) == 1 && strings.Count(string(b), `"module":`) == 2 &&
			strings.Index(string(b), `"home": true`) < strings.Index(string(b), `"module": "good"`)
	})
	noError(t, s.Close())
	s = c.open("good", "bad")
	only(t, s, "bad")

	named := parse(t, "pkcs11:token=card?module-name=good")
	s.SetHomes([]*pkcs11uri.URI{parse(t, "pkcs11:?module-name=good"), named})
	only(t, s, "good")
	s.SetHomes([]*pkcs11uri.URI{parse(t, "pkcs11:?module-name=good")}) // the URI names no token
	only(t, s, "bad")
}

// A list of version 1 has no homes. It still says through which module the agent used a token.
func TestKnownVersion1(t *testing.T) {
	c := newClaim(t, &tokentest.Person{Always: rightPIN})
	file := filepath.Join(c.dir, known.File)
	b, err := os.ReadFile(file)
	noError(t, err)
	old := strings.NewReplacer(`"version": 2`, `"version": 1`, "   \"home\": true,\n", "").Replace(string(b))
	if old == string(b) || strings.Contains(old, "home") {
		t.Fatalf("not a list of version 1: %s", old)
	}
	noError(t, os.WriteFile(file, []byte(old), 0o600))
	only(t, c.open("bad", "good"), "good")
}

// A client starts a module. The module does not take the name of another module whose file has
// the same name.
func TestAttack05SameFileName(t *testing.T) {
	dir := tokentest.TempDir(t)
	library := tokentest.BuildBadModule(t)
	opts := token.Options{Command: self, PINs: new(tokentest.Person), StateDir: dir, Known: token.KnownKept}
	first := opts
	first.Modules = []token.ModuleSpec{realSpec(filepath.Base(library), library)}
	s := tokentest.Store(t, first)
	tokentest.Until(t, "the token is there", func() bool { return has(s, "bad") })
	untilWritten(t, dir, `"home": true`, true)
	noError(t, s.Close())

	exe, err := os.Executable()
	noError(t, err)
	opts.Command = []string{"/usr/bin/env", realModule + "=1", exe} // the configuration has no environment for a module that a client starts
	opts.Sources = []*pkcs11uri.URI{parse(t, "pkcs11:token=bad?pin-value=1234")}
	named := parse(t, "pkcs11:token=bad?module-name="+filepath.Base(library)+"&pin-value=1234")
	s = tokentest.Store(t, opts)
	sel, err := selection.Parse([]byte(library), selection.AllowList{"*"})
	noError(t, err)
	keys, err := s.Select(t.Context(), sel)
	noError(t, err)
	want(t, "home", s.Modules()[0].Tokens[0].Home, filepath.Base(library))
	for _, u := range []*pkcs11uri.URI{opts.Sources[0], named} {
		s.SetSources([]*pkcs11uri.URI{u})
		s.SetHomes([]*pkcs11uri.URI{u})
		if err := tokentest.Sign(t.Context(), keys[0]); err == nil || !strings.Contains(err.Error(), "belongs to module") {
			t.Errorf("%v: got %v", u, err)
		}
	}
}
