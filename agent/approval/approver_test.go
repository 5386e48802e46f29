package approval_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/approval/approvaltest"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
)

const quarter = approval.Remember(15 * time.Minute)

// A fakeKey is a key of a token that is present.
type fakeKey struct {
	request.Key
	name string
}

func newKey(name string) *fakeKey { return &fakeKey{name: name} }

func (k *fakeKey) Insertions() uint64 { return 1 }
func (k *fakeKey) Present() bool      { return true }

// A fixture is an approval.Approver, and what the keyring tells it.
type fixture struct {
	*approval.Approver
	policy approval.Policy
	each   string // why it asks for each use
	world  *requesttest.World
}

// newFixture returns a fixture whose keys all have the policy.
func newFixture(c approval.Confirmer, p approval.Policy, w *requesttest.World) *fixture {
	return &fixture{Approver: &approval.Approver{Confirm: c, Questions: approval.NewQuestions(), Log: slog.New(slog.DiscardHandler)}, policy: p, world: w}
}

// approve decides about a use of a key.
func (f *fixture) approve(ctx context.Context, k *fakeKey, c *request.Caller, r request.Sign) error {
	use := f.world.Use(c, r)
	var served request.Served
	served.Begin(ctx, c, use)
	defer served.End(nil)
	target := &request.Target{ID: k.name, Comment: k.name, Fingerprint: "SHA256:" + k.name, Homes: []request.Key{k}}
	err := f.Approve(&served, use, target, func(request.Key) approval.Policy { return f.policy }, f.each)
	if cause := context.Cause(&served); err != nil && cause != nil && ctx.Err() == nil {
		err = cause // as the keyring answers
	}
	return err
}

// signs makes a request, and fails the test if the result is not want.
func (f *fixture) signs(t *testing.T, k *fakeKey, c *request.Caller, r request.Sign, want error) {
	t.Helper()
	if err := f.approve(t.Context(), k, c, r); !errors.Is(err, want) {
		t.Errorf("approve: %v, want %v", err, want)
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
				w, k, p := requesttest.New(t), newKey("a"), approvaltest.Says(approval.Answer{Allowed: true, For: test.lasts})
				f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
				c := w.Caller("ssh bash", "good")
				f.signs(t, k, c, w.Login("good", true), nil)
				if p.Count() != 1 || !p.Asked()[0].Offer || p.Asked()[0].Plain != approval.Once {
					t.Fatalf("asked %+v", p.Asked())
				}
				if test.before >= 0 {
					time.Sleep(test.before)
					f.signs(t, k, c, w.Login("good", true), nil)
					if p.Count() != 1 {
						t.Error("asked again too early")
					}
				}
				if test.after > 0 {
					time.Sleep(test.after - max(0, test.before))
					f.signs(t, k, c, w.Login("good", true), nil)
					if p.Count() != 2 {
						t.Errorf("asked %d times", p.Count())
					}
				}
			})
		})
	}
}

// If the agent forgets all answers during a question, a yes counts once.
func TestApprovalThatComesLate(t *testing.T) {
	w, k := requesttest.New(t), newKey("a")
	var f *fixture
	p := &approvaltest.Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		f.Forget(func([]request.Key) bool { return false })
		return approval.Answer{Allowed: true, For: approval.UntilLock}, nil
	}}
	f = newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.Count() != 2 {
		t.Errorf("asked %d times", p.Count())
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
			k, p := newKey("a"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
			f.signs(t, k, w.Caller("ssh git bash", "good"), w.Login("good", true), nil)
			f.signs(t, k, test.c, test.r, nil)
			if same := p.Count() == 1; same != test.same {
				t.Errorf("the yes counts: %t, want %t", same, test.same)
			}
			// It counts only for this key.
			other := newKey("b")
			n := p.Count()
			f.signs(t, other, w.Caller("ssh git bash", "good"), w.Login("good", true), nil)
			if p.Count() != n+1 {
				t.Error("no question was about another key")
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
			k, p := newKey("a"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(p, approval.Policy{Confirm: test.policy}, w)
			hosts := []string{"good"}
			if test.forwarded {
				hosts = []string{"other", "good"}
			}
			for range 2 {
				c := w.Caller("ssh git bash", hosts...)
				c.Socket = &request.Socket{Name: "s", Confirm: test.socket}
				f.signs(t, k, c, w.Login("good", true), nil)
			}
			if p.Count() != test.asked {
				t.Errorf("asked %d times, want %d", p.Count(), test.asked)
			}
		})
	}
}

