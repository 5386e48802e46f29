package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/waiting"
)

// hostTable names host keys by their wire form.
type hostTable map[string]request.HostName

func (h hostTable) HostName(key ssh.PublicKey, _ peer.Peer) request.HostName {
	return h[string(key.Marshal())]
}

// world is a few hosts, and ways to come from them.
type world struct {
	keys  map[string]ssh.PublicKey
	hosts hostTable
}

func newWorld(t testing.TB) *world {
	w := &world{keys: make(map[string]ssh.PublicKey), hosts: make(hostTable)}
	for name, known := range map[string]request.HostName{
		"good":    {Names: []string{"good.example.org", "192.0.2.1"}},
		"other":   {Names: []string{"Other.Example.org"}},
		"evil":    {Names: []string{"evil.example.net"}},
		"test":    {Names: []string{"test.example.org"}},
		"hashed":  {Hashed: true},
		"shared":  {Names: []string{"*.example.org"}},
		"any":     {Names: []string{"*"}},
		"revoked": {Names: []string{"gone.example.org"}, Revoked: true},
		"new":     {},
	} {
		pub, err := ssh.NewPublicKey(edKey(name).Public())
		if err != nil {
			t.Fatal(err)
		}
		w.keys[name] = pub
		w.hosts[string(pub.Marshal())] = known
	}
	return w
}

// caller is a client whose connection came over these hosts; the last one is
// logged in to unless it is "-".
func (w *world) caller(chain string, hosts ...string) *request.Caller {
	c := &request.Caller{Number: 7, Peer: peer.Peer{Known: true, PID: 10, UID: 1000}}
	for name := range strings.SplitSeq(chain, " ") {
		c.Peer.Chain = append(c.Peer.Chain, peer.Process{PID: 10 + len(c.Peer.Chain), Name: name})
	}
	for i, name := range hosts {
		last := i == len(hosts)-1
		if last && name == "-" {
			continue
		}
		c.Binds = append(c.Binds, request.Bind{HostKey: w.keys[name], SessionID: []byte("session " + name), Forwarding: !last})
	}
	c.Forwarded = len(hosts) > 1
	return c
}

// login is one at a host that the data names, or does not.
func (w *world) login(host string, named bool) request.Sign {
	l := &request.Login{User: "me", SessionID: []byte("session " + host)}
	if named {
		l.HostKey = w.keys[host].Marshal()
	}
	return request.Sign{Data: []byte("data"), Content: request.Content{Kind: request.KindLogin}, Login: l}
}

func sshsigOf(namespace string) request.Sign {
	return request.Sign{Data: []byte("data"), Content: request.Content{Kind: request.KindSignature, Namespace: namespace}}
}

func (w *world) use(c *request.Caller, r request.Sign) *request.Use {
	return &request.Use{Caller: c, Content: r.Content, Login: r.Login, Hosts: w.hosts}
}

