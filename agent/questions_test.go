package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/approval/approvaltest"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
	"p11-agent/pinentry"
	"p11-agent/pinentry/secret"
)

// Every kind of question counts, and every kind of no.
func TestAttack10EveryKind(t *testing.T) {
	w := requesttest.New(t)
	for name, give := range map[string]func(context.Context) (bool, error){
		"no":         func(context.Context) (bool, error) { return false, nil },
		"no answer":  func(context.Context) (bool, error) { return false, pinentry.ErrTimeout },
		"no, to all": func(context.Context) (bool, error) { return false, approval.ErrNoToAll },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k, missing := edKey("pkcs11:token=a"), edKey("pkcs11:token=b")
				in := &fakeInserter{answer: func(ctx context.Context, _ int) (bool, error) { return give(ctx) }}
				p := &approvaltest.Person{Give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
					yes, err := give(ctx)
					return approval.Answer{Allowed: yes}, err
				}}
				rules := Rules{OfferAway: always, Approval: func(k request.Key) approval.Policy {
					if k == request.Key(missing) {
						return approval.Policy{}
					}
					return approval.Policy{Confirm: approval.ConfirmAlways}
				}}
				f := newFixture(Options{Rules: rules, Confirm: p, Insert: in}, k)
				f.tokens.setAway([]request.Key{k}, []request.Key{missing})
				for range 500 {
					r := requesttest.Signature("git")
					for _, key := range []*fakeKey{k, missing} {
						r.Key = wireOf(key)
						if _, err := f.Sign(t.Context(), w.Caller("ssh", "evil", "-"), r); err == nil {
							t.Fatal("it was signed")
						}
					}
					time.Sleep(10 * time.Millisecond)
				}
				if n, m := p.Count(), len(in.asked); n+m > 7 {
					t.Errorf("%d questions whether, and %d for the token", n, m)
				}
			})
		})
	}
}

func withKey(r request.Sign, k request.Key) request.Sign {
	r.Key = wireOf(k)
	return r
}

func isPaused(err error) bool {
	_, ok := errors.AsType[*approval.PausedError](err)
	return ok
}

// "No to everything from here" counts for all keys and connections of the host, and
// for no other.
func TestNoToAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k, other := requesttest.New(t), edKey("pkcs11:token=a"), edKey("pkcs11:token=b")
		p := &approvaltest.Person{Give: func(_ context.Context, r approval.Question, _ int) (approval.Answer, error) {
			if r.Asking.Again() {
				return approval.Answer{}, approval.ErrNoToAll
			}
			return approval.Answer{}, nil
		}}
		f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k, other)
		git := requesttest.Signature("git")
		f.signs(t, k, w.Caller("ssh", "evil", "-"), git, approval.ErrDeclined)
		time.Sleep(firstPause)
		f.signs(t, k, w.Caller("ssh", "evil", "-"), git, approval.ErrNoToAll)
		s := f.Now()
		if len(s.Pauses) != 2 || !s.Pauses[0].Block || s.Pauses[0].From != "the forwarded host evil.example.net" || s.Pauses[0].About != "" {
			t.Fatalf("%+v", s.Pauses)
		}
		for _, c := range []*request.Caller{w.Caller("ssh bash", "evil", "-"), w.Caller("ssh", "evil", "good")} {
			_, err := f.Sign(t.Context(), c, withKey(git, other))
			if !isPaused(err) || !strings.Contains(err.Error(), "everything from the forwarded host evil.example.net: no question is shown before 01:00:01") {
				t.Error(err)
			}
		}
		f.signs(t, k, w.Caller("ssh", "good", "-"), git, approval.ErrDeclined)
		time.Sleep(blockTime)
		if len(f.Now().Pauses) != 0 {
			t.Errorf("after an hour: %+v", f.Now().Pauses)
		}
		f.signs(t, k, w.Caller("ssh", "evil", "-"), git, approval.ErrDeclined)
		time.Sleep(firstPause)
		f.signs(t, k, w.Caller("ssh", "evil", "-"), git, approval.ErrNoToAll)
		// A reload ends the pause. Such a client can neither lock nor unlock.
		for _, do := range []func(context.Context, *request.Caller, *secret.Secret) error{f.Lock, f.Unlock} {
			phrase, err := secret.From([]byte("x"))
			if err != nil {
				t.Fatal(err)
			}
			if err := do(t.Context(), forwarded, phrase); !errors.Is(err, errForwarded) {
				t.Error(err)
			}
			phrase.Wipe()
		}
		if _, err := f.Sign(t.Context(), w.Caller("ssh", "evil", "-"), withKey(git, k)); !isPaused(err) {
			t.Error(err)
		}
		f.Configure(f.opts.Rules)
		f.signs(t, k, w.Caller("ssh", "evil", "-"), git, approval.ErrDeclined)
	})
}

// Limits of package approval.
const (
	firstPause = time.Second
	blockTime  = time.Hour
)
