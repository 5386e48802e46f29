package pin

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

const right = "Sesame-4829"

var errLost = errors.New("the module process ended for another card")

// card is a Target that counts tries, and an Asker whose person types PINs.
type card struct {
	Target // methods that no test needs

	lose  int      // so many of the next tries are lost
	tried []string // what the token got
	flags uint64
	other error // of CheckSupplied

	typed    []string // what the person types next; then the person declines
	consents bool
	problems []string
	asked    int
}

func (c *card) Try(_ context.Context, t Trial) error {
	text := string(t.PIN.Bytes())
	c.tried = append(c.tried, text)
	switch {
	case c.lose > 0:
		c.lose--
		return &LoginError{Token: "card", Attempted: true, Err: errLost}
	case text == right:
		c.flags = 0
		return nil
	}
	c.flags = wire.CKFUserPINCountLow
	return &Error{Token: "card", Tries: TriesLow, Tried: true, Err: errors.New("CKR_PIN_INCORRECT")}
}

func (c *card) Proved(bool)                                    {}
func (c *card) CheckSupplied() error                           { return c.other }
func (c *card) LostToOthers(err error) bool                    { return errors.Is(err, errLost) }
func (c *card) Request() Request                               { return Request{} }
func (c *card) Ask(context.Context, Request) (Dialogue, error) { c.asked++; return c, nil }
func (c *card) Notice(context.Context) error                   { return ErrCancelled }
func (c *card) Close() error                                   { return nil }

func (c *card) LastTry(context.Context, string) (bool, error) { return c.consents, nil }

func (c *card) PIN(_ context.Context, problem string) (*secret.Secret, error) {
	c.problems = append(c.problems, problem)
	if len(c.typed) == 0 {
		return nil, ErrCancelled
	}
	text := c.typed[0]
	c.typed = c.typed[1:]
	return secret.From([]byte(text))
}

// fixed is a Source with one PIN.
type fixed string

func (f fixed) Check() error { return nil }
func (f fixed) Bind() error  { return nil }
func (f fixed) Read(context.Context) (*secret.Secret, Origin, error) {
	s, err := secret.From([]byte(f))
	return s, Value(), err
}

func newState() *State { return NewDevices().Open(wire.TokenID{Label: "card"}, "module") }

// login has one login run. change may be nil.
func (c *card) login(t *testing.T, s *State, refusals *Refusals, change func(*Login)) error {
	t.Helper()
	l := &Login{
		Token: wire.TokenID{Label: "card"}, Info: wire.TokenInfo{Flags: c.flags}, Asker: c, Target: c, Refusals: refusals,
		Waiting: waiting.One(t.Context()), Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(l)
	}
	return s.InTurn(t.Context(), l.Waiting, false, func(ctx context.Context) error { return s.Login(ctx, l) })
}

func (c *card) want(t *testing.T, tried ...string) {
	t.Helper()
	if !slices.Equal(c.tried, tried) {
		t.Errorf("the token got %q, want %q", c.tried, tried)
	}
	c.tried = nil
}

// A PIN that the token refused is not tried a second time, in the same dialogue or in the
// next.
func TestRefusedOnce(t *testing.T) {
	s, c := newState(), &card{typed: []string{"wrong", "wrong"}}
	if err := c.login(t, s, nil, nil); err == nil {
		t.Error("a wrong PIN logged in")
	}
	c.want(t, "wrong")
	c.typed = []string{"wrong", right}
	if err := c.login(t, s, nil, nil); err != nil {
		t.Error(err)
	}
	c.want(t, right)
	if last := c.problems[len(c.problems)-1]; last != "This PIN was refused a moment ago: it was not tried again." {
		t.Errorf("the person read %q", last)
	}
}

// No PIN uses the last try without consent, wherever the PIN comes from. A locked PIN is not
// tried at all.
func TestLastTryNeedsConsent(t *testing.T) {
	supplied, err := secret.From([]byte(right))
	if err != nil {
		t.Fatal(err)
	}
	defer supplied.Wipe()
	for name, change := range map[string]func(*Login){
		"typed":    nil,
		"supplied": func(l *Login) { l.Supplied.PIN = supplied },
		"kept":     func(l *Login) { l.UseKept = true },
		"source":   func(l *Login) { l.Source = fixed(right) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, flags := range []uint64{wire.CKFUserPINFinalTry, wire.CKFUserPINLocked} {
				s, c := newState(), &card{flags: flags, typed: []string{right}}
				kept, err := secret.From([]byte(right))
				if err != nil {
					t.Fatal(err)
				}
				if err := s.keep(kept, 0); err != nil {
					t.Fatal(err)
				}
				kept.Wipe()
				e, ok := errors.AsType[*Error](c.login(t, s, LoadRefusals("", slog.Default()), change))
				if !ok || e.Tried || e.Tries != TriesOf(flags) {
					t.Errorf("flags %#x: %v", flags, e)
				}
				c.want(t)
			}
		})
	}
	c := &card{flags: wire.CKFUserPINFinalTry, typed: []string{right}, consents: true}
	if err := c.login(t, newState(), nil, nil); err != nil {
		t.Error(err)
	}
	c.want(t, right)
}