func TestDecide(t *testing.T) {
	w := newWorld(t)
	yes, no := true, false
	git, goodLogin := sshsigOf("git"), w.login("good", true)
	local, fwd := w.caller("ssh bash", "good"), w.caller("ssh bash", "evil", "good")
	failed := w.caller("ssh bash", "good")
	failed.BindFailed, failed.Forwarded = true, true
	unbound := w.caller("ssh bash")
	// An evil host has signed the identifier of its session with a good one.
	forged := w.caller("ssh bash", "evil", "evil")
	forged.Binds[1].SessionID = []byte("session other")
	// A forwarded connection that says it is the good host's, for another session.
	stale := w.caller("ssh bash", "good")

	one := func(r Rule) Approval { return Approval{Confirm: ConfirmAlways, Rules: []Rule{r}} }
	org := []string{"*.example.org", "!test.*"}
	never, deny := ConfirmNever, ConfirmDeny
	for name, test := range map[string]struct {
		a    Approval
		c    *request.Caller
		r    request.Sign
		want Confirm
	}{
		"nothing is said":                  {Approval{}, local, goodLogin, never},
		"nothing is said, forwarded":       {Approval{}, fwd, goodLogin, never},
		"forwarded, and it is":             {Approval{Confirm: ConfirmForwarded}, fwd, goodLogin, ConfirmAlways},
		"forwarded, and it is not":         {Approval{Confirm: ConfirmForwarded}, local, goodLogin, never},
		"forwarded, and a bind has failed": {Approval{Confirm: ConfirmForwarded}, failed, goodLogin, ConfirmAlways},
		"first use":                        {Approval{Confirm: ConfirmFirstUse}, local, goodLogin, ConfirmAlways},
		"what nobody knows":                {Approval{Confirm: "sometimes"}, local, goodLogin, ConfirmAlways},
		"the first rule that matches": {
			Approval{Rules: []Rule{{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}, {Confirm: deny}, {Confirm: never}}}, local, goodLogin, deny,
		},
		"no rule that matches": {Approval{Confirm: ConfirmAlways, Rules: []Rule{{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}}}, local, goodLogin, ConfirmAlways},

		"purpose git":                 {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}), local, git, never},
		"purpose file, for git":       {one(Rule{Purposes: []request.Purpose{request.PurposeFile}, Confirm: never}), local, git, ConfirmAlways},
		"purpose other, for unknown":  {one(Rule{Purposes: []request.Purpose{request.PurposeOther}, Confirm: deny}), local, request.Sign{Content: request.Content{Kind: request.KindUnknown}}, deny},
		"purpose login, for unknown":  {one(Rule{Purposes: []request.Purpose{request.PurposeLogin}, Confirm: never}), local, request.Sign{Content: request.Content{Kind: request.KindUnknown}}, ConfirmAlways},
		"program, the first":          {one(Rule{Programs: []string{"ssh"}, Confirm: deny}), local, git, deny},
		"program, any link":           {one(Rule{Programs: []string{"x", "bash"}, Confirm: deny}), local, git, deny},
		"program, not part of a name": {one(Rule{Programs: []string{"bas", "ssh*"}, Confirm: deny}), local, git, ConfirmAlways},
		"program, nobody known":       {one(Rule{Programs: []string{""}, Confirm: never}), &request.Caller{}, git, ConfirmAlways},
		"all conditions, one not met": {one(Rule{Programs: []string{"ssh"}, Purposes: []request.Purpose{request.PurposeGit}, Confirm: deny}), local, goodLogin, ConfirmAlways},

		"forwarded = true":                   {one(Rule{Forwarded: &yes, Confirm: never}), fwd, git, never},
		"forwarded = true, for a local one":  {one(Rule{Forwarded: &yes, Confirm: never}), local, git, ConfirmAlways},
		"forwarded = false":                  {one(Rule{Forwarded: &no, Confirm: never}), local, git, never},
		"forwarded = false, for a forwarded": {one(Rule{Forwarded: &no, Confirm: never}), fwd, git, ConfirmAlways},
		"never does not mean forwarded ones": {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}), fwd, git, ConfirmAlways},
		"deny does":                          {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: deny}), fwd, git, deny},
		"nor does program with never":        {one(Rule{Programs: []string{"bash"}, Confirm: never}), fwd, git, ConfirmAlways},

		"host, named by the data":               {one(Rule{Hosts: org, Confirm: never}), local, goodLogin, never},
		"host, named by the data alone":         {one(Rule{Hosts: org, Confirm: never}), unbound, goodLogin, never},
		"host, by the bind":                     {one(Rule{Hosts: org, Confirm: never}), local, w.login("good", false), never},
		"host, in capitals":                     {one(Rule{Hosts: []string{"OTHER.*"}, Confirm: never}), w.caller("ssh", "other"), w.login("other", true), never},
		"host, by its address":                  {one(Rule{Hosts: []string{"192.0.2.?"}, Confirm: never}), local, goodLogin, never},
		"host, excepted":                        {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "test"), w.login("test", true), ConfirmAlways},
		"host, one of its names excepted":       {one(Rule{Hosts: []string{"*.example.org", "!192.*"}, Confirm: never}), local, goodLogin, ConfirmAlways},
		"host, another":                         {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "evil"), w.login("evil", true), ConfirmAlways},
		"host, not in known_hosts":              {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "new"), w.login("new", true), ConfirmAlways},
		"host, hashed":                          {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "hashed"), w.login("hashed", true), ConfirmAlways},
		"host, revoked":                         {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "revoked"), w.login("revoked", true), ConfirmAlways},
		"host, nobody says which":               {one(Rule{Hosts: org, Confirm: never}), unbound, w.login("good", false), ConfirmAlways},
		"host, a bind of another session":       {one(Rule{Hosts: org, Confirm: never}), stale, w.login("other", false), ConfirmAlways},
		"host, data and bind differ":            {one(Rule{Hosts: org, Confirm: never}), stale, w.login("other", true), ConfirmAlways},
		"host, a bind has failed":               {one(Rule{Hosts: org, Confirm: never}), failed, goodLogin, ConfirmAlways},
		"host, no login":                        {one(Rule{Hosts: []string{"*"}, Confirm: never}), local, git, ConfirmAlways},
		"any host, unknown":                     {one(Rule{Hosts: []string{"*"}, Confirm: never}), unbound, w.login("good", false), never},
		"any host but, unknown":                 {one(Rule{Hosts: []string{"*", "!evil.*"}, Confirm: never}), unbound, w.login("good", false), ConfirmAlways},
		"any host but, known":                   {one(Rule{Hosts: []string{"*", "!evil.*"}, Confirm: never}), local, goodLogin, never},
		"denied host":                           {one(Rule{Hosts: []string{"evil.*"}, Confirm: deny}), w.caller("ssh", "evil"), w.login("evil", true), deny},
		"denied host, behind a good one":        {one(Rule{Hosts: []string{"evil.*"}, Confirm: deny}), w.caller("ssh", "good", "evil"), w.login("evil", true), deny},
		"a wildcard, inside":                    {one(Rule{Hosts: []string{"*.org"}, Confirm: never}), w.caller("ssh", "shared"), w.login("shared", true), never},
		"a wildcard, one of its hosts":          {one(Rule{Hosts: []string{"db.example.org"}, Confirm: never}), w.caller("ssh", "shared"), w.login("shared", true), ConfirmAlways},
		"a wildcard, one of its hosts excepted": {one(Rule{Hosts: []string{"*.example.org", "!test.example.org"}, Confirm: never}), w.caller("ssh", "shared"), w.login("shared", true), ConfirmAlways},
		"a wildcard for all":                    {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "any"), w.login("any", true), ConfirmAlways},
		"a wildcard for all, all permitted":     {one(Rule{Hosts: []string{"*"}, Confirm: never}), w.caller("ssh", "any"), w.login("any", true), never},
		"a wildcard, one of its hosts denied":   {one(Rule{Hosts: []string{"db.example.org"}, Confirm: deny}), w.caller("ssh", "shared"), w.login("shared", true), deny},
		"a wildcard, another host denied":       {one(Rule{Hosts: []string{"db.example.net"}, Confirm: deny}), w.caller("ssh", "shared"), w.login("shared", true), ConfirmAlways},
		"a wildcard, denied before all is permitted": {
			Approval{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: deny}, {Hosts: []string{"*.example.org"}, Confirm: never}}}, w.caller("ssh", "shared"), w.login("shared", true), deny,
		},
		"a wildcard, asked about before all is permitted": {
			Approval{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: ConfirmAlways}, {Hosts: []string{"*.example.org"}, Confirm: never}}}, w.caller("ssh", "shared"), w.login("shared", true), ConfirmAlways,
		},
		"a wildcard, one is permitted before all is denied": {
			Approval{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: never}, {Confirm: deny}}}, w.caller("ssh", "shared"), w.login("shared", true), deny,
		},
		"a wildcard, nothing but a denial": {Approval{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: deny}}}, w.caller("ssh", "shared"), w.login("shared", true), deny},
		"forwarded via a wildcard":         {one(Rule{Hosts: []string{"good.*", "hub.example.org"}, Forwarded: &yes, Confirm: never}), w.caller("ssh", "shared", "good"), goodLogin, ConfirmAlways},
		"forwarded via a wildcard, inside": {one(Rule{Hosts: org[:1], Forwarded: &yes, Confirm: never}), w.caller("ssh", "shared", "good"), goodLogin, never},
		"denied host, revoked":             {Approval{Rules: []Rule{{Hosts: []string{"gone.*"}, Confirm: deny}}}, w.caller("ssh", "revoked"), w.login("revoked", true), deny},
		"denied host, data and bind differ": {
			Approval{Rules: []Rule{{Hosts: []string{"Other.*"}, Confirm: deny}}}, stale, w.login("other", true), deny,
		},
		"denied host, a bind has failed":         {Approval{Rules: []Rule{{Hosts: []string{"good.*"}, Confirm: deny}}}, failed, goodLogin, deny},
		"a key that cannot be read":              {one(Rule{Hosts: []string{"g*"}, Confirm: never}), unbound, request.Sign{Content: request.Content{Kind: request.KindLogin}, Login: &request.Login{HostKey: []byte("x")}}, ConfirmAlways},
		"forwarded via an evil host":             {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), fwd, goodLogin, ConfirmAlways},
		"forwarded via an unknown host":          {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.caller("ssh", "new", "good"), goodLogin, ConfirmAlways},
		"forwarded via good hosts":               {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.caller("ssh", "other", "good"), goodLogin, never},
		"forwarded via good hosts, not in words": {one(Rule{Hosts: org, Confirm: never}), w.caller("ssh", "other", "good"), goodLogin, ConfirmAlways},
		"forwarded, the data does not say":       {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.caller("ssh", "other", "good"), w.login("good", false), ConfirmAlways},
		"forwarded, a bind that an evil host has forged": {
			one(Rule{Hosts: []string{"evil.*"}, Forwarded: &yes, Confirm: never}), forged, w.login("other", false), ConfirmAlways,
		},
		"forwarded, for the forwarded session itself": {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.caller("ssh", "good", "-"), goodLogin, ConfirmAlways},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.a.decide(w.use(test.c, test.r)); got.confirm != test.want {
				t.Errorf("%q because of %s, want %q", got.confirm, got.why(), test.want)
			}
		})
	}
}

