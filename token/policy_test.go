package token_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/retention"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// newPolicyBench makes a bench with two keys of the same Policy. Key 1 wants its PIN once. Key 2
// wants its PIN for each signature.
func newPolicyBench(t *testing.T, p *tokentest.Person, policy token.Policy) *bench {
	t.Helper()
	return newBench(t, p, func(b *bench, opts *token.Options) {
		b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Always = true })
		opts.Policy = func(*token.Key) token.Policy { return policy }
	})
}

func (b *bench) mustSignWith(id byte) {
	b.t.Helper()
	if err := tokentest.Sign(b.t.Context(), b.key(id)); err != nil {
		b.t.Fatal(err)
	}
}

// A kept PIN replaces a prompt only after a login was lost.
func TestRemember(t *testing.T) {
	tests := []struct {
		name    string
		change  func(t *testing.T, b *bench)
		prompts int // for the next signature
	}{
		{"logged out by another program", func(_ *testing.T, b *bench) { b.card.LogOut(false) }, 0},
		{"logged out, and the module does not know", func(_ *testing.T, b *bench) { b.card.LogOut(true) }, 0},
		{"module process killed", func(_ *testing.T, b *bench) { b.fake.Processes()[0].Kill() }, 0},
		{"card out and back", func(t *testing.T, b *bench) {
			b.card.Remove()
			tokentest.Keys(t, b.store, 0)
			b.card.Insert()
			tokentest.Keys(t, b.store, 2)
		}, 1},
		{"card out and back, noticed by a signature", func(_ *testing.T, b *bench) {
			b.fake.Quietly(b.card.Remove)
			if err := b.sign(); !errors.Is(err, token.ErrAbsent) {
				b.t.Errorf("while it is out: %v", err)
			}
			b.card.Insert()
		}, 1},
		{"everything forgotten", func(t *testing.T, b *bench) { noError(t, b.store.LogoutAll(t.Context())) }, 1},
		{"not configured any more", func(_ *testing.T, b *bench) {
			b.store.SetPolicy(nil)
			b.card.LogOut(false)
		}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newPolicyBench(t, p, token.Policy{Remember: true})
			b.mustSign()
			for range 3 {
				before := p.Prompts()
				tt.change(t, b)
				tokentest.Keys(t, b.store, 2)
				b.mustSign()
				want(t, "prompts", p.Prompts()-before, tt.prompts)
			}
			want(t, "wrong PINs", b.card.Wrong(), 0)
		})
	}
}

// Another program changes the PIN. The kept PIN costs one try, for any number of waiting
// requests. If a person types the old PIN again, that costs no try.
func TestRememberedPINIsOutOfDate(t *testing.T) {
	const other = "Other-1290"
	p := &tokentest.Person{PINs: []string{rightPIN, rightPIN, other}}
	b := newPolicyBench(t, p, token.Policy{Remember: true})
	b.mustSign()
	b.card.SetPIN(other)
	b.card.LogOut(false)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if err := tokentest.Sign(t.Context(), b.key(1)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	want(t, "wrong PINs", b.card.Wrong(), 1)
	want(t, "right PINs", b.card.Right(), 2)
	want(t, "prompts", p.Prompts(), 3) // the first, the old PIN again, the new PIN
	problems := p.Problems()
	want(t, "said of the one that was kept", problems[1], "The token refused the kept PIN.")
	want(t, "said of the old one", problems[2], "This PIN was refused a moment ago: it was not tried again.")
}

// A person types the same wrong PIN again and again. That costs one try, until the flags of
// the token change.
func TestRefusedPINIsNotTriedAgain(t *testing.T) {
	p := &tokentest.Person{Always: "wrong-1"}
	b := newBench(t, p, nil)
	pinError(t, b.sign(), true, pin.TriesLow)
	for range 5 {
		pinError(t, b.sign(), false, pin.TriesLow)
	}
	given, err := secret.From([]byte("wrong-1")) // as ssh-add -s gives a PIN
	noError(t, err)
	defer given.Wipe()
	_, err = b.store.Login(t.Context(), nil, []*token.Key{b.key(1)}, given)
	pinError(t, err, false, pin.TriesLow)
	want(t, "wrong PINs", b.card.Wrong(), 1)

	// Another program makes this text the PIN. The flags of the token show that.
	b.card.SetPIN("wrong-1")
	b.mustSign()
	// The card is out and in again. The person may have had a reason, so the agent tries the PIN.
	noError(t, b.store.LogoutAll(t.Context()))
	b.card.SetPIN(rightPIN)
	pinError(t, b.sign(), true, pin.TriesLow)
	pinError(t, b.sign(), false, pin.TriesLow)
	b.card.Remove()
	tokentest.Keys(t, b.store, 0)
	b.card.Insert()
	tokentest.Keys(t, b.store, 1)
	pinError(t, b.sign(), false, pin.TriesLast) // two tries are used: the agent asks for consent before the third
	want(t, "wrong PINs", b.card.Wrong(), 3)
}

// For a key that wants its PIN each time, the agent asks once for each signature. That includes
// the first signature, which also logs in. If the policy allows the kept PIN, the agent does not
// ask again.
func TestAlwaysAuthenticateByPolicy(t *testing.T) {
	tests := []struct {
		name   string
		policy token.Policy
		after  []int // prompts in all, after each of four signatures
	}{
		{"asks each time", token.Policy{}, []int{1, 2, 3, 4}},
		{"a PIN is kept, for logins", token.Policy{Remember: true}, []int{1, 2, 3, 4}},
		{"a PIN is kept, for this key too", token.Policy{Remember: true, Reuse: true}, []int{1, 1, 1, 1}},
		{"nothing is kept to use", token.Policy{Reuse: true}, []int{1, 2, 3, 4}},
		{"logged out after each", token.Policy{Retention: retention.Rule{Never: true}, Remember: true, Reuse: true}, []int{1, 2, 3, 4}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newPolicyBench(t, p, tt.policy)
			for i, n := range tt.after {
				if i == 2 {
					b.card.LogOut(false) // a new login needs no more prompts
				}
				b.mustSignWith(2)
				want(t, "prompts", p.Prompts(), n)
			}
			want(t, "signatures", b.card.Signed(), 4)
			want(t, "wrong PINs", b.card.Wrong(), 0)
		})
	}
}

