package agent

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/waiting"
)

// answers plays a person who has an answer for each question.
type answers struct {
	mu    sync.Mutex
	give  func(ctx context.Context, r approval.Question, n int) (approval.Answer, error)
	asked []approval.Question
	again []bool // for each: "no to everything from here" was offered
	open  int
	most  int
}

func (a *answers) Confirm(ctx context.Context, r approval.Question) (answer approval.Answer, err error) {
	err = r.Asking.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
		answer, err = a.confirm(ctx, r)
		return err
	}})
	return answer, err
}

func (a *answers) confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	a.mu.Lock()
	a.asked = append(a.asked, r)
	a.again = append(a.again, r.Asking.Again())
	n := len(a.asked)
	a.open++
	a.most = max(a.most, a.open)
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.open--
		a.mu.Unlock()
	}()
	return a.give(ctx, r, n)
}

func (a *answers) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.asked)
}

// says plays a person who gives the same answer to each question.
func says(a approval.Answer) *answers {
	return &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) { return a, nil }}
}

// everyKey returns rules with the same policy for every key.
func everyKey(a approval.Policy) Rules {
	return Rules{Approval: func(request.Key) approval.Policy { return a }}
}

const quarter = approval.Remember(15 * time.Minute)

// signs makes a request, and fails the test if the result is not want.
func (f *fixture) signs(t *testing.T, k request.Key, c *request.Caller, r request.Sign, want error) {
	t.Helper()
	r.Key = wireOf(k)
	if _, err := f.Sign(t.Context(), c, r); !errors.Is(err, want) {
		t.Errorf("sign: %v, want %v", err, want)
	}
}

// A yes counts for the time that the person has chosen, and no longer.
func TestApprovalLasts(t *testing.T) {
	for name, test := range map[string]struct {
		lasts  approval.Remember
		before time.Duration // no prompt
		after  time.Duration // a prompt; 0: never
	}{
		"once":          {approval.Once, -1, time.Nanosecond},
		"for a quarter": {quarter, 15*time.Minute - 1, 15 * time.Minute},
		"until lock":    {approval.UntilLock, 1000 * time.Hour, 0},
		"nonsense":      {-7, -1, time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k, p := requesttest.New(t), edKey("pkcs11:token=a"), says(approval.Answer{Allowed: true, For: test.lasts})
				f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k)
				c := w.Caller("ssh bash", "good")
				f.signs(t, k, c, w.Login("good", true), nil)
				if p.count() != 1 || !p.asked[0].Offer || p.asked[0].Plain != approval.Once {
					t.Fatalf("asked %+v", p.asked)
				}
				if test.before >= 0 {
					time.Sleep(test.before)
					f.signs(t, k, c, w.Login("good", true), nil)
					if p.count() != 1 {
						t.Error("asked again too early")
					}
				}
				if test.after > 0 {
					time.Sleep(test.after - max(0, test.before))
					f.signs(t, k, c, w.Login("good", true), nil)
					if p.count() != 2 {
						t.Errorf("asked %d times", p.count())
					}
				}
			})
		})
	}
}

// TestApprovalForgotten checks which events make the agent forget a yes.
func TestApprovalForgotten(t *testing.T) {
	w := requesttest.New(t)
	for name, test := range map[string]struct {
		do   func(t *testing.T, f *fixture, k *fakeKey)
		kept bool
	}{
		"nothing": {func(*testing.T, *fixture, *fakeKey) {}, true},
		"lock": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := errors.Join(f.Lock(t.Context(), local, phrase(t, "x")), f.Unlock(t.Context(), local, phrase(t, "x"))); err != nil {
				t.Fatal(err)
			}
		}, false},
		"remove all": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := f.RemoveAll(t.Context(), local); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"remove it": {func(t *testing.T, f *fixture, k *fakeKey) {
			if err := f.Remove(t.Context(), local, wireOf(k)); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"remove its token": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := f.RemoveToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a")}); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"its token comes back": {func(_ *testing.T, f *fixture, k *fakeKey) {
			k.insertions++
			f.tokens.set(k)
		}, false},
		"an event for its token": {func(_ *testing.T, f *fixture, k *fakeKey) {
			f.ForgetApprovals(func(o request.Key) bool { return o == request.Key(k) })
		}, false},
		"an event for another one": {func(_ *testing.T, f *fixture, k *fakeKey) {
			f.ForgetApprovals(func(o request.Key) bool { return o != request.Key(k) })
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			k, p := edKey("pkcs11:token=a;id=1"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse}), Confirm: p, Hosts: w.Hosts}, k)
			for range 2 {
				f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), nil)
			}
			test.do(t, f, k)
			f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), nil)
			want := map[bool]int{true: 1, false: 2}[test.kept]
			if p.count() != want {
				t.Errorf("asked %d times, want %d", p.count(), want)
			}
		})
	}
}

