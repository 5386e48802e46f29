package token_test

import (
	"bytes"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/tokentest"
)

// newRetainBench has keys 1 and 2, each with its rule.
func newRetainBench(t *testing.T, p *tokentest.Person, one, two token.Retention) *bench {
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
	p := &tokentest.Person{Always: pin}
	b := newRetainBench(t, p, token.Retention{Never: true}, token.Retention{})
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
	// They share the login, which the first key ends, too.
	b.mustSign()
	want(t, "logged in", b.card.LoggedIn(), false)
	want(t, "prompts", p.Prompts(), 4)
	b.store.SetPolicy(nil)
	b.mustSign()
	want(t, "logged in", b.card.LoggedIn(), true)
}

func TestRetainForATime(t *testing.T) {
	const short, long = 10 * time.Millisecond, time.Hour
	for name, r := range map[string]token.Retention{
		"idle":             {Idle: short},
		"max":              {Max: short},
		"idle before max":  {Idle: short, Max: long},
		"max before idle":  {Idle: long, Max: short},
		"another key's":    {},
		"the shorter idle": {Idle: long},
	} {
		t.Run(name, func(t *testing.T) {
			p := &tokentest.Person{Always: pin}
			two := token.Retention{}
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

// The end of an earlier login is none of a later one: after the card was out, and
// after the token was logged out.
func TestRetainBeginsAnew(t *testing.T) {
	p := &tokentest.Person{Always: pin}
	b := newRetainBench(t, p, token.Retention{Max: time.Hour}, token.Retention{Idle: time.Hour})
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