// A person declines the prompt for one key. The other keys still sign.
func TestAlwaysAuthenticateDeclined(t *testing.T) {
	p := &tokentest.Person{PINs: []string{rightPIN}}
	b := newPolicyBench(t, p, token.Policy{})
	b.mustSign()
	for range 3 {
		if err := tokentest.Sign(t.Context(), b.key(2)); !errors.Is(err, pin.ErrCancelled) {
			t.Errorf("declined: %v", err)
		}
		b.mustSign()
	}
	want(t, "prompts", p.Prompts(), 4)
	want(t, "right PINs", b.card.Right(), 1)
}

// The configuration overrides the token: it says where a person types the PIN.
func TestPadOverride(t *testing.T) {
	for _, pad := range []bool{false, true} {
		p := &tokentest.Person{Always: rightPIN}
		b := newBench(t, p, func(b *bench, opts *token.Options) {
			b.card.Typed = []byte(rightPIN)
			if !pad {
				b.card.Flags = wire.CKFProtectedAuthenticationPath
			}
			opts.Policy = func(*token.Key) token.Policy { return token.Policy{Pad: &pad} }
		})
		b.mustSign()
		prompts, notices := 1, 0
		if pad {
			prompts, notices = 0, 1
		}
		want(t, "prompts", p.Prompts(), prompts)
		want(t, "notices", p.Notices(), notices)
	}
}

// The agent logs in again with the kept PIN. The second login ends when the first login would
// have ended.
func TestRememberedLoginEnds(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newPolicyBench(t, p, token.Policy{Remember: true, Retention: retention.Rule{Max: 200 * time.Millisecond}})
	b.mustSign()
	for p.Prompts() == 1 { // for ever, if each login began a new time
		b.card.LogOut(false)
		b.mustSign()
	}
	b.card.LogOut(false)
	// The same when no login lasts at the end of the time.
	tokentest.Until(t, "the PIN is forgotten", func() bool {
		before := p.Prompts()
		b.card.LogOut(false)
		b.mustSign()
		return p.Prompts() > before
	})
	if !bytes.Equal(b.key(1).ID(), []byte{1}) {
		t.Error("it is another key")
	}
}

// A kept PIN whose login had no outcome is not tried again: the PIN may be wrong.
func TestRememberedPINOfUnknownFate(t *testing.T) {
	for name, crash := range map[string]bool{"the module crashes": true, "the client hangs up": false} {
		t.Run(name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newPolicyBench(t, p, token.Policy{Remember: true})
			b.mustSign()
			b.card.LogOut(false)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			b.fake.Intercept(func(gone context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
				if r.Type != wire.TypeLogin {
					return false
				}
				if crash {
					proc.Kill()
				} else {
					cancel()
					<-gone.Done()
				}
				return true
			})
			if err := tokentest.Sign(ctx, b.key(1)); err == nil {
				t.Fatal("it was signed")
			}
			want(t, "logins", b.fake.Requests(wire.TypeLogin), 2)
			want(t, "prompts", p.Prompts(), 1)
			b.fake.Intercept(nil)
			b.mustSign()
			want(t, "prompts", p.Prompts(), 2)
		})
	}
}