// A yes from before the insertion of the token lasts until the token is removed.
func TestApprovalBeforeInsertion(t *testing.T) {
	w, k, backup, p := requesttest.New(t), edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
	backup.Signer, k.insertions = k.Signer, 3
	var f *fixture
	in := &fakeInserter{answer: func(context.Context, int) (bool, error) {
		backup.insertions++
		f.tokens.setAway([]request.Key{backup}, []request.Key{k})
		return true, nil
	}}
	rules := everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse})
	rules.OfferAway = always
	f = newFixture(Options{Rules: rules, Confirm: p, Insert: in}, k)
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 3 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.count() != 1 || len(in.asked) != 1 {
		t.Errorf("asked %d times, and %d times to insert it", p.count(), len(in.asked))
	}
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.count() != 2 {
		t.Errorf("asked %d times after it was out", p.count())
	}
}

// If the agent forgets all answers during a question, a yes counts once.
func TestApprovalThatComesLate(t *testing.T) {
	w, k := requesttest.New(t), edKey("pkcs11:token=a")
	var f *fixture
	p := &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		f.ForgetApprovals(func(request.Key) bool { return false })
		return approval.Answer{Allowed: true, For: approval.UntilLock}, nil
	}}
	f = newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p}, k)
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.count() != 2 {
		t.Errorf("asked %d times", p.count())
	}
}

// A yes counts only for the same kind of use.
func TestApprovalIsForTheSame(t *testing.T) {
	w := requesttest.New(t)
	root := w.Caller("ssh git bash", "good")
	root.Peer.UID = 0
	socket := w.Caller("ssh git bash", "good")
	socket.Socket = &request.Socket{Name: "forward"}
	asUser := w.Login("good", true)
	asUser.Login.User = "root"
	for name, test := range map[string]struct {
		c    *request.Caller
		r    request.Sign
		same bool
	}{
		"the same":                   {w.Caller("ssh git bash", "good"), w.Login("good", true), true},
		"another process":            {&request.Caller{Peer: peer.Peer{Known: true, UID: 1000, Chain: []peer.Process{{PID: 1, Name: "ssh"}, {PID: 2, Name: "git"}, {PID: 3, Name: "bash"}}}}, w.Login("good", true), true},
		"git that has called itself": {w.Caller("ssh git git git bash", "good"), w.Login("good", true), true},
		"another program":            {w.Caller("ssh code bash", "good"), w.Login("good", true), false},
		"a longer chain":             {w.Caller("ssh git bash tmux", "good"), w.Login("good", true), false},
		"another host":               {w.Caller("ssh git bash", "other"), w.Login("other", true), false},
		"no host":                    {w.Caller("ssh git bash"), w.Login("good", false), false},
		"another user there":         {w.Caller("ssh git bash", "good"), asUser, false},
		"git":                        {w.Caller("ssh git bash", "good"), requesttest.Signature("git"), false},
		"forwarded":                  {w.Caller("ssh git bash", "other", "good"), w.Login("good", true), false},
		"of another user":            {root, w.Login("good", true), false},
		"at another socket":          {socket, w.Login("good", true), false},
	} {
		t.Run(name, func(t *testing.T) {
			k, p := edKey("pkcs11:token=a"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k)
			f.signs(t, k, w.Caller("ssh git bash", "good"), w.Login("good", true), nil)
			f.signs(t, k, test.c, test.r, nil)
			if same := p.count() == 1; same != test.same {
				t.Errorf("the yes counts: %t, want %t", same, test.same)
			}
			// It counts only for this key.
			other := edKey("pkcs11:token=b")
			f.tokens.set(k, other)
			n := p.count()
			f.signs(t, other, w.Caller("ssh git bash", "good"), w.Login("good", true), nil)
			if p.count() != n+1 {
				t.Error("nobody was asked about another key")
			}
		})
	}
}