// What a plain yes is good for.
func TestDecideRemember(t *testing.T) {
	w := newWorld(t)
	u := w.use(w.caller("ssh"), sshsigOf("git"))
	for name, test := range map[string]struct {
		a    Approval
		want Remember
	}{
		"always":                    {Approval{Confirm: ConfirmAlways}, Once},
		"first use":                 {Approval{Confirm: ConfirmFirstUse}, UntilLock},
		"a rule":                    {Approval{Rules: []Rule{{Confirm: ConfirmAlways, Remember: 5}}}, 5},
		"a rule for the first use":  {Approval{Rules: []Rule{{Confirm: ConfirmFirstUse}}}, UntilLock},
		"a rule with both of these": {Approval{Rules: []Rule{{Confirm: ConfirmFirstUse, Remember: 5}}}, 5},
	} {
		if got := test.a.decide(u); got.plain != test.want || got.confirm != ConfirmAlways {
			t.Errorf("%s: %+v, want %v", name, got, test.want)
		}
	}
	for text, r := range map[string]Remember{"once": Once, "until lock": UntilLock, "for 15m": Remember(15 * time.Minute), "for 1h": Remember(time.Hour), "for 1m30s": Remember(90 * time.Second)} {
		if r.String() != text {
			t.Errorf("%q, want %q", r, text)
		}
	}
}