// If the agent does not know the kind of a use, a yes counts once.
func TestApprovalThatCannotLast(t *testing.T) {
	w := requesttest.New(t)
	failed := w.Caller("ssh", "good")
	failed.BindFailed, failed.Forwarded = true, true
	added, socket := newKey("added"), w.Caller("ssh")
	socket.Socket = &request.Socket{Name: "ask", Confirm: approval.ConfirmAlways}
	for name, test := range map[string]struct {
		k *fakeKey
		c *request.Caller
		r request.Sign
	}{
		"unknown data":                {newKey("a"), w.Caller("ssh"), request.Sign{Content: request.Content{Kind: request.KindUnknown}}},
		"data of no kind":             {newKey("a"), w.Caller("ssh"), request.Sign{}},
		"an unknown client":           {newKey("a"), &request.Caller{}, requesttest.Signature("git")},
		"a client that has gone":      {newKey("a"), &request.Caller{Peer: peer.Peer{Known: true, PID: 1}}, requesttest.Signature("git")},
		"a failed bind":               {newKey("a"), failed, requesttest.Signature("git")},
		"another host than bound to":  {newKey("a"), w.Caller("ssh", "good"), w.Login("other", true)},
		"forwarded, for unknown host": {newKey("a"), w.Caller("ssh", "evil", "good"), w.Login("good", false)},
		"ssh-add -c":                  {added, w.Caller("ssh"), requesttest.Signature("git")},
		"a socket that asks":          {newKey("a"), socket, requesttest.Signature("git")},
	} {
		t.Run(name, func(t *testing.T) {
			p := approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(p, approval.Policy{Confirm: approval.ConfirmFirstUse}, w)
			if test.k == added {
				f.each = "ssh-add -c"
			}
			for range 2 {
				f.signs(t, test.k, test.c, test.r, nil)
			}
			if p.Count() != 2 {
				t.Fatalf("asked %d times", p.Count())
			}
			if r := p.Asked()[0]; r.Offer || r.Plain != approval.Once {
				t.Errorf("offers to remember it: %+v", r)
			}
		})
	}
}

// If a use needs an approval and there is no way to ask, the agent refuses the use.
func TestNoPrompt(t *testing.T) {
	w, k := requesttest.New(t), newKey("a")
	f := newFixture(nil, approval.Policy{Confirm: approval.ConfirmAlways}, w)
	f.Confirm = nil
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), approval.ErrNoPrompt)
	errNoPrompt := errors.New("no display")
	f.Confirm = &approvaltest.Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		return approval.Answer{Allowed: true, For: approval.UntilLock}, errNoPrompt
	}}
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), errNoPrompt)
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
				w, k := requesttest.New(t), newKey("a")
				answer := make(chan approval.Answer)
				p := &approvaltest.Person{Give: func(ctx context.Context, r approval.Question, _ int) (approval.Answer, error) {
					if request.UseFrom(ctx) != r.Use || request.PeerFrom(ctx).PID != 10 {
						t.Error("the context of the question has another use")
					}
					return <-answer, nil
				}}
				f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
				var all sync.WaitGroup
				for range 50 {
					all.Go(func() { f.signs(t, k, w.Caller("ssh bash", "good"), w.Login("good", true), test.err) })
				}
				// Another kind asks for itself.
				all.Go(func() { f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), test.err) })
				synctest.Wait()
				if p.Count() != 2 {
					t.Fatalf("%d prompts", p.Count())
				}
				answer <- test.answer
				answer <- test.answer
				all.Wait()
				time.Sleep(approval.FirstPause) // the pause after two refusals
				done := make(chan struct{})
				go func() {
					f.signs(t, k, w.Caller("ssh bash", "good"), w.Login("good", true), test.err)
					close(done)
				}()
				synctest.Wait()
				if p.Count() != test.next+1 {
					t.Errorf("%d prompts, then one more request: %d", 2, p.Count())
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
	w, k := requesttest.New(t), newKey("a")
	p := &approvaltest.Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) {
		return approval.Answer{Allowed: true, For: approval.UntilLock}, nil
	}}
	f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				go cancel()
			}
			if err := f.approve(ctx, k, w.Caller("ssh bash", "good"), w.Login("good", true)); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			if i%10 == 0 {
				f.Forget(func([]request.Key) bool { return true })
			}
		})
	}
	all.Wait()
	if p.Most() != 1 {
		t.Errorf("%d prompts at once", p.Most())
	}
}

// With ssh-add -c, the agent asks for each use: requests do not share prompts.
func TestConstraintIsNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := requesttest.New(t), newKey("a")
		answer := make(chan approval.Answer)
		p := &approvaltest.Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) { return <-answer, nil }}
		f := newFixture(p, approval.Policy{}, w)
		f.each = "ssh-add -c"
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil) })
		}
		synctest.Wait()
		if p.Count() != 3 {
			t.Errorf("%d prompts", p.Count())
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
		w, k := requesttest.New(t), newKey("a")
		p := &approvaltest.Person{Give: func(ctx context.Context, _ approval.Question, _ int) (approval.Answer, error) {
			<-ctx.Done()
			return approval.Answer{}, ctx.Err()
		}}
		f := newFixture(p, approval.Policy{Confirm: approval.ConfirmAlways}, w)
		first, hangUp := context.WithCancel(t.Context())
		second, hangUpToo := context.WithCancel(t.Context())
		for _, ctx := range []context.Context{first, second} {
			go func() {
				_ = f.approve(ctx, k, w.Caller("ssh"), requesttest.Signature("git"))
			}()
			synctest.Wait()
		}
		hangUp()
		synctest.Wait()
		if p.Open() != 1 || p.Count() != 2 {
			t.Fatalf("one of two has hung up: %d prompts open, of %d", p.Open(), p.Count())
		}
		hangUpToo()
		synctest.Wait()
		if p.Open() != 0 {
			t.Error("the prompt is still open")
		}
	})
}
