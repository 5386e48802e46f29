package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
	"p11-agent/pinentry"
	"p11-agent/pinentry/secret"
)

// flood sends a thousand requests within this time, and returns how many questions a person
// had to answer. attempt returns the client and its request.
func flood(t *testing.T, f *fixture, p *answers, lasts time.Duration, attempt func(n int) (*request.Caller, request.Sign)) int {
	t.Helper()
	before := p.count()
	for n := range 1000 {
		c, r := attempt(n)
		if _, err := f.Sign(t.Context(), c, r); err == nil {
			t.Fatal("it was signed")
		}
		time.Sleep(lasts / 1000)
	}
	return p.count() - before
}

func randomHost(n int) ssh.PublicKey {
	seed := make([]byte, ed25519.SeedSize)
	copy(seed, fmt.Sprint(n))
	pub, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed(seed).Public())
	if err != nil {
		panic(err)
	}
	return pub
}

// After a no, the agent asks a person rarely. A client does not change that by changing
// its requests.
func TestAttack10Flood(t *testing.T) {
	w := requesttest.New(t)
	var keys []request.Key
	for i := range 10 {
		keys = append(keys, edKey(fmt.Sprintf("pkcs11:token=a;id=%%%02d", i)))
	}
	ask := func(k int) request.Sign {
		r := requesttest.Signature("git")
		r.Key = wireOf(keys[k%len(keys)])
		return r
	}
	for name, test := range map[string]struct {
		most    int // questions in ten seconds
		attempt func(n int) (*request.Caller, request.Sign)
	}{
		"one forwarded connection": {4, func(int) (*request.Caller, request.Sign) { return w.Caller("ssh bash", "evil", "-"), ask(0) }},
		"new connections": {4, func(n int) (*request.Caller, request.Sign) {
			c := w.Caller("ssh bash", "evil", "-")
			c.Number, c.Peer.PID = uint64(n), n+10
			return c, ask(0)
		}},
		"binds behind the first one": {4, func(n int) (*request.Caller, request.Sign) {
			c := w.Caller("ssh bash", "evil", "-")
			c.Binds = append(c.Binds, request.Bind{HostKey: randomHost(n), SessionID: []byte("x"), Forwarding: n%2 == 0})
			c.BindFailed = n%3 == 0
			return c, ask(0)
		}},
		"other data": {4, func(n int) (*request.Caller, request.Sign) {
			r := requesttest.Signature(fmt.Sprint("namespace ", n))
			if n%2 == 0 {
				r = w.Login("good", true)
				r.Login.User = fmt.Sprint("user", n)
			}
			r.Key = wireOf(keys[0])
			return w.Caller("ssh bash", "evil", "-"), r
		}},
		"other keys": {8, func(n int) (*request.Caller, request.Sign) { return w.Caller("ssh bash", "evil", "-"), ask(n) }},
		"another ssh": {4, func(n int) (*request.Caller, request.Sign) {
			return w.Caller(fmt.Sprintf("ssh%d bash", n), "evil", "-"), ask(0)
		}},
		"a program": {5, func(int) (*request.Caller, request.Sign) { return w.Caller("evil bash"), ask(0) }},
		"a program with other keys": {10, func(n int) (*request.Caller, request.Sign) {
			return w.Caller("evil bash"), ask(n)
		}},
		"a program with other names": {10, func(n int) (*request.Caller, request.Sign) {
			return w.Caller(fmt.Sprintf("evil%d bash", n)), ask(n)
		}},
		"a program that binds hosts of its own": {10, func(n int) (*request.Caller, request.Sign) {
			c := w.Caller("evil bash", "evil", "-")
			c.Binds[0].HostKey = randomHost(n)
			return c, ask(n)
		}},
		"a program that has ended": {5, func(int) (*request.Caller, request.Sign) {
			return &request.Caller{Peer: peer.Peer{Known: true, UID: 1000}}, ask(0)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := says(approval.Answer{})
				f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, keys...)
				if n := flood(t, f, p, 10*time.Second, test.attempt); n < 2 || n > test.most {
					t.Errorf("%d questions in ten seconds, want up to %d", n, test.most)
				}
				// A patient client gets few questions, too: one in five minutes for each key
				// and way. If the client changes those, its group pays.
				if n := flood(t, f, p, time.Hour, test.attempt); n > 130 {
					t.Errorf("%d questions in an hour", n)
				}
				if s := f.Now(); len(s.Pauses) == 0 || s.Pauses[0].Refused < 2 || s.Pauses[0].From == "" {
					t.Errorf("the status has %+v", s.Pauses)
				}
				// The agent still asks about the requests of other clients.
				other, r := w.Caller("ssh bash", "good"), ask(0)
				other.Socket = &request.Socket{Name: "other"}
				before := p.count()
				_, _ = f.Sign(t.Context(), other, r)
				if p.count() != before+1 {
					t.Error("nobody was asked about another client")
				}
			})
		})
	}
}