// A key on two tokens is asked about as the stricter one wants.
func TestStrictestHomeCounts(t *testing.T) {
	one, two := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1")
	two.Signer = one.Signer
	w := newWorld(t)
	for name, test := range map[string]struct {
		one, two, want Confirm
		remember       Remember
	}{
		"never and always":     {ConfirmNever, ConfirmAlways, ConfirmAlways, Once},
		"always and never":     {ConfirmAlways, ConfirmNever, ConfirmAlways, Once},
		"always and deny":      {ConfirmAlways, ConfirmDeny, ConfirmDeny, Once},
		"deny and never":       {ConfirmDeny, ConfirmNever, ConfirmDeny, Once},
		"first use and always": {ConfirmFirstUse, ConfirmAlways, ConfirmAlways, Once},
		"always and first use": {ConfirmAlways, ConfirmFirstUse, ConfirmAlways, Once},
	} {
		f := newFixture(Options{Rules: Rules{Approval: func(k request.Key) Approval {
			c := test.one
			if k == request.Key(two) {
				c = test.two
			}
			return Approval{Rules: []Rule{{Confirm: c}}}
		}}}, one, two)
		d := f.decide(w.use(w.caller("ssh"), sshsigOf("git")), f.now().byKey[string(wireOf(one))])
		if d.confirm != test.want || d.plain != test.remember {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// answers is a person with an answer for each question.
type answers struct {
	mu    sync.Mutex
	give  func(ctx context.Context, r Question, n int) (Answer, error)
	asked []Question
	again []bool // for each: "no to everything from here" was offered
	open  int
	most  int
}

func (a *answers) Confirm(ctx context.Context, r Question) (answer Answer, err error) {
	err = waiting.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
		answer, err = a.confirm(ctx, r)
		return err
	}})
	return answer, err
}

func (a *answers) confirm(ctx context.Context, r Question) (Answer, error) {
	a.mu.Lock()
	a.asked = append(a.asked, r)
	a.again = append(a.again, Again(ctx))
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

// says is a person with one answer to all.
func says(a Answer) *answers {
	return &answers{give: func(context.Context, Question, int) (Answer, error) { return a, nil }}
}

// approvals of every key.
func everyKey(a Approval) Rules { return Rules{Approval: func(request.Key) Approval { return a }} }

const quarter = Remember(15 * time.Minute)

// signs makes a request in a world, and fails the test unless it goes as wanted.
func (f *fixture) signs(t *testing.T, k request.Key, c *request.Caller, r request.Sign, want error) {
	t.Helper()
	r.Key = wireOf(k)
	if _, err := f.Sign(t.Context(), c, r); !errors.Is(err, want) {
		t.Errorf("sign: %v, want %v", err, want)
	}
}

// A yes is good for as long as it was given, and no longer.
func TestApprovalLasts(t *testing.T) {
	for name, test := range map[string]struct {
		lasts  Remember
		before time.Duration // nobody is asked
		after  time.Duration // somebody is; 0: never
	}{
		"once":          {Once, -1, time.Nanosecond},
		"for a quarter": {quarter, 15*time.Minute - 1, 15 * time.Minute},
		"until lock":    {UntilLock, 1000 * time.Hour, 0},
		"nonsense":      {-7, -1, time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k, p := newWorld(t), edKey("pkcs11:token=a"), says(Answer{true, test.lasts})
				f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p, Hosts: w.hosts}, k)
				c := w.caller("ssh bash", "good")
				f.signs(t, k, c, w.login("good", true), nil)
				if p.count() != 1 || !p.asked[0].Offer || p.asked[0].Plain != Once {
					t.Fatalf("asked %+v", p.asked)
				}
				if test.before >= 0 {
					time.Sleep(test.before)
					f.signs(t, k, c, w.login("good", true), nil)
					if p.count() != 1 {
						t.Error("asked again too early")
					}
				}
				if test.after > 0 {
					time.Sleep(test.after - max(0, test.before))
					f.signs(t, k, c, w.login("good", true), nil)
					if p.count() != 2 {
						t.Errorf("asked %d times", p.count())
					}
				}
			})
		})
	}
}

