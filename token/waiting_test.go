package token_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
)

type nameKey struct{}

// A follower is a person, whom the agent asks in the place of the client that waits.
type follower struct {
	pin.Dialogue
	about  pin.Request
	asked  chan string
	answer chan struct{}
	turn   time.Duration
}

// Ask opens a dialogue of the same person.
func (f *follower) Ask(_ context.Context, about pin.Request) (pin.Dialogue, error) {
	return &follower{about: about, asked: f.asked, answer: f.answer, turn: f.turn}, nil
}

func (f *follower) Close() error { return nil }

func (f *follower) PIN(ctx context.Context, _ string) (typed *secret.Secret, err error) {
	takes := func(waiting.Other) bool { return true }
	err = waiting.Ask(ctx, f.about.Waiting, waiting.Question{Turn: f.turn, Takes: takes, Ask: func(ctx context.Context) (err error) {
		f.asked <- ctx.Value(nameKey{}).(string)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.answer:
			typed, err = secret.From([]byte(rightPIN))
			return err
		}
	}})
	return typed, err
}

// When the first request hangs up, the shared prompt goes to the next request. Its answer counts
// for every request that still waits.
func TestPromptMoves(t *testing.T) {
	f := &follower{asked: make(chan string), answer: make(chan struct{})}
	b := newBench(t, nil, func(_ *bench, o *token.Options) { o.PINs = f })
	sign := func(name string) (hangUp func(), done chan error) {
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), nameKey{}, name))
		done = make(chan error, 1)
		go func() { done <- tokentest.Sign(ctx, b.key(1)) }()
		return cancel, done
	}
	waiters := func(n int) {
		t.Helper()
		proctest.Until(t, fmt.Sprintf("%d requests wait", n), func() bool { return token.LoginWaiters(b.key(1)) == n })
	}
	hangUp, first := sign("first")
	want(t, "asked", <-f.asked, "first")
	_, second := sign("second")
	waiters(2)
	_, third := sign("third")
	waiters(3)
	hangUp()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	want(t, "asked", <-f.asked, "second")
	f.answer <- struct{}{}
	noError(t, <-second)
	noError(t, <-third)
	want(t, "right PINs", b.card.Right(), 1)
}

// A key wants its PIN for each signature. The PIN that a person gives for one signature makes that
// signature. It does not make the signature of another client that asked first and left its prompt
// open.
func TestAttack14PINForOneSignature(t *testing.T) {
	f := &follower{asked: make(chan string), answer: make(chan struct{}), turn: time.Second}
	b := newBench(t, nil, func(b *bench, o *token.Options) {
		b.card.AddKey(tokentest.P256, 2, "each", func(k *tokentest.FakeKey) { k.Always = true })
		o.PINs = f
	})
	sign := func(name string) (done chan error) {
		done = make(chan error, 1)
		go func() { done <- tokentest.Sign(context.WithValue(t.Context(), nameKey{}, name), b.key(2)) }()
		return done
	}
	attacker := sign("attacker")
	want(t, "asked", <-f.asked, "attacker")
	person := sign("person")
	want(t, "asked after a turn", <-f.asked, "person")
	f.answer <- struct{}{}
	want(t, "asked then", <-f.asked, "attacker")
	noError(t, <-person)
	select {
	case err := <-attacker:
		t.Errorf("the attacker has its signature: %v", err)
	default:
	}
	// The prompt of the attacker may have made room for the signature of the person, and is back.
	for answered := false; !answered; {
		select {
		case <-f.asked:
		case f.answer <- struct{}{}:
			answered = true
		}
	}
	noError(t, <-attacker)
}

// untilWaiting waits until n requests wait for the end of a login.
func untilWaiting(t *testing.T, n int) {
	t.Helper()
	proctest.Until(t, fmt.Sprintf("%d requests wait for a login", n), func() bool {
		return proctest.Count(func(g proctest.Goroutine) bool { return g.State == "select" && g.In((*pin.State).Share) }) == n
	})
}

