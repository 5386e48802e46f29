package token_test

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token"
	"p11-agent/token/tokentest"
)

type nameKey struct{}

// follower is a person who is asked where those are who wait.
type follower struct {
	token.PINDialogue
	asked  chan string
	answer chan struct{}
}

func (f *follower) Ask(context.Context, token.PINRequest) (token.PINDialogue, error) { return f, nil }
func (f *follower) Close() error                                                     { return nil }

func (f *follower) PIN(ctx context.Context, _ string) (typed *secret.Secret, err error) {
	err = waiting.Ask(ctx, func(ctx context.Context) (err error) {
		f.asked <- ctx.Value(nameKey{}).(string)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.answer:
			typed, err = secret.From([]byte(pin))
			return err
		}
	})
	return typed, err
}

// The prompt that requests share goes from the first, when that one has hung up,
// to the next, and its answer is good for those who are left.
func TestPromptFollowsThoseWhoWait(t *testing.T) {
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
		for end := time.Now().Add(3 * time.Minute); token.LoginWaiters(b.key(1)) != n; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatalf("there are never %d who wait", n)
			}
		}
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