// What makes a yes be forgotten.
func TestApprovalForgotten(t *testing.T) {
	w := newWorld(t)
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
			k, p := edKey("pkcs11:token=a;id=1"), says(Answer{true, UntilLock})
			f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmFirstUse}), Confirm: p, Hosts: w.hosts}, k)
			for range 2 {
				f.signs(t, k, w.caller("ssh bash"), sshsigOf("git"), nil)
			}
			test.do(t, f, k)
			f.signs(t, k, w.caller("ssh bash"), sshsigOf("git"), nil)
			want := map[bool]int{true: 1, false: 2}[test.kept]
			if p.count() != want {
				t.Errorf("asked %d times, want %d", p.count(), want)
			}
		})
	}
}

// A yes that was given before the token was put in lasts until it is taken out.
func TestApprovalBeforeInsertion(t *testing.T) {
	w, k, backup, p := newWorld(t), edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1"), says(Answer{true, UntilLock})
	backup.Signer, k.insertions = k.Signer, 3
	var f *fixture
	in := &fakeInserter{answer: func(context.Context, int) (bool, error) {
		backup.insertions++
		f.tokens.setAway([]request.Key{backup}, []request.Key{k})
		return true, nil
	}}
	rules := everyKey(Approval{Confirm: ConfirmFirstUse})
	rules.OfferAway = always
	f = newFixture(Options{Rules: rules, Confirm: p, Insert: in}, k)
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 3 {
		f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	}
	if p.count() != 1 || len(in.asked) != 1 {
		t.Errorf("asked %d times, and %d times to insert it", p.count(), len(in.asked))
	}
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 2 {
		f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	}
	if p.count() != 2 {
		t.Errorf("asked %d times after it was out", p.count())
	}
}

// A yes to a question from before everything was forgotten is for once.
func TestApprovalThatComesLate(t *testing.T) {
	w, k := newWorld(t), edKey("pkcs11:token=a")
	var f *fixture
	p := &answers{give: func(context.Context, Question, int) (Answer, error) {
		f.ForgetApprovals(func(request.Key) bool { return false })
		return Answer{true, UntilLock}, nil
	}}
	f = newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p}, k)
	for range 2 {
		f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	}
	if p.count() != 2 {
		t.Errorf("asked %d times", p.count())
	}
}