// The agent uses the last try for a PIN only with a consent to the request that brought the PIN.
// The answer to a prompt for another waiting request is no consent to that PIN.
func TestAttack09LastTryOfAnotherPIN(t *testing.T) {
	answer := make(chan struct{})
	p := &tokentest.Person{Always: rightPIN, Consents: true, Wait: answer}
	b := newBench(t, p, func(b *bench, _ *token.Options) { b.card.SetTries(1, 3) })
	ctx, hangUp := context.WithCancel(t.Context())
	attacker, honest := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := b.store.Login(ctx, nil, b.store.Keys(), tokentest.Secret(t, "wrong"))
		attacker <- err
	}()
	p.Until(t, func() bool { return p.LastTries() == 1 })
	go func() { honest <- b.sign() }()
	untilWaiting(t, 1)
	hangUp()
	if err := <-attacker; !errors.Is(err, context.Canceled) {
		t.Errorf("the attacker: %v", err)
	}
	close(answer)
	noError(t, <-honest)
	want(t, "wrong PINs", b.card.Wrong(), 0)
	want(t, "right PINs", b.card.Right(), 1)
	asked := p.Asked()
	want(t, "dialogues", len(asked), 2)
	want(t, "the first was about a PIN that was given", asked[0].Supplied, true)
	want(t, "so was the second", asked[1].Supplied, false)
}

// holder does not answer the prompt of the attacker. It answers the prompt of the next client,
// after the prompt has moved on.
type holder struct {
	pin.Dialogue
	about pin.Request
	asked chan string
}

// Ask opens a dialogue of the same person.
func (h *holder) Ask(_ context.Context, about pin.Request) (pin.Dialogue, error) {
	return &holder{about: about, asked: h.asked}, nil
}

func (h *holder) Close() error { return nil }

func (h *holder) PIN(ctx context.Context, _ string) (typed *secret.Secret, err error) {
	err = waiting.Ask(ctx, h.about.Waiting, waiting.Question{
		Ask: func(ctx context.Context) (err error) {
			name := ctx.Value(nameKey{}).(string)
			h.asked <- name
			if name == "attacker" {
				<-ctx.Done()
				return ctx.Err()
			}
			typed, err = secret.From([]byte(rightPIN))
			return err
		},
		Turn: time.Millisecond, Takes: func(waiting.Other) bool { return true },
	})
	return typed, err
}

// A client leaves a prompt open. Other clients wait for the token for at most one turn. One of them
// signs with a key that wants its PIN each time, and so has its own prompt. Another logs in with a
// given PIN.
func TestAttack14PromptLeftOpen(t *testing.T) {
	for name, test := range map[string]struct {
		in     bool // a login lasts at the start
		key    byte // the key of the attacker
		honest func(ctx context.Context, b *bench) error
	}{
		"signature": {true, 2, func(ctx context.Context, b *bench) error { return tokentest.Sign(ctx, b.key(2)) }},
		"given PIN": {false, 1, func(ctx context.Context, b *bench) error {
			_, err := b.store.Login(ctx, nil, b.store.Keys()[:1], tokentest.Secret(b.t, rightPIN))
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h := &holder{asked: make(chan string, 1<<16)}
			b := newBench(t, nil, func(b *bench, o *token.Options) {
				o.PINs = h
				b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Always = true })
			})
			if test.in {
				_, err := b.store.Login(t.Context(), nil, b.store.Keys()[:1], tokentest.Secret(t, rightPIN))
				noError(t, err)
			}
			ctx, hangUp := context.WithCancel(context.WithValue(t.Context(), nameKey{}, "attacker"))
			attacker := make(chan error, 1)
			go func() { attacker <- tokentest.Sign(ctx, b.key(test.key)) }()
			want(t, "asked", <-h.asked, "attacker")
			noError(t, test.honest(context.WithValue(t.Context(), nameKey{}, "honest"), b))
			hangUp()
			<-attacker // the attacker may have had its turn again
			want(t, "wrong PINs", b.card.Wrong(), 0)
		})
	}
}

// The agent does not use the last try for a PIN that was refused a moment ago.
func TestRefusedPINIsNoLastTry(t *testing.T) {
	p := &tokentest.Person{Consents: true}
	b := newBench(t, p, func(b *bench, _ *token.Options) { b.card.SetTries(2, 3) })
	for range 2 {
		if _, err := b.store.Login(t.Context(), nil, b.store.Keys(), tokentest.Secret(t, "wrong")); err == nil {
			t.Error("a wrong PIN was right")
		}
	}
	want(t, "wrong PINs", b.card.Wrong(), 1)
	want(t, "questions for consent", p.LastTries(), 0)
}