// A kept PIN whose login was lost is tried again at most maxRetries times, and not at all when
// the token shows a wrong try.
func TestKeptPINIsRetried(t *testing.T) {
	keep := func(l *Login) { l.UseKept, l.Keep = true, true }
	s, c := newState(), &card{typed: []string{right}}
	if err := c.login(t, s, nil, keep); err != nil {
		t.Fatal(err)
	}
	c.want(t, right)
	c.lose = maxRetries
	for range maxRetries {
		e, ok := errors.AsType[*LoginError](c.login(t, s, nil, keep))
		if !ok || e.Attempted {
			t.Errorf("the caller may not try again: %v", e)
		}
	}
	c.flags = wire.CKFUserPINCountLow
	if err := c.login(t, s, nil, keep); !errors.Is(err, ErrCancelled) {
		t.Errorf("after a wrong try: %v", err)
	}
	c.want(t, right, right)
	c.flags, c.lose = 0, 1
	if e, ok := errors.AsType[*LoginError](c.login(t, s, nil, keep)); !ok || !e.Attempted || !s.KeptSince().IsZero() {
		t.Errorf("after too many retries: %v; the PIN is kept since %v", e, s.KeptSince())
	}
}

// A PIN of a source is tried once.
func TestSourceIsTriedOnce(t *testing.T) {
	s, c, refusals := newState(), new(card), LoadRefusals("", slog.Default())
	for range 2 {
		if err := c.login(t, s, refusals, func(l *Login) { l.Source = fixed("wrong") }); err == nil {
			t.Error("a wrong PIN logged in")
		}
		c.flags = 0
	}
	c.want(t, "wrong")
	if c.asked > 0 {
		t.Error("a person was asked")
	}
}

// A supplied PIN does not go to a module that it is not for.
func TestSuppliedPINIsChecked(t *testing.T) {
	supplied, err := secret.From([]byte(right))
	if err != nil {
		t.Fatal(err)
	}
	defer supplied.Wipe()
	c := &card{other: errors.New("the token belongs to another module")}
	if err := c.login(t, newState(), nil, func(l *Login) { l.Supplied.PIN = supplied }); !errors.Is(err, c.other) {
		t.Error(err)
	}
	c.want(t)
}

// Requests that wait share one login. It ends when the last of them has left.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newState()
		start := func(f func()) error { go f(); return nil }
		runs, answer := 0, make(chan error)
		run := func(ctx context.Context, _ *waiting.List) (*secret.Secret, error) {
			runs++
			select {
			case err := <-answer:
				return nil, err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		outcome := make(chan error, 3)
		request := func() context.CancelFunc {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				_, err := s.Share(ctx, start, run)
				outcome <- err
			}()
			synctest.Wait()
			return cancel
		}
		leave := request()
		leaveToo := request()
		leave()
		if err := <-outcome; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		answer <- ErrCancelled
		if err := <-outcome; !errors.Is(err, ErrCancelled) || runs != 1 {
			t.Errorf("%d logins: %v", runs, err)
		}
		leaveToo()
		last := request()
		if st := s.Status(); !st.UnderWay || st.Waiters != 1 || !s.InUse() {
			t.Errorf("while one waits: %+v", st)
		}
		last()
		<-outcome
		synctest.Wait()
		if s.InUse() || runs != 2 {
			t.Errorf("the login goes on without a request, in run %d", runs)
		}
		s.Close()
		if err := s.InTurn(t.Context(), waiting.One(t.Context()), false, func(context.Context) error { return nil }); !errors.Is(err, ErrForgotten) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// Each PIN goes to one request, also when requests have the same context.
func TestShareOneContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newState()
		start := func(f func()) error { go f(); return nil }
		answer := make(chan *secret.Secret)
		run := func(ctx context.Context, list *waiting.List) (typed *secret.Secret, err error) {
			q := waiting.Question{Ask: func(context.Context) error { typed = <-answer; return nil }}
			err = list.Ask(ctx, q)
			return typed, err
		}
		got := make(chan *secret.Secret, 3)
		for range cap(got) {
			go func() {
				typed, err := s.Share(t.Context(), start, run)
				if err != nil {
					t.Error(err)
				}
				got <- typed
			}()
		}
		synctest.Wait()
		pin, err := secret.From([]byte(right))
		if err != nil {
			t.Fatal(err)
		}
		defer pin.Wipe()
		answer <- pin
		givers := 0
		for range cap(got) {
			if <-got != nil {
				givers++
			}
		}
		if givers != 1 {
			t.Errorf("%d requests got the PIN", givers)
		}
	})
}