// A yes is good for the same kind of use only.
func TestApprovalIsForTheSame(t *testing.T) {
	w := newWorld(t)
	root := w.caller("ssh git bash", "good")
	root.Peer.UID = 0
	socket := w.caller("ssh git bash", "good")
	socket.Socket = &request.Socket{Name: "forward"}
	asUser := w.login("good", true)
	asUser.Login.User = "root"
	for name, test := range map[string]struct {
		c    *request.Caller
		r    request.Sign
		same bool
	}{
		"the same":                   {w.caller("ssh git bash", "good"), w.login("good", true), true},
		"another process":            {&request.Caller{Peer: peer.Peer{Known: true, UID: 1000, Chain: []peer.Process{{PID: 1, Name: "ssh"}, {PID: 2, Name: "git"}, {PID: 3, Name: "bash"}}}}, w.login("good", true), true},
		"git that has called itself": {w.caller("ssh git git git bash", "good"), w.login("good", true), true},
		"another program":            {w.caller("ssh code bash", "good"), w.login("good", true), false},
		"a longer chain":             {w.caller("ssh git bash tmux", "good"), w.login("good", true), false},
		"another host":               {w.caller("ssh git bash", "other"), w.login("other", true), false},
		"no host":                    {w.caller("ssh git bash"), w.login("good", false), false},
		"another user there":         {w.caller("ssh git bash", "good"), asUser, false},
		"git":                        {w.caller("ssh git bash", "good"), sshsigOf("git"), false},
		"forwarded":                  {w.caller("ssh git bash", "other", "good"), w.login("good", true), false},
		"of another user":            {root, w.login("good", true), false},
		"at another socket":          {socket, w.login("good", true), false},
	} {
		t.Run(name, func(t *testing.T) {
			k, p := edKey("pkcs11:token=a"), says(Answer{true, UntilLock})
			f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p, Hosts: w.hosts}, k)
			f.signs(t, k, w.caller("ssh git bash", "good"), w.login("good", true), nil)
			f.signs(t, k, test.c, test.r, nil)
			if same := p.count() == 1; same != test.same {
				t.Errorf("the yes counts: %t, want %t", same, test.same)
			}
			// And for this key only.
			other := edKey("pkcs11:token=b")
			f.tokens.set(k, other)
			n := p.count()
			f.signs(t, other, w.caller("ssh git bash", "good"), w.login("good", true), nil)
			if p.count() != n+1 {
				t.Error("nobody was asked about another key")
			}
		})
	}
	same := func(a, b request.Sign) bool {
		x, _ := sameness(w.use(root, a), "id")
		y, _ := sameness(w.use(root, b), "id")
		return x == y
	}
	if same(sshsigOf("git"), sshsigOf("file")) || !same(sshsigOf("git"), sshsigOf("git")) {
		t.Error("namespaces are not told apart")
	}
	via := func(hosts ...string) string {
		name, _ := sameness(w.use(w.caller("ssh", hosts...), sshsigOf("git")), "id")
		return name
	}
	if via("evil", "-") == via("other", "-") || via("evil", "other", "-") == via("other", "evil", "-") || via("evil", "-") == via("-") {
		t.Error("ways are not told apart")
	}
	a, b := sshsigOf("gi"), sshsigOf("git")
	a.Content.Detail = "t"
	if same(a, b) {
		t.Error("texts run into each other")
	}
}

// Where it is not known what a yes would be good for, it is good for once.
func TestApprovalThatCannotLast(t *testing.T) {
	w := newWorld(t)
	failed := w.caller("ssh", "good")
	failed.BindFailed, failed.Forwarded = true, true
	added, socket := edKey("pkcs11:token=added"), w.caller("ssh")
	socket.Socket = &request.Socket{Name: "ask", Confirm: true}
	for name, test := range map[string]struct {
		k *fakeKey
		c *request.Caller
		r request.Sign
	}{
		"unknown data":                {edKey("pkcs11:token=a"), w.caller("ssh"), request.Sign{Content: request.Content{Kind: request.KindUnknown}}},
		"data of no kind":             {edKey("pkcs11:token=a"), w.caller("ssh"), request.Sign{}},
		"an unknown client":           {edKey("pkcs11:token=a"), &request.Caller{}, sshsigOf("git")},
		"a client that has gone":      {edKey("pkcs11:token=a"), &request.Caller{Peer: peer.Peer{Known: true, PID: 1}}, sshsigOf("git")},
		"a failed bind":               {edKey("pkcs11:token=a"), failed, sshsigOf("git")},
		"another host than bound to":  {edKey("pkcs11:token=a"), w.caller("ssh", "good"), w.login("other", true)},
		"forwarded, for unknown host": {edKey("pkcs11:token=a"), w.caller("ssh", "evil", "good"), w.login("good", false)},
		"ssh-add -c":                  {added, w.caller("ssh"), sshsigOf("git")},
		"a socket that asks":          {edKey("pkcs11:token=a"), socket, sshsigOf("git")},
	} {
		t.Run(name, func(t *testing.T) {
			p := says(Answer{true, UntilLock})
			f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmFirstUse}), Confirm: p, Hosts: w.hosts}, test.k)
			if test.k == added {
				f.add(t, added.uri, request.Constraints{Confirm: true})
			}
			for range 2 {
				f.signs(t, test.k, test.c, test.r, nil)
			}
			if p.count() != 2 {
				t.Fatalf("asked %d times", p.count())
			}
			if r := p.asked[0]; r.Offer || r.Plain != Once {
				t.Errorf("offers to remember it: %+v", r)
			}
		})
	}
}

// An earlier yes does not stand in for the one that ssh-add -c wants.
func TestConstraintAsksInSpiteOfApproval(t *testing.T) {
	w, k, p := newWorld(t), edKey("pkcs11:token=a;id=1"), says(Answer{true, UntilLock})
	f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmFirstUse}), Confirm: p}, k)
	f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	f.add(t, k.uri, request.Constraints{Confirm: true})
	f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	if p.count() != 2 {
		t.Errorf("asked %d times", p.count())
	}
}

