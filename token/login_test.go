package token_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

const rightPIN = "Sesame-4829"

// bench is a Store on a Fake with one token, "card", that has a P-256 key 1.
type bench struct {
	t     *testing.T
	fake  *tokentest.Fake
	card  *tokentest.FakeToken
	store *token.Store
}

// newBench makes a bench. set changes the bench and the options before newBench opens the Store;
// set may be nil.
func newBench(t *testing.T, p *tokentest.Person, set func(b *bench, opts *token.Options)) *bench {
	t.Helper()
	b := &bench{t: t, fake: tokentest.NewFake(t)}
	b.card = b.fake.AddToken("card", rightPIN)
	b.card.AddKey(tokentest.P256, 1, "one", nil)
	opts := token.Options{Modules: []token.ModuleSpec{fakeSpec(b.fake)}, Command: self}
	if p != nil {
		opts.PINs = p
	}
	if set != nil {
		set(b, &opts)
	}
	b.store = tokentest.Store(t, opts, rightPIN)
	return b
}

func (b *bench) key(id byte) *token.Key { return tokentest.Key(b.t, b.store, "card", id) }

// sign signs with key 1.
func (b *bench) sign() error { return tokentest.Sign(b.t.Context(), b.key(1)) }

// mustSign signs with key 1, and fails the test if that fails.
func (b *bench) mustSign() {
	b.t.Helper()
	if err := b.sign(); err != nil {
		b.t.Fatal(err)
	}
}

// pinError fails the test if an error is not such a *pin.Error.
func pinError(t *testing.T, err error, tried bool, tries pin.Tries) {
	t.Helper()
	e, ok := errors.AsType[*pin.Error](err)
	switch {
	case !ok:
		t.Errorf("%v is not about the PIN", err)
	case e.Tried != tried || e.Tries != tries:
		t.Errorf("tried %v, tries %v (%v); want %v, %v", e.Tried, e.Tries, err, tried, tries)
	}
}

func want[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// different returns n different PINs, all wrong.
func different(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("wrong-%d", i))
	}
	return all
}

func TestDialogueDoesNotLockTheToken(t *testing.T) {
	tests := []struct {
		name    string
		pins    []string
		prompts int
		wrong   int
	}{
		{"the same PIN again", []string{"wrong-1", "wrong-1", rightPIN}, 2, 1},
		{"an earlier PIN again", []string{"wrong-1", "wrong-2", "wrong-1", rightPIN}, 3, 2},
		{"ever another PIN", different(50), 10, 10},
		{"too short", slices.Repeat([]string{"abc"}, 50), 10, 0},
		{"too long", slices.Repeat([]string{strings.Repeat("9", 33)}, 50), 10, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{PINs: tt.pins}
			b := newBench(t, p, func(b *bench, _ *token.Options) { b.card.SetTries(100, 100) })
			tries := pin.TriesLow
			if tt.wrong == 0 {
				tries = pin.TriesUnknown
			}
			pinError(t, b.sign(), tt.wrong > 0, tries)
			want(t, "prompts", p.Prompts(), tt.prompts)
			want(t, "wrong PINs", b.card.Wrong(), tt.wrong)
			want(t, "right PINs", b.card.Right(), 0)
		})
	}
}

func TestLastTry(t *testing.T) {
	tests := []struct {
		name           string
		person         *tokentest.Person
		given          string
		wrong, right   int
		prompts, asked int
		err            func(t *testing.T, err error)
	}{
		{
			"without consent",
			&tokentest.Person{Always: rightPIN}, "", 0, 0, 0, 1,
			func(t *testing.T, err error) {
				pinError(t, err, false, pin.TriesLast)
				want(t, "declined", errors.Is(err, pin.ErrCancelled), true)
			},
		},
		{"with consent", &tokentest.Person{Always: rightPIN, Consents: true}, "", 0, 1, 1, 1, noError},
		{
			"with consent and a wrong PIN",
			&tokentest.Person{PINs: []string{"wrong", "wrong", rightPIN}, Consents: true}, "", 1, 0, 1, 1,
			func(t *testing.T, err error) { pinError(t, err, true, pin.TriesNone) },
		},
		{
			"a PIN given in advance, without consent",
			&tokentest.Person{}, rightPIN, 0, 0, 0, 1,
			func(t *testing.T, err error) { pinError(t, err, false, pin.TriesLast) },
		},
		{"a PIN given in advance, with consent", &tokentest.Person{Consents: true}, rightPIN, 0, 1, 0, 1, noError},
		{
			"a PIN given in advance, without a prompt", nil, rightPIN, 0, 0, 0, 0,
			func(t *testing.T, err error) { pinError(t, err, false, pin.TriesLast) },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, tt.person, func(b *bench, _ *token.Options) { b.card.SetTries(1, 3) })
			var err error
			if tt.given != "" {
				_, err = b.store.Login(t.Context(), nil, b.store.Keys(), tokentest.Secret(t, tt.given))
			} else {
				err = b.sign()
			}
			tt.err(t, err)
			want(t, "wrong PINs", b.card.Wrong(), tt.wrong)
			want(t, "right PINs", b.card.Right(), tt.right)
			if tt.person != nil {
				want(t, "prompts", tt.person.Prompts(), tt.prompts)
				want(t, "questions for consent", tt.person.LastTries(), tt.asked)
				want(t, "open dialogues", tt.person.Open(), 0)
			}
			if tt.prompts > 0 { // the earlier prompts count there as well
				problems := tt.person.Problems()
				want(t, "said when it was asked for", problems[len(problems)-1], "This is the last try.")
			}
		})
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func TestLockedIsNeverTried(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN, Consents: true}
	b := newBench(t, p, func(b *bench, _ *token.Options) { b.card.SetTries(0, 3) })
	pinError(t, b.sign(), false, pin.TriesNone)
	_, err := b.store.Login(t.Context(), nil, b.store.Keys(), tokentest.Secret(t, rightPIN))
	pinError(t, err, false, pin.TriesNone)
	want(t, "dialogues", len(p.Asked()), 0)
	want(t, "requests to log in", b.fake.Requests(wire.TypeLogin), 0)
}

