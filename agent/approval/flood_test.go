package approval_test

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
	"p11-agent/agent/approval/approvaltest"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
)

// flood sends a thousand requests within this time, and returns how many questions a person
// had to answer. attempt returns the client and its request.
func flood(t *testing.T, f *fixture, p *approvaltest.Person, lasts time.Duration, attempt func(n int) (*request.Caller, request.Sign)) int {
	t.Helper()
	before := p.Count()
	for n := range 1000 {
		c, r := attempt(n)
		if err := f.approve(t.Context(), newKey(string(r.Key)), c, r); err == nil {
			t.Fatal("it was approved")
		}
		time.Sleep(lasts / 1000)
	}
	return p.Count() - before
}

// After a no, the agent asks a person rarely. A client does not change that by changing
// its requests.
func TestAttack10Flood(t *testing.T) {
	w := requesttest.New(t)
	ask := func(k int) request.Sign {
		r := requesttest.Signature("git")
		r.Key = fmt.Append(nil, k%10)
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
			r.Key = []byte("0")
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
				p := approvaltest.Says(approval.Answer{})
				f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
				if n := flood(t, f, p, 10*time.Second, test.attempt); n < 2 || n > test.most {
					t.Errorf("%d questions in ten seconds, want up to %d", n, test.most)
				}
				// A patient client gets few questions, too: one in five minutes for each key
				// and way. If the client changes those, its group pays.
				if n := flood(t, f, p, time.Hour, test.attempt); n > 130 {
					t.Errorf("%d questions in an hour", n)
				}
				if p := f.Questions.Pauses(); len(p) == 0 || p[0].Refused < 2 || p[0].From == "" {
					t.Errorf("the pauses are %+v", p)
				}
				// The agent still asks about the requests of other clients.
				other, r := w.Caller("ssh bash", "good"), ask(0)
				other.Socket = &request.Socket{Name: "other"}
				before := p.Count()
				_ = f.approve(t.Context(), newKey("0"), other, r)
				if p.Count() != before+1 {
					t.Error("no question was about another client")
				}
			})
		})
	}
}

// A client gets no more questions by hanging up early, or by sending all requests at once.
func TestAttack10AtOnce(t *testing.T) {
	w, k := requesttest.New(t), newKey("a")
	for name, test := range map[string]struct {
		most   int
		caller func(n int) *request.Caller
	}{
		"forwarded": {2, func(int) *request.Caller { return w.Caller("ssh bash", "evil", "-") }},
		"forwarded, of made up hosts": {approval.MaxNos + approval.MaxOpen, func(n int) *request.Caller {
			c := w.Caller("ssh bash", "evil", "-")
			c.Binds[0].HostKey = randomHost(n)
			return c
		}},
		"programs": {approval.MaxNos + approval.MaxOpen, func(n int) *request.Caller { return w.Caller(fmt.Sprintf("evil%d", n)) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answer := make(chan struct{})
				p := &approvaltest.Person{Give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
					select {
					case <-answer:
						return approval.Answer{}, nil
					case <-ctx.Done():
						return approval.Answer{}, ctx.Err()
					}
				}}
				f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
				var all sync.WaitGroup
				for n := range 100 {
					all.Go(func() {
						r := requesttest.Signature(fmt.Sprint(n))
						if err := f.approve(t.Context(), k, test.caller(n), r); err == nil {
							t.Error("it was approved")
						}
					})
				}
				synctest.Wait()
				if p.Count() > approval.MaxOpen {
					t.Errorf("%d questions are open", p.Count())
				}
				close(answer)
				all.Wait()
				if p.Count() > test.most {
					t.Errorf("%d questions, want up to %d", p.Count(), test.most)
				}
			})
		})
	}
	t.Run("hanging up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := &approvaltest.Person{Give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
				<-ctx.Done()
				return approval.Answer{}, ctx.Err()
			}}
			f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
			for range 1000 {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
				if err := f.approve(ctx, k, w.Caller("ssh bash", "evil", "-"), requesttest.Signature("git")); err == nil {
					t.Fatal("it was approved")
				}
				cancel()
			}
			if p.Count() > 6 {
				t.Errorf("%d questions", p.Count())
			}
		})
	})
}

// A no by mistake costs a person next to nothing, and a yes ends it.
func TestNoByMistake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := requesttest.New(t), newKey("a")
		yes := false
		p := &approvaltest.Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) {
			return approval.Answer{Allowed: yes}, nil
		}}
		f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
		here, there := w.Caller("ssh bash", "good"), w.Caller("ssh bash", "evil", "-")
		git := requesttest.Signature("git")

		for range 2 {
			f.signs(t, k, here, git, approval.ErrDeclined)
			if p.Again() {
				t.Error("the first and the second no mean everything")
			}
		}
		if err := f.approve(t.Context(), k, here, git); !isPaused(err) || !strings.Contains(err.Error(), "00:00:01") {
			t.Errorf("the third time: %v", err)
		}
		time.Sleep(approval.FirstPause)
		yes = true
		f.signs(t, k, here, git, nil)
		if !p.Again() {
			t.Error("the third question does not offer no to everything")
		}
		yes = false
		f.signs(t, k, here, git, approval.ErrDeclined)
		if p.Again() {
			t.Error("a yes is no fresh start")
		}

		// For another host, the first no costs a second.
		f.signs(t, k, there, git, approval.ErrDeclined)
		if err := f.approve(t.Context(), k, there, git); !isPaused(err) {
			t.Errorf("the second time: %v", err)
		}
		time.Sleep(approval.FirstPause)
		yes = true
		f.signs(t, k, there, git, nil)
		f.signs(t, k, there, git, nil)
		// Refusals do not affect requests that need no question.
		yes = false
		f.signs(t, k, there, git, approval.ErrDeclined)
		f.policy = approval.Policy{}
		f.signs(t, k, there, git, nil)
	})
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

func isPaused(err error) bool {
	_, ok := errors.AsType[*approval.PausedError](err)
	return ok
}
