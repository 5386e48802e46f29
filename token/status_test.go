package token_test

import (
	"errors"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/retention"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
)

// tokenStatus returns the state of the token with a label.
func tokenStatus(t *testing.T, s *token.Store, label string) token.TokenStatus {
	t.Helper()
	for _, m := range s.Modules() {
		for _, list := range [][]token.TokenStatus{m.Tokens, m.Away} {
			for _, st := range list {
				if st.ID.Label == label {
					return st
				}
			}
		}
	}
	t.Fatalf("there is no token %q", label)
	return token.TokenStatus{}
}

// within reports whether a time is between two other times.
func within(at, from, to time.Time) bool { return !at.Before(from) && !at.After(to) }

func TestLoginState(t *testing.T) {
	release := make(chan struct{})
	p := &tokentest.Person{Always: rightPIN, Wait: release}
	b := newBench(t, p, func(_ *bench, o *token.Options) {
		o.Policy = func(*token.Key) token.Policy {
			return token.Policy{Retention: retention.Rule{Idle: time.Hour, Max: 90 * time.Minute}, Remember: true}
		}
	})
	label := b.card.ID().Label
	st := tokenStatus(t, b.store, label)
	want(t, "at first", [4]bool{st.LoggedIn, st.PINKept, st.LoginUnderWay, st.PromptOpen}, [4]bool{})
	want(t, "times at first", [3]bool{st.LoggedInSince.IsZero(), st.LoginEnds.IsZero(), st.LastUse.IsZero()}, [3]bool{true, true, true})

	before := time.Now()
	done := make(chan error, 1)
	go func() { done <- b.sign() }()
	p.Until(t, func() bool { return p.Prompts() == 1 })
	st = tokenStatus(t, b.store, label)
	want(t, "while a person is asked", [4]bool{st.LoggedIn, st.PINKept, st.LoginUnderWay, st.PromptOpen}, [4]bool{false, false, true, true})
	close(release)
	noError(t, <-done)
	after := time.Now()

	st = tokenStatus(t, b.store, label)
	want(t, "logged in", [4]bool{st.LoggedIn, st.PINKept, st.LoginUnderWay, st.PromptOpen}, [4]bool{true, true, false, false})
	want(t, "signatures", st.Signatures, uint64(1))
	if !within(st.LoggedInSince, before, after) || !within(st.LastUse, before, after) || !within(st.LoginEnds, before.Add(time.Hour), after.Add(time.Hour)) {
		t.Errorf("logged in since %v, used at %v, until %v", st.LoggedInSince, st.LastUse, st.LoginEnds)
	}
	noError(t, b.sign())
	noError(t, b.store.Rescan(t.Context()))
	since := st.LoggedInSince
	st = tokenStatus(t, b.store, label)
	want(t, "since when, after the second signature", st.LoggedInSince, since)
	want(t, "signatures", st.Signatures, uint64(2))
	n, last := b.key(1).Signatures()
	want(t, "signatures of the key", n, uint64(2))
	want(t, "the last one", last.Equal(st.LastUse), true)

	sel := selection.New(uri(t, "pkcs11:token="+label))
	noError(t, b.store.Logout(t.Context(), sel))
	st = tokenStatus(t, b.store, label)
	want(t, "logged out", [3]bool{st.LoggedIn, st.PINKept, b.card.LoggedIn()}, [3]bool{})
	want(t, "times then", [2]bool{st.LoggedInSince.IsZero(), st.LoginEnds.IsZero()}, [2]bool{true, true})
	want(t, "signatures", st.Signatures, uint64(2))
}

// A login that LoginAsk made ends in the same way as a login for a signature.
func TestLoginAskEnds(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, func(_ *bench, o *token.Options) {
		o.Policy = func(*token.Key) token.Policy {
			return token.Policy{Retention: retention.Rule{Idle: 10 * time.Millisecond, Max: time.Hour}}
		}
	})
	noError(t, b.store.LoginAsk(t.Context(), b.store.Keys()))
	want(t, "prompts", p.Prompts(), 1)
	tokentest.Until(t, "the token is logged out", func() bool { return !b.card.LoggedIn() })
	want(t, "signatures", b.card.Signed(), 0)
}

// Logout logs out of one token, and not of another token.
func TestLogout(t *testing.T) {
	f := tokentest.NewFake(t)
	one, two := f.AddToken("one", rightPIN), f.AddToken("two", rightPIN)
	one.AddKey(tokentest.P256, 1, "a", nil)
	two.AddKey(tokentest.P256, 2, "b", nil)
	p := &tokentest.Person{Always: rightPIN}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: p}, rightPIN)
	all := func() [2]bool { return [2]bool{one.LoggedIn(), two.LoggedIn()} }
	keys := tokentest.Keys(t, s, 2)
	noError(t, s.LoginAsk(t.Context(), keys))
	want(t, "logged in", all(), [2]bool{true, true})
	want(t, "prompts", p.Prompts(), 2)
	want(t, "signatures", one.Signed()+two.Signed(), 0)
	noError(t, s.LoginAsk(t.Context(), keys))
	want(t, "prompts", p.Prompts(), 2)

	for _, text := range []string{"pkcs11:token=one", "pkcs11:token=one;id=%01", "pkcs11:id=%01"} {
		noError(t, s.LoginAsk(t.Context(), keys))
		noError(t, s.Logout(t.Context(), selection.New(uri(t, text))))
		want(t, "logged in after "+text, all(), [2]bool{false, true})
	}
	for _, text := range []string{"pkcs11:token=three", "pkcs11:token=two;id=%01"} {
		if err := s.Logout(t.Context(), selection.New(uri(t, text))); !errors.Is(err, token.ErrNoMatch) {
			t.Errorf("%s: %v", text, err)
		}
	}
	want(t, "logged in after others", all(), [2]bool{false, true})
	noError(t, s.Logout(t.Context(), selection.New(uri(t, "pkcs11:"))))
	want(t, "logged in at the end", all(), [2]bool{false, false})
}