// Another program uses up tries between the look at the flags and the login.
func TestFlagsChangeDuringLogin(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN, Consents: true}
	b := newBench(t, p, nil)
	var once sync.Once
	b.fake.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeLogin {
			once.Do(func() { b.card.SetTries(1, 3) })
		}
		return false
	})
	b.mustSign()
	want(t, "questions for consent", p.LastTries(), 1)
	want(t, "wrong PINs", b.card.Wrong(), 0)
	want(t, "right PINs", b.card.Right(), 1)
}

func TestPINIsForOneToken(t *testing.T) {
	second := func(b *bench, _ *token.Options) {
		b.fake.AddToken("other", "Other-9153").AddKey(tokentest.P256, 1, "one", nil)
	}
	t.Run("given in advance for keys of two", func(t *testing.T) {
		b := newBench(t, nil, second)
		if _, err := b.store.Login(t.Context(), nil, b.store.Keys(), tokentest.Secret(t, rightPIN)); err == nil {
			t.Error("no error")
		}
		want(t, "requests to log in", b.fake.Requests(wire.TypeLogin), 0)
	})
	t.Run("many requests for both at once", func(t *testing.T) {
		var other *tokentest.FakeToken
		p := &tokentest.Person{ByToken: map[string]string{"card": rightPIN, "other": "Other-9153"}}
		b := newBench(t, p, func(b *bench, _ *token.Options) {
			other = b.fake.AddToken("other", "Other-9153")
			other.AddKey(tokentest.P256, 1, "one", nil)
		})
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				if err := tokentest.Sign(t.Context(), b.store.Keys()[i%2]); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		want(t, "prompts", p.Prompts(), 2)
		want(t, "wrong PINs of the card", b.card.Wrong(), 0)
		want(t, "wrong PINs of the other", other.Wrong(), 0)
	})
	t.Run("another token takes the place", func(t *testing.T) {
		var other *tokentest.FakeToken
		p := &tokentest.Person{Always: rightPIN}
		b := newBench(t, p, func(b *bench, _ *token.Options) {
			other = b.fake.AddToken("other", "Other-9153")
			other.AddKey(tokentest.P256, 1, "one", nil)
		})
		var once sync.Once
		b.fake.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
			if r.Type == wire.TypeLogin {
				once.Do(b.card.Remove)
			}
			return false
		})
		if err := b.sign(); !errors.Is(err, token.ErrAbsent) {
			t.Errorf("got %v", err)
		}
		want(t, "PINs tried on the other", other.Wrong()+other.Right(), 0)
	})
}

func TestPINPad(t *testing.T) {
	tests := []struct {
		name    string
		typed   string
		decline bool
		err     func(t *testing.T, err error)
	}{
		{"right", rightPIN, false, noError},
		{"wrong", "wrong", false, func(t *testing.T, err error) { pinError(t, err, true, pin.TriesLow) }},
		{"declined while the reader waits", "", true, func(t *testing.T, err error) {
			want(t, "declined", errors.Is(err, pin.ErrCancelled), true)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: "on the screen", Declines: tt.decline}
			b := newBench(t, p, func(b *bench, _ *token.Options) {
				b.card.Flags, b.card.Typed = wire.CKFProtectedAuthenticationPath, []byte(tt.typed)
			})
			if tt.decline {
				b.fake.Intercept(func(ctx context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
					if r.Type != wire.TypeLogin {
						return false
					}
					<-ctx.Done() // the reader waits for the person
					return false
				})
			}
			tt.err(t, b.sign())
			want(t, "notices", p.Notices(), 1)
			want(t, "prompts", p.Prompts(), 0)
			want(t, "open dialogues", p.Open(), 0)
		})
	}
}