// confirm of a socket has the values that confirm of a key has.
func TestSocketConfirm(t *testing.T) {
	w := requesttest.New(t)
	for name, test := range map[string]struct {
		socket    approval.Confirm
		policy    approval.Confirm
		forwarded bool
		asked     int // for two signatures of the same kind
	}{
		"none":                          {"", approval.ConfirmNever, true, 0},
		"never":                         {approval.ConfirmNever, approval.ConfirmNever, true, 0},
		"never does not lift the key's": {approval.ConfirmNever, approval.ConfirmAlways, false, 1},
		"always":                        {approval.ConfirmAlways, approval.ConfirmNever, false, 2},
		"always, first-use of the key":  {approval.ConfirmAlways, approval.ConfirmFirstUse, false, 2},
		"forwarded, from here":          {approval.ConfirmForwarded, approval.ConfirmNever, false, 0},
		"forwarded, from another host":  {approval.ConfirmForwarded, approval.ConfirmNever, true, 2},
		"first-use":                     {approval.ConfirmFirstUse, approval.ConfirmNever, false, 1},
		"unknown":                       {"often", approval.ConfirmNever, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			k, p := edKey("pkcs11:token=a"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: test.policy}), Confirm: p, Hosts: w.Hosts}, k)
			hosts := []string{"good"}
			if test.forwarded {
				hosts = []string{"other", "good"}
			}
			for range 2 {
				c := w.Caller("ssh git bash", hosts...)
				c.Socket = &request.Socket{Name: "s", Confirm: test.socket}
				f.signs(t, k, c, w.Login("good", true), nil)
			}
			if p.count() != test.asked {
				t.Errorf("asked %d times, want %d", p.count(), test.asked)
			}
		})
	}
}

// If the agent does not know the kind of a use, a yes counts once.
func TestApprovalThatCannotLast(t *testing.T) {
	w := requesttest.New(t)
	failed := w.Caller("ssh", "good")
	failed.BindFailed, failed.Forwarded = true, true
	added, socket := edKey("pkcs11:token=added"), w.Caller("ssh")
	socket.Socket = &request.Socket{Name: "ask", Confirm: approval.ConfirmAlways}
	for name, test := range map[string]struct {
		k *fakeKey
		c *request.Caller
		r request.Sign
	}{
		"unknown data":                {edKey("pkcs11:token=a"), w.Caller("ssh"), request.Sign{Content: request.Content{Kind: request.KindUnknown}}},
		"data of no kind":             {edKey("pkcs11:token=a"), w.Caller("ssh"), request.Sign{}},
		"an unknown client":           {edKey("pkcs11:token=a"), &request.Caller{}, requesttest.Signature("git")},
		"a client that has gone":      {edKey("pkcs11:token=a"), &request.Caller{Peer: peer.Peer{Known: true, PID: 1}}, requesttest.Signature("git")},
		"a failed bind":               {edKey("pkcs11:token=a"), failed, requesttest.Signature("git")},
		"another host than bound to":  {edKey("pkcs11:token=a"), w.Caller("ssh", "good"), w.Login("other", true)},
		"forwarded, for unknown host": {edKey("pkcs11:token=a"), w.Caller("ssh", "evil", "good"), w.Login("good", false)},
		"ssh-add -c":                  {added, w.Caller("ssh"), requesttest.Signature("git")},
		"a socket that asks":          {edKey("pkcs11:token=a"), socket, requesttest.Signature("git")},
	} {
		t.Run(name, func(t *testing.T) {
			p := says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse}), Confirm: p, Hosts: w.Hosts}, test.k)
			if test.k == added {
				f.add(t, added.uri, request.Constraints{Confirm: true})
			}
			for range 2 {
				f.signs(t, test.k, test.c, test.r, nil)
			}
			if p.count() != 2 {
				t.Fatalf("asked %d times", p.count())
			}
			if r := p.asked[0]; r.Offer || r.Plain != approval.Once {
				t.Errorf("offers to remember it: %+v", r)
			}
		})
	}
}