func TestDenied(t *testing.T) {
	w, k, p := newWorld(t), edKey("pkcs11:token=a"), says(Answer{true, UntilLock})
	rules := everyKey(Approval{Rules: []Rule{{Programs: []string{"ide"}, Confirm: ConfirmDeny}}})
	f := newFixture(Options{Rules: rules, Confirm: p}, k)
	r := sshsigOf("git")
	r.Key = wireOf(k)
	_, err := f.Sign(t.Context(), w.caller("ssh git ide"), r)
	if _, ok := errors.AsType[*DeniedError](err); !ok || p.count() != 0 || k.signed != 0 {
		t.Errorf("%v, %d questions, %d signatures", err, p.count(), k.signed)
	}
	if !strings.Contains(f.log.String(), "rule 1 of the key in the configuration refuses it") {
		t.Errorf("the log does not say why: %s", f.log)
	}
	f.signs(t, k, w.caller("ssh git bash"), sshsigOf("git"), nil)
	// Not even with a constraint that asks.
	f.add(t, "pkcs11:", request.Constraints{Confirm: true})
	if _, err := f.Sign(t.Context(), w.caller("ssh git ide"), r); err == nil || p.count() != 0 {
		t.Errorf("%v, %d questions", err, p.count())
	}
}

// What is to be confirmed and cannot be is refused.
func TestNobodyToAsk(t *testing.T) {
	w, k := newWorld(t), edKey("pkcs11:token=a")
	f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways})}, k)
	f.opts.Confirm = nil
	f.signs(t, k, w.caller("ssh"), sshsigOf("git"), errNobody)
	errNoPrompt := errors.New("no display")
	f.opts.Confirm = &answers{give: func(context.Context, Question, int) (Answer, error) { return Answer{true, UntilLock}, errNoPrompt }}
	for range 2 {
		f.signs(t, k, w.caller("ssh"), sshsigOf("git"), errNoPrompt)
	}
	if k.signed != 0 {
		t.Error("it has signed")
	}
}

// Fifty requests of one kind are one prompt, and have one outcome.
func TestApprovalIsShared(t *testing.T) {
	for name, test := range map[string]struct {
		answer Answer
		err    error
		next   int // questions after one more request
	}{
		"once":        {Answer{true, Once}, nil, 2},
		"for longer":  {Answer{true, quarter}, nil, 1},
		"no":          {Answer{}, errDeclined, 2},
		"no for ever": {Answer{false, UntilLock}, errDeclined, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k := newWorld(t), edKey("pkcs11:token=a")
				answer := make(chan Answer)
				p := &answers{give: func(ctx context.Context, r Question, _ int) (Answer, error) {
					if request.UseFrom(ctx) != r.Use || request.PeerFrom(ctx).PID != 10 {
						t.Error("who is asked does not know what for")
					}
					return <-answer, nil
				}}
				f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p, Hosts: w.hosts}, k)
				var all sync.WaitGroup
				for range 50 {
					all.Go(func() { f.signs(t, k, w.caller("ssh bash", "good"), w.login("good", true), test.err) })
				}
				// Another kind asks for itself.
				all.Go(func() { f.signs(t, k, w.caller("ssh bash"), sshsigOf("git"), test.err) })
				synctest.Wait()
				if p.count() != 2 {
					t.Fatalf("%d prompts", p.count())
				}
				answer <- test.answer
				answer <- test.answer
				all.Wait()
				time.Sleep(firstPause) // which follows two of the noes
				done := make(chan struct{})
				go func() {
					f.signs(t, k, w.caller("ssh bash", "good"), w.login("good", true), test.err)
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

// The same with real goroutines, for the race detector; some hang up.
func TestApprovalIsSharedByMany(t *testing.T) {
	w, k := newWorld(t), edKey("pkcs11:token=a")
	p := &answers{give: func(context.Context, Question, int) (Answer, error) { return Answer{true, UntilLock}, nil }}
	f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p, Hosts: w.hosts}, k)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				go cancel()
			}
			r := w.login("good", true)
			r.Key = wireOf(k)
			if _, err := f.Sign(ctx, w.caller("ssh bash", "good"), r); err != nil && ctx.Err() == nil {
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

// ssh-add -c means each use: nobody shares its prompts.
func TestConstraintIsNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := newWorld(t), edKey("pkcs11:token=a")
		answer := make(chan Answer)
		p := &answers{give: func(context.Context, Question, int) (Answer, error) { return <-answer, nil }}
		f := newFixture(Options{Confirm: p}, k)
		f.add(t, "pkcs11:", request.Constraints{Confirm: true})
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil) })
		}
		synctest.Wait()
		if p.count() != 3 {
			t.Errorf("%d prompts", p.count())
		}
		for range 3 {
			answer <- Answer{Allowed: true}
		}
		all.Wait()
	})
}