// A login may succeed after its last request has left.
func TestLogoutAllEndsAbandonedLogin(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	reached, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b.fake.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeLogin {
			once.Do(func() {
				close(reached)
				<-release
			})
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- tokentest.Sign(ctx, b.key(1)) }()
	tokentest.Wait(t, reached)
	cancel()
	if err := <-end; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	b.fake.Intercept(nil)
	close(release)
	tokentest.Until(t, "the card is logged in", b.card.LoggedIn)
	if err := b.store.LogoutAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	want(t, "logged in", b.card.LoggedIn(), false)
	b.mustSign()
	want(t, "prompts", p.Prompts(), 2)
}

func TestAlwaysAuthenticate(t *testing.T) {
	for _, shows := range []bool{false, true} {
		t.Run(fmt.Sprintf("shows without a login: %v", shows), func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, func(b *bench, _ *token.Options) {
				b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Always, k.Public = true, shows })
			})
			k := b.key(2) // as the agent listed it before the login
			for n := range 3 {
				if err := tokentest.Sign(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				want(t, "prompts", p.Prompts(), n+1) // the first prompt is also for the login
			}
			for i, about := range p.Asked() {
				want(t, "for each use", about.EachUse, i > 0 || shows)
			}
			// The other keys of the token need no more prompts.
			b.mustSign()
			want(t, "prompts", p.Prompts(), 3)
			want(t, "right PINs", b.card.Right(), 4)
		})
	}
}

func TestAlwaysAuthenticateWrongPIN(t *testing.T) {
	p := &tokentest.Person{PINs: []string{rightPIN, "wrong", rightPIN}}
	b := newBench(t, p, func(b *bench, _ *token.Options) {
		b.card.AddKey(tokentest.RSA2048, 2, "two", func(k *tokentest.FakeKey) { k.Always = true })
	})
	b.mustSign()
	if err := tokentest.Sign(t.Context(), b.key(2)); err != nil {
		t.Fatal(err)
	}
	want(t, "wrong PINs", b.card.Wrong(), 1)
	if err := tokentest.Sign(t.Context(), b.key(2)); !errors.Is(err, pin.ErrCancelled) {
		t.Errorf("got %v", err)
	}
	// The agent does not try another mechanism after a wrong PIN.
	want(t, "requests to sign", b.fake.Requests(wire.TypeOperate), 3)
}

// Every prompt of a token waits for the prompt before it, for any key and any purpose.
func TestOnePromptAtATime(t *testing.T) {
	wait := make(chan struct{})
	p := &tokentest.Person{Always: rightPIN, Wait: wait}
	b := newBench(t, p, func(b *bench, _ *token.Options) {
		b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Always, k.Public = true, true })
	})
	var all sync.WaitGroup
	for i := range 12 {
		all.Go(func() {
			if err := tokentest.Sign(t.Context(), b.key(byte(1+i%2))); err != nil {
				t.Error(err)
			}
		})
	}
	p.Until(t, func() bool { return p.Prompts() == 1 })
	close(wait)
	all.Wait()
	want(t, "prompts at once", p.Most(), 1)
}

func TestTokenWithoutLogin(t *testing.T) {
	b := newBench(t, nil, func(b *bench, _ *token.Options) { b.card.NoLogin = true })
	b.mustSign()
	if _, err := b.store.Login(t.Context(), nil, b.store.Keys(), tokentest.Secret(t, "anything")); err != nil {
		t.Error(err)
	}
	want(t, "requests to log in", b.fake.Requests(wire.TypeLogin), 0)
}

func TestLoggedOutByAnother(t *testing.T) {
	for _, stale := range []bool{false, true} {
		for _, shows := range []bool{false, true} {
			t.Run(fmt.Sprintf("the module notices: %v, the key shows: %v", !stale, shows), func(t *testing.T) {
				p := &tokentest.Person{Always: rightPIN}
				b := newBench(t, p, func(b *bench, _ *token.Options) {
					b.card.Change(1, func(k *tokentest.FakeKey) { k.Public = shows })
				})
				for n := 1; n <= 3; n++ {
					b.mustSign()
					want(t, "prompts", p.Prompts(), n)
					b.card.LogOut(stale)
				}
			})
		}
	}
}

// After a crash, the agent does not give a PIN twice, and does not ask for it twice.
func TestProcessEndsDuringLogin(t *testing.T) {
	for _, tt := range []struct {
		name    string
		at      wire.Type
		prompts int
		heals   bool
	}{
		{"before the PIN is asked for", wire.TypeToken, 1, true},
		{"with the PIN", wire.TypeLogin, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, nil)
			var once sync.Once
			b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) (crash bool) {
				if r.Type == tt.at {
					once.Do(func() {
						proc.Kill()
						crash = true
					})
				}
				return crash
			})
			err := b.sign()
			want(t, "success", err == nil, tt.heals)
			if e, ok := errors.AsType[*token.ModuleError](err); !tt.heals && (!ok || e.Module != "fake") {
				t.Errorf("got %v", err)
			}
			want(t, "prompts", p.Prompts(), tt.prompts)
			b.mustSign()
		})
	}
}
