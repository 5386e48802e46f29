package token_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/retention"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// newRetainBench makes a bench with keys 1 and 2, each with its own Retention.
func newRetainBench(t *testing.T, p *tokentest.Person, one, two retention.Rule) *bench {
	t.Helper()
	return newBench(t, p, func(b *bench, opts *token.Options) {
		b.card.AddKey(tokentest.P256, 2, "two", nil)
		opts.Policy = func(k *token.Key) token.Policy {
			if bytes.Equal(k.ID(), []byte{1}) {
				return token.Policy{Retention: one}
			}
			return token.Policy{Retention: two}
		}
	})
}

func TestRetainNever(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newRetainBench(t, p, retention.Rule{Never: true}, retention.Rule{})
	for n := 1; n <= 3; n++ {
		b.mustSign()
		want(t, "logged in", b.card.LoggedIn(), false)
		want(t, "prompts", p.Prompts(), n)
	}
	for range 3 {
		if err := tokentest.Sign(t.Context(), b.key(2)); err != nil {
			t.Fatal(err)
		}
		want(t, "logged in", b.card.LoggedIn(), true)
	}
	want(t, "prompts", p.Prompts(), 4)
	// Both keys share the login. So the rule of the first key also ends the login of the second.
	b.mustSign()
	want(t, "logged in", b.card.LoggedIn(), false)
	want(t, "prompts", p.Prompts(), 4)
	b.store.SetPolicy(nil)
	b.mustSign()
	want(t, "logged in", b.card.LoggedIn(), true)
}

func TestRetainForATime(t *testing.T) {
	const short, long = 10 * time.Millisecond, time.Hour
	for name, r := range map[string]retention.Rule{
		"idle":             {Idle: short},
		"max":              {Max: short},
		"idle before max":  {Idle: short, Max: long},
		"max before idle":  {Idle: long, Max: short},
		"another key's":    {},
		"the shorter idle": {Idle: long},
	} {
		t.Run(name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			two := retention.Rule{}
			if name == "another key's" || name == "the shorter idle" {
				two.Idle = short
			}
			b := newRetainBench(t, p, r, two)
			for n := 1; n <= 2; n++ {
				b.mustSign()
				if two.Idle > 0 {
					if err := tokentest.Sign(t.Context(), b.key(2)); err != nil {
						t.Fatal(err)
					}
				}
				tokentest.Until(t, "the token is logged out", func() bool { return !b.card.LoggedIn() })
			}
			if p.Prompts() < 2 {
				t.Errorf("%d prompts", p.Prompts())
			}
		})
	}
}

// The time of an earlier login does not end a later login. In between, the card was out, or the
// token was logged out.
func TestRetainBeginsAnew(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newRetainBench(t, p, retention.Rule{Max: time.Hour}, retention.Rule{Idle: time.Hour})
	b.mustSign()
	b.card.Remove()
	tokentest.Keys(t, b.store, 0)
	b.card.Insert()
	tokentest.Keys(t, b.store, 2)
	b.mustSign()
	want(t, "prompts", p.Prompts(), 2)
	want(t, "logged in", b.card.LoggedIn(), true)
	if err := b.store.LogoutAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	want(t, "logged in", b.card.LoggedIn(), false)
	b.mustSign()
	want(t, "logged in", b.card.LoggedIn(), true)
}

func TestForget(t *testing.T) {
	sleep, lock := retention.Rule{Sleep: true}, retention.Rule{ScreenLock: true}
	for _, tt := range []struct {
		name     string
		one, two retention.Rule // of the two keys; key 1 signs
		event    retention.Event
		want     bool // logged in afterwards
	}{
		{"nothing is said", retention.Rule{}, retention.Rule{}, retention.Sleep, true},
		{"sleep", sleep, retention.Rule{}, retention.Sleep, false},
		{"screen lock", lock, retention.Rule{}, retention.ScreenLock, false},
		{"sleep, for a lock", sleep, sleep, retention.ScreenLock, true},
		{"screen lock, for sleep", lock, lock, retention.Sleep, true},
		{"a key that was not used", retention.Rule{}, sleep, retention.Sleep, false},
		{"both, by two keys", lock, sleep, retention.ScreenLock, false},
		{"another event", retention.Rule{Sleep: true, ScreenLock: true}, retention.Rule{}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newRetainBench(t, p, tt.one, tt.two)
			for _, k := range b.store.Keys() {
				want(t, "forgets", b.store.Forgets(k, tt.event), !tt.want)
			}
			b.store.Forget(t.Context(), tt.event) // while no login lasts
			b.mustSign()
			b.store.Forget(t.Context(), tt.event)
			want(t, "logged in", b.card.LoggedIn(), tt.want)
			b.mustSign()
			prompts := 2
			if tt.want {
				prompts = 1
			}
			want(t, "prompts", p.Prompts(), prompts)
			want(t, "module processes", b.fake.Started(), 1)
		})
	}
}

// The agent forgets a kept PIN also while no login lasts.
func TestForgetDropsThePIN(t *testing.T) {
	for _, out := range []bool{false, true} {
		p := &tokentest.Person{Always: rightPIN}
		b := newPolicyBench(t, p, token.Policy{Remember: true, Retention: retention.Rule{Sleep: true}})
		b.mustSign()
		if out {
			b.card.LogOut(false)
		}
		b.store.Forget(t.Context(), retention.Sleep)
		b.mustSign()
		want(t, "prompts", p.Prompts(), 2)
	}
}

// The agent stops a module that does not log out. That ends the login too. The tokens of other
// modules do not wait for the module.
func TestForgetStopsAModule(t *testing.T) {
	for name, hang := range map[string]bool{"that hangs": true, "that fails": false} {
		t.Run(name, func(t *testing.T) {
			other := tokentest.NewFake(t)
			calm := other.AddToken("calm", rightPIN)
			calm.AddKey(tokentest.P256, 1, "one", nil)
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, func(_ *bench, opts *token.Options) {
				spec := fakeSpec(other)
				spec.Name = "other"
				opts.Modules = append(opts.Modules, spec)
				opts.Policy = func(*token.Key) token.Policy { return token.Policy{Retention: retention.Rule{Sleep: true}} }
			})
			b.mustSign()
			if err := tokentest.Sign(t.Context(), tokentest.Key(t, b.store, "calm", 1)); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			b.fake.Intercept(func(gone context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
				switch {
				case r.Type != wire.TypeLogout:
					return false
				case hang:
					tokentest.Until(t, "the other token is logged out", func() bool { return !calm.LoggedIn() })
					cancel()
					<-gone.Done()
				default:
					p.Fail(r, &wire.Error{Function: "C_Logout", RV: wire.CKRDeviceError})
				}
				return true
			})
			b.store.Forget(ctx, retention.Sleep)
			b.fake.Intercept(nil)
			tokentest.Until(t, "the module is stopped", func() bool { return !b.card.LoggedIn() })
			tokentest.Keys(t, b.store, 2)
			b.mustSign()
			want(t, "prompts", p.Prompts(), 3)
			want(t, "module processes", b.fake.Started(), 2)
		})
	}
}
