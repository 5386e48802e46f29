package token_test

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

var pulls = flag.Int("pulls", 4, "how often TestPIVPulls pulls a card under each module")

// TestPIVPulls pulls a card again and again: while no request uses it, during a signature,
// after a signature, and just before the next signature. Each time, the card signs again,
// with one prompt for its stay. The other card of the module signs all the time, without a
// prompt. The agent gives up no module because its time is over. At the end, no module is in
// back-off.
func TestPIVPulls(t *testing.T) {
	tokentest.Parallel(t)
	for _, m := range pullModules {
		t.Run(m.name, func(t *testing.T) {
			w := newPullWorld(t, m.file, m.label)
			random := rand.New(rand.NewPCG(7, uint64(*pulls)))
			for n := range *pulls {
				p := w.pull(random, n%len(pullKinds), pullGaps[random.IntN(min(*pulls/4+1, len(pullGaps)))])
				if strings.Contains(p.failure, "did not answer within") {
					t.Errorf("%s: it took the module's own time: %s", p.how, p.failure)
				}
			}
			tokentest.Until(t, "the module is well", func() bool {
				st := w.store.Modules()[0]
				return st.Running && st.Err == nil
			})
			first, other := 0, 0
			for _, about := range w.person.Asked() {
				if about.Token.Label == w.key.Token().Label {
					first++
				} else {
					other++
				}
			}
			want(t, "prompts for the card that is pulled", first, 1+*pulls)
			want(t, "prompts for the other card", other, 1)
			want(t, "wrong PINs", w.card.Counts().Wrong+w.card.Counts().Blocked, 0)
		})
	}
}

// The test pulls a card just after a signature, which makes OpenSC hang. It puts in another card
// with the same four texts and another PIN. The agent does not try the kept PIN of the first card
// on the other card.
func TestPIVNextCardInReader(t *testing.T) {
	tokentest.Parallel(t)
	p := tokentest.StartPCSCD(t)
	card := func(rightPIN string) *pivcard.Card {
		return tokentest.NewCard(t, pivcard.Options{Name: "piv", Serial: 7, PIN: rightPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	}
	first, next := card(pivPIN), card("W7351-9")
	p.Insert(0, first)
	person := &tokentest.Person{PINs: []string{pivPIN}} // and then declines
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("opensc", tokentest.Module(t, "opensc-pkcs11.so"), p.Env()...)}, Command: self, PINs: person,
		Policy: func(*token.Key) token.Policy { return token.Policy{Remember: true} },
	}, pivPIN)
	k := tokentest.Key(t, s, "piv", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	p.Slots[0].Remove()
	p.Insert(0, next)
	for range 3 {
		if err := tokentest.Sign(t.Context(), k); err == nil {
			t.Error("a card that is not there has signed")
		}
		noError(t, s.Rescan(t.Context()))
	}
	for _, k := range tokentest.Keys(t, s, 1) {
		if err := tokentest.Sign(t.Context(), k); err == nil {
			t.Error("the next card has signed without its PIN")
		}
	}
	want(t, "PINs that the next card was given", next.Counts().Right+next.Counts().Wrong+next.Counts().Blocked, 0)
	want(t, "PINs that the first card was given", first.Counts().Right, 1)
}

// deaf makes these functions of a module hang. A name comes before the names that begin with it.
const deaf = " hang=C_GetSlotInfo hang=C_GetTokenInfo hang=C_OpenSession hang=C_GetSessionInfo hang=C_CloseSession" +
	" hang=C_FindObjectsInit hang=C_Sign hang=C_SignInit hang=C_Login"