// With ssh-add -c, the agent asks in spite of an earlier yes.
func TestConstraintAsksInSpiteOfApproval(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("pkcs11:token=a;id=1"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
	f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse}), Confirm: p}, k)
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	f.add(t, k.uri, request.Constraints{Confirm: true})
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	if p.count() != 2 {
		t.Errorf("asked %d times", p.count())
	}
}

func TestDenied(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("pkcs11:token=a"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
	rules := everyKey(approval.Policy{Rules: []approval.Rule{{Programs: []string{"ide"}, Confirm: approval.ConfirmDeny}}})
	f := newFixture(Options{Rules: rules, Confirm: p}, k)
	r := requesttest.Signature("git")
	r.Key = wireOf(k)
	_, err := f.Sign(t.Context(), w.Caller("ssh git ide"), r)
	if _, ok := errors.AsType[*approval.DeniedError](err); !ok || p.count() != 0 || k.signed != 0 {
		t.Errorf("%v, %d questions, %d signatures", err, p.count(), k.signed)
	}
	if !strings.Contains(f.log.String(), "rule 1 of the key in the configuration refuses it") {
		t.Errorf("the log does not say why: %s", f.log)
	}
	f.signs(t, k, w.Caller("ssh git bash"), requesttest.Signature("git"), nil)
	// Not even with a constraint that asks.
	f.add(t, "pkcs11:", request.Constraints{Confirm: true})
	if _, err := f.Sign(t.Context(), w.Caller("ssh git ide"), r); err == nil || p.count() != 0 {
		t.Errorf("%v, %d questions", err, p.count())
	}
}

// If a use needs an approval and there is no way to ask, the agent refuses the use.
func TestNobodyToAsk(t *testing.T) {
	w, k := requesttest.New(t), edKey("pkcs11:token=a")
	f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways})}, k)
	f.approver.Confirm = nil
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), approval.ErrNoPrompt)
	errNoPrompt := errors.New("no display")
	f.approver.Confirm = &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		return approval.Answer{Allowed: true, For: approval.UntilLock}, errNoPrompt
	}}
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), errNoPrompt)
	}
	if k.signed != 0 {
		t.Error("it has signed")
	}
}

// Fifty requests of one kind share a prompt and its outcome.
func TestApprovalIsShared(t *testing.T) {
	for name, test := range map[string]struct {
		answer approval.Answer
		err    error
		next   int // questions after one more request
	}{
		"once":        {approval.Answer{Allowed: true, For: approval.Once}, nil, 2},
		"for longer":  {approval.Answer{Allowed: true, For: quarter}, nil, 1},
		"no":          {approval.Answer{}, approval.ErrDeclined, 2},
		"no for ever": {approval.Answer{Allowed: false, For: approval.UntilLock}, approval.ErrDeclined, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k := requesttest.New(t), edKey("pkcs11:token=a")
				answer := make(chan approval.Answer)
				p := &answers{give: func(ctx context.Context, r approval.Question, _ int) (approval.Answer, error) {
					if request.UseFrom(ctx) != r.Use || request.PeerFrom(ctx).PID != 10 {
						t.Error("who is asked does not know what for")
					}
					return <-answer, nil
				}}
				f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k)
				var all sync.WaitGroup
				for range 50 {
					all.Go(func() { f.signs(t, k, w.Caller("ssh bash", "good"), w.Login("good", true), test.err) })
				}
				// Another kind asks for itself.
				all.Go(func() { f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), test.err) })
				synctest.Wait()
				if p.count() != 2 {
					t.Fatalf("%d prompts", p.count())
				}
				answer <- test.answer
				answer <- test.answer
				all.Wait()
				time.Sleep(firstPause) // the pause after two noes
				done := make(chan struct{})
				go func() {
					f.signs(t, k, w.Caller("ssh bash", "good"), w.Login("good", true), test.err)
					close(done)
				}()
				synctest.Wait()
				if p.count() != test.next+1 {
					t.Errorf("%d prompts, then one more request: %d", 2, p.count())
				}
				if test.next == 2 {
					answer <- test.answer
				}
				<-done
			})
		})
	}
}