// A prompt that nobody waits for any more goes, and one that somebody waits for
// stays.
func TestApprovalPromptEndsWithItsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := newWorld(t), edKey("pkcs11:token=a")
		p := &answers{give: func(ctx context.Context, _ Question, _ int) (Answer, error) {
			<-ctx.Done()
			return Answer{}, ctx.Err()
		}}
		f := newFixture(Options{Rules: everyKey(Approval{Confirm: ConfirmAlways}), Confirm: p}, k)
		first, hangUp := context.WithCancel(t.Context())
		second, hangUpToo := context.WithCancel(t.Context())
		for _, ctx := range []context.Context{first, second} {
			go func() {
				r := sshsigOf("git")
				r.Key = wireOf(k)
				_, _ = f.Sign(ctx, w.caller("ssh"), r)
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

// Keys in memory, and those of upstream agents, have the rules of all keys.
func TestApprovalOfOtherKeys(t *testing.T) {
	w, k, p := newWorld(t), edKey("soft"), says(Answer{true, UntilLock})
	rules := Rules{Approval: func(k request.Key) Approval {
		if k != nil {
			t.Errorf("asked about %v", k)
		}
		return Approval{Confirm: ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, SoftwareKeys: true})
	pub := publicOf(t, k)
	if err := f.Add(t.Context(), local, request.AddKey{Private: k.Signer, Public: pub}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	}
	if p.count() != 1 {
		t.Errorf("asked %d times", p.count())
	}
	f.ForgetApprovals(func(k request.Key) bool { return k == nil })
	f.signs(t, k, w.caller("ssh"), sshsigOf("git"), nil)
	if p.count() != 2 {
		t.Errorf("asked %d times after all was forgotten", p.count())
	}
}

func TestApprovalOfUpstreamKeys(t *testing.T) {
	w, p, deny := newWorld(t), says(Answer{true, UntilLock}), false
	up := keytest.New(t)
	rules := Rules{Approval: func(k request.Key) Approval {
		if deny {
			return Approval{Rules: []Rule{{Confirm: ConfirmDeny}}}
		}
		return Approval{Confirm: ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, Upstreams: []Upstream{&fakeUpstream{name: "gcr", keys: []keytest.Key{up}}}})
	r := sshsigOf("git")
	r.Key = up.Public.Marshal()
	for range 2 {
		if _, err := f.Sign(t.Context(), w.caller("ssh"), r); err != nil {
			t.Error(err)
		}
	}
	if p.count() != 1 || p.asked[0].Comment != "a key of the agent at gcr" || p.asked[0].Content != r.Content {
		t.Errorf("asked %+v", p.asked)
	}
	deny = true
	if _, err := f.Sign(t.Context(), w.caller("ssh"), r); err == nil {
		t.Error("the other agent has signed what is denied")
	}
}

// What is remembered is bounded, and the oldest goes first.
func TestApprovalsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a approvals
		id := &identity{wire: "id"}
		a.keep("short", id, &request.Use{Caller: local}, quarter, 0)
		for i := range maxApprovals + 10 {
			time.Sleep(time.Second)
			a.keep(fmt.Sprint(i), id, &request.Use{Caller: local}, UntilLock, 0)
		}
		if len(a.kept) != maxApprovals {
			t.Errorf("%d are remembered", len(a.kept))
		}
		if a.has("short", id) || a.has("0", id) || !a.has(fmt.Sprint(maxApprovals+9), id) || !a.has("500", id) {
			t.Errorf("the wrong ones were forgotten: %v", slices.Sorted(maps.Keys(a.kept))[:10])
		}
	})
}

// A clock that is set, or stands still, does not make a yes last longer.
func TestApprovalClock(t *testing.T) {
	const m = time.Minute
	for name, test := range map[string]struct {
		lasts         Remember
		running, wall time.Duration
		over          bool
	}{
		"a while ago":          {quarter, 14 * m, 14 * m, false},
		"long ago":             {quarter, 15 * m, 15 * m, true},
		"the machine slept":    {quarter, m, 15 * m, true},
		"the clock was set":    {quarter, 15 * m, m, true},
		"before it was given":  {quarter, m, -m, true},
		"until lock":           {UntilLock, 1000 * time.Hour, 1000 * time.Hour, false},
		"until lock, set back": {UntilLock, m, -m, false},
	} {
		if test.lasts.over(test.running, test.wall) != test.over {
			t.Errorf("%s: over is %t", name, !test.over)
		}
	}
}
