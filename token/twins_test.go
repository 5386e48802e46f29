package token_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

const twinPIN = "W2951-7"

// twinCards returns two cards that show the same texts, like cards without CHUID. Their keys and
// PINs differ.
func twinCards(t *testing.T) (a, b *pivcard.Card) {
	t.Helper()
	keys := map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}
	a = tokentest.NewCard(t, pivcard.Options{Name: "piv", Serial: 7, PIN: pivPIN, Keys: keys})
	b = tokentest.NewCard(t, pivcard.Options{Name: "piv", Serial: 7, PIN: twinPIN, Keys: keys})
	return a, b
}

// twinStore returns a pcscd, and a function that opens a Store that keeps PINs.
func twinStore(t *testing.T, person *tokentest.Person, module string, readers ...string) (*tokentest.PCSCD, func() *token.Store) {
	t.Helper()
	path := tokentest.Module(t, module)
	p := tokentest.StartPCSCD(t, readers...)
	return p, func() *token.Store {
		return tokentest.Store(t, token.Options{
			Modules: []token.ModuleSpec{realSpec("piv", path, p.Env()...)}, Command: self, PINs: person,
			Policy: func(*token.Key) token.Policy { return token.Policy{Remember: true} },
		}, pivPIN, twinPIN)
	}
}

// A kept PIN is only for the card that it was given for. Another card of the same name takes the
// place of that card, in the same reader or in another reader. The agent does not try the PIN on
// the other card, with the same module process or with a new process.
func TestKeptPINIsOfTheCard(t *testing.T) {
	tokentest.Parallel(t)
	for _, module := range []string{"opensc-pkcs11.so", "libykcs11.so*"} {
		for _, tt := range []struct {
			name   string
			change func(t *testing.T, p *tokentest.PCSCD, b *pivcard.Card, s *token.Store)
		}{
			{"OtherReader", func(_ *testing.T, p *tokentest.PCSCD, b *pivcard.Card, _ *token.Store) {
				p.Insert(1, b)
				p.Remove(0)
			}},
			{"SameReader", func(_ *testing.T, p *tokentest.PCSCD, b *pivcard.Card, _ *token.Store) {
				p.Remove(0)
				p.Insert(0, b)
			}},
			{"SameReaderNewProcess", func(t *testing.T, p *tokentest.PCSCD, b *pivcard.Card, s *token.Store) {
				// The stopped process does not notice the change.
				tokentest.Until(t, "a process is stopped", func() bool {
					pid := s.Modules()[0].PID // 0: a process is about to start
					return pid != 0 && unix.Kill(pid, unix.SIGSTOP) == nil
				})
				p.Remove(0)
				p.Insert(0, b)
				kill(t, s)
			}},
		} {
			t.Run(module[:3]+tt.name, func(t *testing.T) {
				person := &tokentest.Person{PINs: []string{pivPIN}}
				a, b := twinCards(t)
				readers := []string{"Yubico Virtual"}
				if module != "opensc-pkcs11.so" {
					keys := map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}
					a = tokentest.NewCard(t, pivcard.Options{Name: "piv", Serial: 7, PIN: pivPIN, Keys: keys, YubiKey: true})
					b = tokentest.NewCard(t, pivcard.Options{Name: "piv", Serial: 7, PIN: twinPIN, Keys: keys, YubiKey: true})
				}
				p, open := twinStore(t, person, module, readers...)
				p.Insert(0, a)
				s := open()
				k := firstFit(t, s)
				noError(t, tokentest.Sign(t.Context(), k))
				want(t, "PINs", a.Counts().Right, 1)
				idle(t, s)
				tt.change(t, p, b, s)
				err := tokentest.Sign(t.Context(), k) // of the card that has gone
				if !errors.Is(err, token.ErrAbsent) && !errors.Is(err, pin.ErrCancelled) {
					t.Logf("a signature of the card that has gone: %v", err)
				}
				noError(t, s.Rescan(t.Context()))
				k = firstFit(t, s)
				if err := tokentest.Sign(t.Context(), k); !errors.Is(err, pin.ErrCancelled) {
					t.Errorf("a signature of the other card: %v", err)
				}
				want(t, "wrong PINs", a.Counts().Wrong+b.Counts().Wrong, 0)
				want(t, "right PINs of the other card", b.Counts().Right, 0)
				person.PINs = []string{twinPIN}
				noError(t, tokentest.Sign(t.Context(), k))
				want(t, "right PINs of the other card", b.Counts().Right, 1)
			})
		}
	}
}