// A client gets no more questions by hanging up early, or by sending all requests at once.
func TestAttack10AtOnce(t *testing.T) {
	w, k := requesttest.New(t), edKey("pkcs11:token=a")
	for name, test := range map[string]struct {
		most   int
		caller func(n int) *request.Caller
	}{
		"forwarded": {2, func(int) *request.Caller { return w.Caller("ssh bash", "evil", "-") }},
		"forwarded, of made up hosts": {maxNos + maxOpen, func(n int) *request.Caller {
			c := w.Caller("ssh bash", "evil", "-")
			c.Binds[0].HostKey = randomHost(n)
			return c
		}},
		"programs": {maxNos + maxOpen, func(n int) *request.Caller { return w.Caller(fmt.Sprintf("evil%d", n)) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answer := make(chan struct{})
				p := &answers{give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
					select {
					case <-answer:
						return approval.Answer{}, nil
					case <-ctx.Done():
						return approval.Answer{}, ctx.Err()
					}
				}}
				f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p}, k)
				var all sync.WaitGroup
				for n := range 100 {
					all.Go(func() {
						r := requesttest.Signature(fmt.Sprint(n))
						r.Key = wireOf(k)
						if _, err := f.Sign(t.Context(), test.caller(n), r); err == nil {
							t.Error("it was signed")
						}
					})
				}
				synctest.Wait()
				if p.count() > maxOpen {
					t.Errorf("%d questions are open", p.count())
				}
				close(answer)
				all.Wait()
				if p.count() > test.most {
					t.Errorf("%d questions, want up to %d", p.count(), test.most)
				}
			})
		})
	}
	t.Run("hanging up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := &answers{give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
				<-ctx.Done()
				return approval.Answer{}, ctx.Err()
			}}
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p}, k)
			for range 1000 {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
				r := requesttest.Signature("git")
				r.Key = wireOf(k)
				if _, err := f.Sign(ctx, w.Caller("ssh bash", "evil", "-"), r); err == nil {
					t.Fatal("it was signed")
				}
				cancel()
			}
			if p.count() > 6 {
				t.Errorf("%d questions", p.count())
			}
		})
	})
}

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
				p := &answers{give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
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
				if n, m := p.count(), len(in.asked); n+m > 7 {
					t.Errorf("%d questions whether, and %d for the token", n, m)
				}
			})
		})
	}
}

// A no by mistake costs a person next to nothing, and a yes ends it.
func TestNoByMistake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := requesttest.New(t), edKey("pkcs11:token=a")
		yes := false
		p := &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) {
			return approval.Answer{Allowed: yes}, nil
		}}
		f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k)
		here, there := w.Caller("ssh bash", "good"), w.Caller("ssh bash", "evil", "-")
		git := requesttest.Signature("git")

		for range 2 {
			f.signs(t, k, here, git, approval.ErrDeclined)
			if p.again[len(p.again)-1] {
				t.Error("the first and the second no mean everything")
			}
		}
		if _, err := f.Sign(t.Context(), here, withKey(git, k)); !isPaused(err) || !strings.Contains(err.Error(), "00:00:01") {
			t.Errorf("the third time: %v", err)
		}
		time.Sleep(firstPause)
		yes = true
		f.signs(t, k, here, git, nil)
		if !p.again[len(p.again)-1] {
			t.Error("the third question does not offer no to everything")
		}
		yes = false
		f.signs(t, k, here, git, approval.ErrDeclined)
		if p.again[len(p.again)-1] {
			t.Error("a yes is no fresh start")
		}

		// For another host, the first no costs a second.
		f.signs(t, k, there, git, approval.ErrDeclined)
		if _, err := f.Sign(t.Context(), there, withKey(git, k)); !isPaused(err) {
			t.Errorf("the second time: %v", err)
		}
		time.Sleep(firstPause)
		yes = true
		f.signs(t, k, there, git, nil)
		f.signs(t, k, there, git, nil)
		// Refusals do not affect requests that need no question.
		yes = false
		f.signs(t, k, there, git, approval.ErrDeclined)
		f.rules.Store(&useRules{policy: func(request.Key) approval.Policy { return approval.Policy{} }})
		f.signs(t, k, there, git, nil)
	})
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
		p := &answers{give: func(_ context.Context, r approval.Question, _ int) (approval.Answer, error) {
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
	maxNos     = 10
	maxOpen    = 5
)