// The test does the same with real goroutines, for the race detector. Some clients hang up.
func TestApprovalIsSharedByMany(t *testing.T) {
	w, k := requesttest.New(t), edKey("pkcs11:token=a")
	p := &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		return approval.Answer{Allowed: true, For: approval.UntilLock}, nil
	}}
	f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p, Hosts: w.Hosts}, k)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				go cancel()
			}
			r := w.Login("good", true)
			r.Key = wireOf(k)
			if _, err := f.Sign(ctx, w.Caller("ssh bash", "good"), r); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			if i%10 == 0 {
				f.ForgetApprovals(func(request.Key) bool { return true })
			}
		})
	}
	all.Wait()
	if p.most != 1 {
		t.Errorf("%d prompts at once", p.most)
	}
}

// With ssh-add -c, the agent asks for each use: requests do not share prompts.
func TestConstraintIsNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := requesttest.New(t), edKey("pkcs11:token=a")
		answer := make(chan approval.Answer)
		p := &answers{give: func(context.Context, approval.Question, int) (approval.Answer, error) { return <-answer, nil }}
		f := newFixture(Options{Confirm: p}, k)
		f.add(t, "pkcs11:", request.Constraints{Confirm: true})
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil) })
		}
		synctest.Wait()
		if p.count() != 3 {
			t.Errorf("%d prompts", p.count())
		}
		for range 3 {
			answer <- approval.Answer{Allowed: true}
		}
		all.Wait()
	})
}

// A prompt stays while a request waits for it. When no request waits any more, it closes.
func TestApprovalPromptEndsWithItsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := requesttest.New(t), edKey("pkcs11:token=a")
		p := &answers{give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
			<-ctx.Done()
			return approval.Answer{}, ctx.Err()
		}}
		f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmAlways}), Confirm: p}, k)
		first, hangUp := context.WithCancel(t.Context())
		second, hangUpToo := context.WithCancel(t.Context())
		for _, ctx := range []context.Context{first, second} {
			go func() {
				r := requesttest.Signature("git")
				r.Key = wireOf(k)
				_, _ = f.Sign(ctx, w.Caller("ssh"), r)
			}()
			synctest.Wait()
		}
		hangUp()
		synctest.Wait()
		if p.open != 1 || p.count() != 2 {
			t.Fatalf("one of two has hung up: %d prompts open, of %d", p.open, p.count())
		}
		hangUpToo()
		synctest.Wait()
		if p.open != 0 {
			t.Error("the prompt is still open")
		}
	})
}

// The rules for keys on no token apply to keys in memory and of upstream agents.
func TestApprovalOfOtherKeys(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("soft"), says(approval.Answer{Allowed: true, For: approval.UntilLock})
	rules := Rules{Approval: func(k request.Key) approval.Policy {
		if k != nil {
			t.Errorf("asked about %v", k)
		}
		return approval.Policy{Confirm: approval.ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, SoftwareKeys: true})
	pub := publicOf(t, k)
	if err := f.Add(t.Context(), local, request.AddKey{Private: k.Signer, Public: pub}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.count() != 1 {
		t.Errorf("asked %d times", p.count())
	}
	f.ForgetApprovals(func(k request.Key) bool { return k == nil })
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	if p.count() != 2 {
		t.Errorf("asked %d times after all was forgotten", p.count())
	}
}

func TestApprovalOfUpstreamKeys(t *testing.T) {
	w, p, deny := requesttest.New(t), says(approval.Answer{Allowed: true, For: approval.UntilLock}), false
	up := keytest.New(t)
	rules := Rules{Approval: func(k request.Key) approval.Policy {
		if deny {
			return approval.Policy{Rules: []approval.Rule{{Confirm: approval.ConfirmDeny}}}
		}
		return approval.Policy{Confirm: approval.ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, Upstreams: []Upstream{&fakeUpstream{name: "gcr", keys: []keytest.Key{up}}}})
	r := requesttest.Signature("git")
	r.Key = up.Public.Marshal()
	for range 2 {
		if _, err := f.Sign(t.Context(), w.Caller("ssh"), r); err != nil {
			t.Error(err)
		}
	}
	if p.count() != 1 || p.asked[0].Comment != "a key of the agent at gcr" || p.asked[0].Content != r.Content {
		t.Errorf("asked %+v", p.asked)
	}
	deny = true
	if _, err := f.Sign(t.Context(), w.Caller("ssh"), r); err == nil {
		t.Error("the other agent has signed what is denied")
	}
}