// firstFit returns a key that is fit for logins.
func firstFit(t *testing.T, s *token.Store) *token.Key {
	t.Helper()
	for _, k := range s.Keys() {
		if k.Unfit() == "" {
			return k
		}
	}
	t.Fatalf("no key is fit: %v", s.Keys())
	return nil
}

// kill kills the module process, and waits for the next process.
func kill(t *testing.T, s *token.Store) {
	t.Helper()
	pid := s.Modules()[0].PID
	noError(t, unix.Kill(pid, unix.SIGKILL))
	tokentest.Until(t, "the module process starts again", func() bool {
		m := s.Modules()[0]
		return m.Running && m.PID != pid
	})
}

// Two cards of one name are present at the same time. Each card has its own keys and PIN, and the
// prompts name the reader. When one card comes or goes, the other card keeps its login.
func TestTwinCards(t *testing.T) {
	tokentest.Parallel(t)
	reader := func(n int) string { return fmt.Sprintf("Virtual PCD 00 %02d", n) }
	person := &tokentest.Person{ByReader: map[string]string{reader(0): pivPIN, reader(1): twinPIN}, Always: pivPIN}
	p, open := twinStore(t, person, "opensc-pkcs11.so")
	a, b := twinCards(t)
	p.Insert(0, a)
	s := open()
	first := firstFit(t, s)
	noError(t, tokentest.Sign(t.Context(), first)) // as the only card
	p.Insert(1, b)
	noError(t, s.Rescan(t.Context()))
	tokentest.Keys(t, s, 2)
	want(t, "tokens", len(s.Modules()[0].Tokens), 2)
	for i, st := range s.Modules()[0].Tokens {
		want(t, "reader", st.Reader, reader(i))
		want(t, "logged in", st.LoggedIn, i == 0)
	}
	second := s.Modules()[0].Tokens[1].Keys[0]
	noError(t, tokentest.Sign(t.Context(), second))
	noError(t, tokentest.Sign(t.Context(), first))
	want(t, "questions", person.Prompts(), 2)
	idle(t, s)
	p.Remove(0)
	if err := tokentest.Sign(t.Context(), first); !errors.Is(err, token.ErrAbsent) {
		t.Errorf("a signature of the card that has gone: %v", err)
	}
	noError(t, tokentest.Sign(t.Context(), second))
	want(t, "questions", person.Prompts(), 2)
	p.Insert(0, a)
	noError(t, s.Rescan(t.Context()))
	noError(t, tokentest.Sign(t.Context(), first))
	noError(t, tokentest.Sign(t.Context(), second))
	want(t, "questions", person.Prompts(), 3)
	want(t, "wrong PINs", a.Counts().Wrong+b.Counts().Wrong, 0)
	p.Remove(1) // otherwise open files would count as left open
}

// A PIN of the configuration is only for the first card that it was used for.
func TestConfiguredPINIsOfTheCard(t *testing.T) {
	tokentest.Parallel(t)
	path := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t)
	a, b := twinCards(t)
	p.Insert(0, a)
	source, err := pkcs11uri.Parse("pkcs11:token=piv?pin-value=" + pivPIN)
	noError(t, err)
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("piv", path, p.Env()...)}, Command: self, StateDir: tokentest.TempDir(t),
		Sources: []*pkcs11uri.URI{source},
	}, pivPIN)
	noError(t, tokentest.Sign(t.Context(), firstFit(t, s)))
	idle(t, s)
	p.Remove(0)
	p.Insert(0, b)
	noError(t, s.Rescan(t.Context()))
	if err := tokentest.Sign(t.Context(), firstFit(t, s)); err == nil {
		t.Error("the other card signs")
	}
	want(t, "wrong PINs", b.Counts().Wrong, 0)
	p.Remove(0)
	p.Insert(0, a)
	noError(t, s.Rescan(t.Context()))
	noError(t, tokentest.Sign(t.Context(), firstFit(t, s)))
	want(t, "right PINs", a.Counts().Right, 2)
}
