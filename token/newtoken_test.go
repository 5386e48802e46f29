package token_test

import (
	"strings"
	"testing"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token"
	"p11-agent/token/keygen"
	"p11-agent/token/tokentest"
)

// A module makes a token. The agent asks for no PIN. The given PIN becomes the PIN of the user.
// Other tokens do not change.
func TestNewToken(t *testing.T) {
	type maker struct {
		module string
		env    []string
		old    func(label string) // makes a token by other means
		// short is a PIN that is too short for the module; empty: the module takes every length.
		short string
	}
	for name, prepare := range map[string]func(t *testing.T) maker{
		"SoftHSM": func(t *testing.T) maker {
			h := tokentest.NewSoftHSM(t)
			return maker{h.Module(), h.Env(), func(label string) { h.AddToken(label, newPIN) }, "123"}
		},
		"TPM": func(t *testing.T) maker {
			m := tokentest.NewTPM(t)
			return maker{m.Module(), m.Env(), func(label string) { m.AddToken(label, newPIN) }, ""}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := prepare(t)
			m.old("old")
			person := &tokentest.Person{}
			s := tokentest.Store(t, token.Options{
				Modules: []token.ModuleSpec{realSpec("maker", m.module, m.env...)}, Command: self, PINs: person,
			}, newPIN)
			<-s.Settled()
			old := s.Modules()[0].Tokens[0].URI
			if m.short != "" {
				_, err := s.NewToken(t.Context(), "maker", "new", secrettest.Of(t, m.short))
				if err == nil || !strings.Contains(err.Error(), "a PIN has ") {
					t.Errorf("a PIN that is too short: %v", err)
				}
				want(t, "tokens after a PIN that is too short", len(s.Modules()[0].Tokens), 1)
			}
			name, err := s.NewToken(t.Context(), "maker", "new", secrettest.Of(t, newPIN))
			mustNot(t, err)
			if name == old || !strings.Contains(name, "token=new") {
				t.Errorf("the new token is %s, and the old one %s", name, old)
			}
			k, err := s.Generate(t.Context(), uri(t, name+";object=login"), keygen.ECDSAP256, secrettest.Of(t, newPIN))
			mustNot(t, err)
			noError(t, tokentest.Sign(t.Context(), k.Key))
			_, err = s.Generate(t.Context(), uri(t, old+";object=login"), keygen.ECDSAP256, secrettest.Of(t, newPIN))
			noError(t, err)
			want(t, "prompts", person.Prompts(), 0)
			_, err = s.NewToken(t.Context(), "nothing", "new", secrettest.Of(t, newPIN))
			if err == nil || !strings.Contains(err.Error(), `no module "nothing"`) {
				t.Errorf("of a module that is not there: %v", err)
			}
		})
	}
}

// A module that fails or crashes while it makes a token costs the request alone. A token
// without a PIN is of no use, and the next token takes another slot.
func TestNewTokenFails(t *testing.T) {
	library := tokentest.BuildBadModule(t)
	b := newBad(t, library, newHSM(t, "bad"), "bad")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{}}, newPIN)
	<-s.Settled()
	for _, command := range []string{"rv=C_InitToken:0x30", "crash=C_InitToken", "rv=C_InitPIN:0x30", "crash=C_InitPIN"} {
		b.command(command)
		if _, err := s.NewToken(t.Context(), "bad", "new", secrettest.Of(t, newPIN)); err == nil {
			t.Errorf("%s: a token was made", command)
		}
	}
	b.command("")
	tokentest.Until(t, "the module is well again", func() bool {
		_ = s.Rescan(t.Context()) // ends the pause
		return status(s, "bad").Err == nil
	})
	name, err := s.NewToken(t.Context(), "bad", "sound", secrettest.Of(t, newPIN))
	mustNot(t, err)
	k, err := s.Generate(t.Context(), uri(t, name), keygen.ECDSAP256, secrettest.Of(t, newPIN))
	mustNot(t, err)
	noError(t, tokentest.Sign(t.Context(), k.Key))
}

// A card has no room for another token.
func TestNewTokenOnACard(t *testing.T) {
	module := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t, "Virtual")
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("opensc", module, p.Env()...)}, Command: self, PINs: &tokentest.Person{},
	}, newPIN)
	_, err := s.NewToken(t.Context(), "opensc", "new", secrettest.Of(t, newPIN))
	if err == nil || !strings.Contains(err.Error(), "no room for a new token") {
		t.Errorf("got %v", err)
	}
}