// The test pulls a card during a signature. From then on, the module hangs, also after a new
// start. Its timeout is one hour for each request. The agent still answers the signature while
// the module hangs.
func TestPulledAndModuleHangs(t *testing.T) {
	library := tokentest.BuildBadModule(t)
	pull := func(t *testing.T, b *badModule, env []string, module string, pull func(), wait string) (*token.Store, *token.Key) {
		t.Helper()
		b.spec.Timeout = time.Hour
		b.spec.Env = append(b.spec.Env, append(env, "BADMODULE_WRAP="+module)...)
		b.command(wait)
		s := tokentest.Store(t, token.Options{
			Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: pivPIN},
			Policy: func(*token.Key) token.Policy { return token.Policy{Remember: true} },
		})
		k := tokentest.Key(t, s, b.spec.Name, 1)
		noError(t, tokentest.Sign(t.Context(), k))
		made, starts := b.calls("C_Sign"), b.calls("C_Initialize")
		b.command(wait + " hang=C_Sign")
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		answered := make(chan error, 1)
		go func() { answered <- tokentest.Sign(ctx, k) }()
		tokentest.Until(t, "the module signs", func() bool { return b.calls("C_Sign") > made })
		pull()
		if err := <-answered; !errors.Is(err, token.ErrAbsent) {
			t.Errorf("the signature: %v", err)
		}
		if b.calls("C_Initialize") == starts {
			t.Error("the module was not started anew")
		}
		if has(s, b.spec.Name) {
			t.Error("the key of the card is listed")
		}
		return s, k
	}
	t.Run("pcscd tells", func(t *testing.T) {
		p := tokentest.StartPCSCD(t)
		c := tokentest.NewCard(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}, pivcard.Signature: {}}})
		p.Insert(0, c)
		b := newBadOf(t, library, "piv")
		s, k := pull(t, b, p.Env(), tokentest.Module(t, "opensc-pkcs11.so"), func() {
			b.command("hang=C_GetSlotList" + deaf)
			p.Pull(0)
		}, "")
		// The module works again, and the next process works.
		b.command("")
		p.Insert(0, c)
		noError(t, s.Rescan(t.Context()))
		tokentest.Until(t, "the card signs again", func() bool { return tokentest.Sign(t.Context(), k) == nil })
		want(t, "wrong PINs", c.Counts().Wrong, 0)
	})
	t.Run("the module tells", func(t *testing.T) {
		hsm := tokentest.NewSoftHSM(t)
		hsm.AddToken("soft", pivPIN)
		hsm.GenerateKey("soft", tokentest.P256, "01", "key")
		b := newBadOf(t, library, "soft")
		pull(t, b, hsm.Env(), hsm.Module(), func() { b.command("wait hide" + deaf) }, "wait")
		b.command("wait")
	})
}

// A module reports that a token was taken out, and answers no request after that. The agent
// starts the module again when a caller waits for it.
func TestHangsBehindEvent(t *testing.T) {
	library := tokentest.BuildBadModule(t)
	hsm := newHSM(t, "soft")
	b := newBad(t, library, hsm, "soft")
	b.spec.Timeout = time.Hour
	b.command("wait")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN}})
	k := tokentest.Key(t, s, "soft", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	starts := b.calls("C_Initialize")
	ctx, cancel := context.WithCancel(t.Context())
	made := b.calls("C_Sign")
	b.command("wait hang=C_Sign")
	answered := make(chan error, 1)
	go func() { answered <- tokentest.Sign(ctx, k) }()
	tokentest.Until(t, "the module signs", func() bool { return b.calls("C_Sign") > made })
	b.command("wait hide hang=C_GetSlotList" + deaf)
	tokentest.Until(t, "the module is started anew", func() bool { return b.calls("C_Initialize") > starts })
	cancel()
	<-answered
	b.command("wait")
}

// newBadOf is newBad without the module that it wraps.
func newBadOf(t *testing.T, library, name string) *badModule {
	t.Helper()
	b := &badModule{t: t, dir: tokentest.TempDir(t)}
	b.spec = realSpec(name, library, tokentest.BadModuleEnv("", filepath.Join(b.dir, "commands"), filepath.Join(b.dir, "log"))...)
	return b
}
