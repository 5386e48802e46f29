package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret/secrettest"
)

// The tests of this file attack the keyring. Attacks on whole programs are in
// cmd/p11-agent/testdata/attack.

// spellings are ways to name the key pkcs11:token=a;id=1 of fakeTokens.
var spellings = []string{"pkcs11:token=a;id=1", "pkcs11:token=a", "pkcs11:token", "pkcs11:"}

// A client adds a key of a token with limits, and again without. The key keeps the limits,
// by any name and in any order.
func TestAttack02AddAgain(t *testing.T) {
	host, other := keytest.New(t).Public, keytest.New(t).Public
	sign := func(t *testing.T, f *fixture, key []byte, c *request.Caller) error {
		t.Helper()
		_, err := f.Sign(t.Context(), c, request.Sign{Key: key, Data: []byte("data"), Login: login("me", c)})
		return err
	}
	for name, automatic := range map[string][]request.Selection{"automatic": nil, "added": {}} {
		for _, first := range spellings {
			for _, second := range spellings {
				t.Run(fmt.Sprintf("%s, %s and then %s", name, first, second), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						k := edKey("pkcs11:token=a;id=1")
						f := newFixture(Options{Rules: Rules{Automatic: automatic}}, k)
						f.add(t, first, request.Constraints{Confirm: true, Lifetime: time.Minute, Destinations: []request.Destination{to("", nil, host)}})
						time.Sleep(30 * time.Second)
						f.add(t, second, request.Constraints{})
						f.add(t, second, request.Constraints{Lifetime: time.Hour, Destinations: []request.Destination{to("", nil, host), to("", nil, other)}})
						if err := sign(t, f, wireOf(k), boundTo(false, host)); !errors.Is(err, approval.ErrDeclined) {
							t.Errorf("no question was shown: %v", err)
						}
						f.confirm.answer = true
						if err := sign(t, f, wireOf(k), boundTo(false, host)); err != nil {
							t.Errorf("where both additions permit it: %v", err)
						}
						if err := sign(t, f, wireOf(k), boundTo(false, other)); !errors.Is(err, errElsewhere) {
							t.Errorf("where only the second permits it: %v", err)
						}
						time.Sleep(30 * time.Second)
						if err := sign(t, f, wireOf(k), boundTo(false, host)); !errors.Is(err, errUnknownKey) {
							t.Errorf("after its time: %v", err)
						}
					})
				})
			}
		}
	}
}

// Limits of a later addition count like those of an earlier addition.
func TestAttack02Tighten(t *testing.T) {
	k := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{}, k)
	for range 2 {
		f.add(t, "pkcs11:token=a;id=1", request.Constraints{})
		f.add(t, "pkcs11:token=a", request.Constraints{Confirm: true})
	}
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); !errors.Is(err, approval.ErrDeclined) {
		t.Errorf("no question was shown: %v", err)
	}
}

// A client adds a key with certificates only, and adds it again without that limit. The
// agent still shows the key with certificates only, unless the configuration offers it.
func TestAttack02CertificatesOnly(t *testing.T) {
	k, ca := keytest.New(t), keytest.New(t)
	cert := k.Certificate(t, ca, ssh.UserCert, serial(1))
	only := request.Constraints{Certificates: []*ssh.Certificate{cert}, CertificatesOnly: true}
	for name, test := range map[string]struct {
		automatic []request.Selection
		want      []string
	}{
		"added":     {[]request.Selection{}, []string{"cert 1"}},
		"automatic": {nil, []string{"key", "cert 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: test.automatic}}, &fakeKey{Signer: k.Private, uri: "pkcs11:token=a;id=1", insertions: 1})
			f.add(t, "pkcs11:token=a", only)
			f.add(t, "pkcs11:token=a;id=1", request.Constraints{})
			f.wantTypes(t, test.want...)
		})
	}
}

// If a client adds a key again while its token is absent, the key does not count as removed.
func TestAttack02Away(t *testing.T) {
	a, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1")
	f := newFixture(Options{}, a, b)
	f.add(t, "pkcs11:token=a", request.Constraints{Confirm: true})
	f.tokens.mu.Lock()
	f.tokens.away = []request.Key{a}
	f.tokens.mu.Unlock()
	f.tokens.set(b)
	f.add(t, "pkcs11:", request.Constraints{})
	a.insertions++
	f.tokens.mu.Lock()
	f.tokens.away = nil
	f.tokens.mu.Unlock()
	f.tokens.set(a, b)
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(a)}); !errors.Is(err, approval.ErrDeclined) {
		t.Errorf("no question was shown: %v", err)
	}
}

// A client removes a key and adds it again without its limits. That costs a PIN or an
// approval, for each way of removing the key and of bringing it back.
func TestAttack02RemoveAndReturn(t *testing.T) {
	const uri = "pkcs11:token=a;id=1"
	host := keytest.New(t).Public
	had := map[string]request.Constraints{
		"confirm":      {Confirm: true},
		"destinations": {Destinations: []request.Destination{to("", nil, host)}},
		"lifetime":     {Lifetime: time.Minute},
	}
	removed := map[string]func(f *fixture, k *fakeKey) error{
		"-d": func(f *fixture, k *fakeKey) error { return f.Remove(context.Background(), local, wireOf(k)) },
		"-e": func(f *fixture, _ *fakeKey) error {
			return f.RemoveToken(context.Background(), local, request.Token{Provider: []byte(uri)})
		},
		"-e of the token": func(f *fixture, _ *fakeKey) error {
			return f.RemoveToken(context.Background(), local, request.Token{Provider: []byte("pkcs11:token=a")})
		},
		"-D": func(f *fixture, _ *fakeKey) error { return f.RemoveAll(context.Background(), local) },
		"its time is over": func(f *fixture, k *fakeKey) error {
			f.addAt(time.Second, uri)
			time.Sleep(time.Second)
			return nil
		},
	}
	returns := map[string]func(f *fixture, k *fakeKey){
		"is added":                 func(f *fixture, _ *fakeKey) { f.addAt(0, uri) },
		"is added with the others": func(f *fixture, _ *fakeKey) { f.addAt(0, "pkcs11:") },
		"is inserted":              func(f *fixture, k *fakeKey) { k.insertions++; f.tokens.set(k) },
		"is configured":            func(f *fixture, _ *fakeKey) { f.Configure(f.opts.Rules) },
	}
	for what, constraints := range had {
		for goes, remove := range removed {
			for comes, back := range returns {
				for _, asks := range []bool{true, false} {
					t.Run(fmt.Sprintf("%s, removed by %s, %s, PIN %v", what, goes, comes, asks), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							k := edKey(uri)
							f := newFixture(Options{}, k)
							f.add(t, uri, constraints)
							if err := remove(f, k); err != nil {
								t.Fatal(err)
							}
							f.wantList(t)
							back(f, k)
							f.wantList(t, k.uri)
							k.asks = asks
							sign := func() error {
								c := boundTo(false, keytest.New(t).Public)
								_, err := f.Sign(t.Context(), c, request.Sign{Key: wireOf(k), Login: login("me", c)})
								return err
							}
							id, old := f.now().identities[0], limitsOf(&constraints, 0)
							if id.owed == nil {
								// Its addition still exists, with the limits.
								byItself := comes == "is inserted" || comes == "is configured"
								if named := goes == "-e" || goes == "-D"; id.limits.looser(&old) || named || !byItself {
									t.Errorf("it has %+v, and nothing is due for that", id.limits)
								}
								return
							}
							if asks {
								// The prompt for the PIN names the use.
								if err := sign(); err != nil || len(f.confirm.asked) > 0 || !k.use.Unlimited {
									t.Errorf("with a PIN: %v, asked %q, %+v", err, f.confirm.asked, k.use)
								}
							} else {
								if err := sign(); !errors.Is(err, approval.ErrDeclined) || k.signed > 0 {
									t.Errorf("without anything: %v", err)
								}
								f.confirm.answer = true
								if err := sign(); err != nil || !f.confirm.use.Unlimited {
									t.Errorf("with an approval: %v", err)
								}
							}
							// The second use costs nothing.
							n := len(f.confirm.asked)
							k.asks = false
							if err := sign(); err != nil || len(f.confirm.asked) != n || k.use.Unlimited {
								t.Errorf("afterwards: %v, asked %q", err, f.confirm.asked)
							}
						})
					})
				}
			}
		}
	}
}

// addAt adds a provider with a lifetime as its only limit. It panics if that fails.
func (f *fixture) addAt(lifetime time.Duration, provider string) {
	r := request.Token{Provider: []byte(provider), Constraints: request.Constraints{Lifetime: lifetime}}
	if err := f.AddToken(context.Background(), local, r); err != nil {
		panic(err)
	}
}

// A client removes a key and adds it again with a PIN. If the token takes the PIN, the next
// use costs nothing. A token that is logged in tries no PIN: then the use has its cost.
func TestAttack02PIN(t *testing.T) {
	for _, asks := range []bool{true, false} {
		k := edKey("pkcs11:token=a;id=1")
		f := newFixture(Options{}, k)
		f.add(t, k.uri, request.Constraints{Confirm: true})
		if err := f.Remove(t.Context(), local, wireOf(k)); err != nil {
			t.Fatal(err)
		}
		k.asks = asks
		if err := f.AddToken(t.Context(), local, request.Token{Provider: []byte(k.uri), PIN: secrettest.Of(t, "1234")}); err != nil {
			t.Fatal(err)
		}
		k.asks = false
		if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); (err == nil) != asks {
			t.Errorf("the token wanted a PIN %v: %v", asks, err)
		}
	}
}

// A person gives a PIN for another request while this request waits. This request still
// costs an approval.
func TestAttack02PINOfOthers(t *testing.T) {
	k := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{}, k)
	f.add(t, k.uri, request.Constraints{Confirm: true})
	if err := f.Remove(t.Context(), local, wireOf(k)); err != nil {
		t.Fatal(err)
	}
	f.addAt(0, k.uri)
	k.asks, k.another = true, true
	for _, yes := range []bool{false, true} {
		f.confirm.answer = yes
		sig, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)})
		if (err == nil) != yes || (sig != nil) != yes || f.confirm.use == nil || !f.confirm.use.Unlimited {
			t.Errorf("a person says %v: %v, asked %q", yes, err, f.confirm.asked)
		}
	}
}

// A host with a forwarded agent cannot lift limits, and cannot use a loss of limits.
func TestAttack02Forwarded(t *testing.T) {
	host, bad := keytest.New(t).Public, keytest.New(t).Public
	k := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{RemoteTokens: true}, k)
	f.add(t, k.uri, request.Constraints{Destinations: []request.Destination{to("", nil, host)}})
	from := boundTo(true, bad)
	sees := func() bool {
		list, err := f.List(t.Context(), from)
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Identities) > 0
	}
	for what, do := range map[string]func() error{
		"-d": func() error { return f.Remove(t.Context(), from, wireOf(k)) },
		"-e": func() error { return f.RemoveToken(t.Context(), from, request.Token{Provider: []byte(k.uri)}) },
		"-s": func() error { return f.AddToken(t.Context(), from, request.Token{Provider: []byte(k.uri)}) },
	} {
		if err := do(); err == nil {
			t.Errorf("%s of a key that it does not see", what)
		}
	}
	if err := f.RemoveAll(t.Context(), from); err != nil {
		t.Error(err)
	}
	f.wantList(t, k.uri)
	// The person removes it, and it comes back by itself.
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	k.insertions++
	f.tokens.set(k)
	f.wantList(t, k.uri)
	if sees() {
		t.Error("the host sees the key once it is back")
	}
	f.confirm.answer = true
	if _, err := f.Sign(t.Context(), from, request.Sign{Key: wireOf(k), Login: login("me", from)}); err == nil {
		t.Error("the host uses the key once it is back")
	}
	// After the person has agreed to the loss, the key is like any other key.
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); err != nil {
		t.Fatal(err)
	}
	if !sees() {
		t.Error("the host does not see the key although a person has agreed")
	}
}

// The number of different destinations of a key is bounded. At the bound, no limit gets
// looser.
func TestAttack02ManyRoutes(t *testing.T) {
	k := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{}, k)
	for i := range maxRoutes + 2 {
		err := f.AddToken(t.Context(), local, request.Token{
			Provider: []byte(k.uri), Constraints: request.Constraints{Destinations: []request.Destination{to("", nil, keytest.New(t).Public)}},
		})
		if full := i >= maxRoutes; (err != nil) != full {
			t.Fatalf("destination %d: %v", i+1, err)
		}
	}
	all := limits{}
	for range maxRoutes + 1 {
		all = all.and(limits{routes: []route{{to("", nil, keytest.New(t).Public)}}})
	}
	if !all.indeterminate || !new(limits).looser(&all) || all.permits(boundTo(false, keytest.New(t).Public)) == nil {
		t.Errorf("%+v", all)
	}
}

// The agent signs 1,024 bytes for ssh-add only. TestRunsSystemProgram checks which program
// that is.
func TestAttack03(t *testing.T) {
	k := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{Rules: Rules{Allow: func(request.Key) []request.Kind { return nil }}}, k)
	f.confirm.answer = true
	sshAdd := peer.Peer{Known: true, PID: 4711, Program: peer.Program{Path: "/usr/bin/ssh-add", Dev: 1, Ino: 1}}
	for name, c := range map[string]*request.Caller{
		"forwarded":        {Peer: sshAdd, Forwarded: true},
		"bound":            {Peer: sshAdd, Binds: boundTo(false, keytest.New(t).Public).Binds},
		"a failed bind":    {Peer: sshAdd, BindFailed: true},
		"by its name only": {Peer: sshAdd},
		"unknown":          {},
	} {
		_, err := f.Sign(t.Context(), c, request.Sign{Key: wireOf(k), Data: make([]byte, 1024), Content: request.Content{Kind: request.KindTest}})
		if kind, ok := errors.AsType[*KindError](err); !ok || kind.Content.Kind != request.KindUnknown || !strings.Contains(err.Error(), "ssh-add -T") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if k.signed > 0 || len(f.confirm.asked) > 0 {
		t.Errorf("%d signatures, asked %q", k.signed, f.confirm.asked)
	}
	// A key in memory signs everything, and a prompt does not call it a test.
	soft := keytest.New(t)
	f = newFixture(Options{SoftwareKeys: true})
	f.confirm.answer = true
	if err := f.Add(t.Context(), local, addKey(soft, request.Constraints{Confirm: true})); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Sign(t.Context(), forwarded, request.Sign{Key: soft.Public.Marshal(), Content: request.Content{Kind: request.KindTest}}); err != nil {
		t.Error(err)
	}
	if what := f.confirm.use.What(); what != "UNKNOWN DATA" {
		t.Errorf("the prompt says %q", what)
	}
}

// walls is an agent with keys of all kinds, for TestAttack04Walk.
type walls struct {
	*fixture
	shown, sibling, other, limited *fakeKey // of the tokens b, b, a and d
	soft, theirs                   keytest.Key
	upstream                       *fakeUpstream
	host                           ssh.PublicKey // where the limited key may be used
	bad                            ssh.PublicKey // where it may not
}

func newWalls(t *testing.T) *walls {
	w := &walls{
		shown: edKey("pkcs11:token=b;id=1"), sibling: edKey("pkcs11:token=b;id=2"),
		other: edKey("pkcs11:token=a;id=1"), limited: edKey("pkcs11:token=d;id=1"),
		soft: keytest.New(t), theirs: keytest.New(t), host: keytest.New(t).Public, bad: keytest.New(t).Public,
	}
	w.upstream = &fakeUpstream{name: "upstream", keys: []keytest.Key{w.theirs}}
	w.fixture = newFixture(Options{
		SoftwareKeys: true, RemoteTokens: true, Upstreams: []Upstream{w.upstream},
		Report: func(Status, request.Selection) ([]byte, error) { return []byte("{}"), nil },
	}, w.shown, w.sibling, w.other, w.limited)
	w.confirm.answer = true
	w.add(t, "pkcs11:token=d", request.Constraints{Destinations: []request.Destination{to("", nil, w.host)}})
	w.add(t, "pkcs11:token=a", request.Constraints{Confirm: true})
	if err := w.Add(t.Context(), local, addKey(w.soft, request.Constraints{})); err != nil {
		t.Fatal(err)
	}
	w.wantList(t, w.shown.uri, w.sibling.uri, w.other.uri, w.limited.uri, "file", "upstream")
	w.tokens.pins, w.tokens.logins, w.tokens.remote, w.tokens.logouts = nil, nil, nil, 0
	return w
}

// state returns all that a request may change: the keys, by their comments, and the tokens.
func (w *walls) state(t *testing.T) map[string]string {
	all := make(map[string]string)
	w.mu.Lock()
	for _, key := range w.knownLocked() {
		all[key.URI()] = fmt.Sprintf("hidden %d, owes %v", w.hidden[key.wire], w.owed[key.wire])
	}
	w.mu.Unlock()
	if w.lock.locked() {
		all["agent"] = "locked"
	}
	for _, id := range w.now().identities {
		all[id.Comment] += fmt.Sprintf(", listed with %+v", id.limits)
	}
	all["upstream"] = fmt.Sprint(len(w.upstream.removed), len(w.upstream.passed))
	return all
}

// TestAttack04Walk sends every request for every key from every kind of connection. A
// connection neither uses nor changes a key that it does not see.
func TestAttack04Walk(t *testing.T) {
	type do func(w *walls, c *request.Caller) error
	ctx := context.Background()
	sign := func(key func(*walls) []byte) do {
		return func(w *walls, c *request.Caller) error {
			_, err := w.Sign(ctx, c, request.Sign{Key: key(w), Data: []byte("data"), Login: login("me", c)})
			return err
		}
	}
	remove := func(key func(*walls) []byte) do {
		return func(w *walls, c *request.Caller) error { return w.Remove(ctx, c, key(w)) }
	}
	add := func(provider string) do {
		return func(w *walls, c *request.Caller) error {
			return w.AddToken(ctx, c, request.Token{Provider: []byte(provider), PIN: secrettest.Of(t, "0000"), Constraints: request.Constraints{Lifetime: time.Hour}})
		}
	}
	removeToken := func(provider string) do {
		return func(w *walls, c *request.Caller) error {
			return w.RemoveToken(ctx, c, request.Token{Provider: []byte(provider)})
		}
	}
	var (
		shown   = func(w *walls) []byte { return wireOf(w.shown) }
		sibling = func(w *walls) []byte { return wireOf(w.sibling) }
		other   = func(w *walls) []byte { return wireOf(w.other) }
		limited = func(w *walls) []byte { return wireOf(w.limited) }
		soft    = func(w *walls) []byte { return w.soft.Public.Marshal() }
		theirs  = func(w *walls) []byte { return w.theirs.Public.Marshal() }
	)
	// The columns: on the main socket; at a socket for one key that may change it; at one
	// that is read-only, as is the default; at a read-only one for all keys; at one that
	// confirms and may change; forwarded; forwarded to a socket for one key; bound for
	// logging in where the limited key may be used; and while the agent is locked.
	columns := []string{"main", "some", "some-ro", "read-only", "confirm", "forwarded", "some-fwd", "login", "locked"}
	caller := map[string]func(*walls) *request.Caller{
		"main": func(*walls) *request.Caller { return ourselves(t) },
		"some": func(*walls) *request.Caller {
			return &request.Caller{Socket: &request.Socket{Only: []request.Selection{prefix("pkcs11:token=b;id=1")}}}
		},
		"some-ro": func(*walls) *request.Caller {
			return &request.Caller{Socket: &request.Socket{Only: []request.Selection{prefix("pkcs11:token=b;id=1")}, ReadOnly: true}}
		},
		"read-only": func(*walls) *request.Caller { return &request.Caller{Socket: &request.Socket{ReadOnly: true}} },
		"confirm": func(*walls) *request.Caller {
			return &request.Caller{Socket: &request.Socket{Confirm: approval.ConfirmAlways}}
		},
		"forwarded": func(w *walls) *request.Caller { return boundTo(true, w.bad) },
		"some-fwd": func(w *walls) *request.Caller {
			c := boundTo(true, w.bad)
			c.Socket = &request.Socket{Only: []request.Selection{prefix("pkcs11:token=b;id=1")}}
			return c
		},
		"login":  func(w *walls) *request.Caller { return boundTo(false, w.host) },
		"locked": func(*walls) *request.Caller { return ourselves(t) },
	}
	// The keys that each column sees.
	all := []string{"pkcs11:token=b;id=1", "pkcs11:token=b;id=2", "pkcs11:token=a;id=1", "pkcs11:token=d;id=1", "file", "agent", "upstream"}
	sees := map[string][]string{
		"main": all, "read-only": all, "confirm": all, "login": all,
		"some": all[:1], "some-ro": all[:1], "some-fwd": all[:1],
		"forwarded": {"pkcs11:token=b;id=1", "pkcs11:token=b;id=2", "pkcs11:token=a;id=1", "file", "agent", "upstream"},
	}
	// The rows: a method, its argument, and the columns where it succeeds.
	rows := []struct {
		method, what string
		do           do
		done         string // columns
	}{
		{"Sign", "the shown key", sign(shown), "main some some-ro read-only confirm forwarded some-fwd login"},
		{"Sign", "its sibling", sign(sibling), "main read-only confirm forwarded login"},
		{"Sign", "another key", sign(other), "main read-only confirm forwarded login"},
		{"Sign", "the limited key", sign(limited), "login"},
		{"Sign", "one in memory", sign(soft), "main read-only confirm forwarded login"},
		{"Sign", "one of the other agent", sign(theirs), "main read-only confirm forwarded login"},
		{"AddToken", "the shown key", add("pkcs11:token=b;id=1"), "main some confirm forwarded some-fwd login"},
		{"AddToken", "its token", add("pkcs11:token=b"), "main some confirm forwarded some-fwd login"},
		{"AddToken", "another key", add("pkcs11:token=a"), "main confirm forwarded login"},
		{"AddToken", "the limited key", add("pkcs11:token=d"), "main confirm login"},
		{"AddToken", "everything", add("pkcs11:"), "main some confirm forwarded some-fwd login"},
		{"Add", "one in memory", func(w *walls, c *request.Caller) error {
			return w.Add(ctx, c, addKey(w.soft, request.Constraints{Lifetime: time.Hour}))
		}, "main confirm forwarded login"},
		{"RemoveToken", "the shown key", removeToken("pkcs11:token=b;id=1"), "main some confirm forwarded some-fwd login"},
		{"RemoveToken", "its token", removeToken("pkcs11:token=b"), "main some confirm forwarded some-fwd login"},
		{"RemoveToken", "another key", removeToken("pkcs11:token=a"), "main confirm forwarded login"},
		{"RemoveToken", "the limited key", removeToken("pkcs11:token=d"), "main confirm login"},
		{"RemoveToken", "everything", removeToken("pkcs11:"), "main some confirm forwarded some-fwd login"},
		{"Remove", "the shown key", remove(shown), "main some confirm forwarded some-fwd login"},
		{"Remove", "its sibling", remove(sibling), "main confirm forwarded login"},
		{"Remove", "another key", remove(other), "main confirm forwarded login"},
		{"Remove", "the limited key", remove(limited), "main confirm login"},
		{"Remove", "one in memory", remove(soft), "main confirm forwarded login"},
		{"Remove", "one of the other agent", remove(theirs), "main confirm forwarded login"},
		{"RemoveAll", "", func(w *walls, c *request.Caller) error { return w.RemoveAll(ctx, c) }, "main some confirm forwarded some-fwd login"},
		{"Lock", "", func(w *walls, c *request.Caller) error { return w.Lock(ctx, c, secrettest.Of(t, "x")) }, "main confirm"},
		{"Unlock", "", func(w *walls, c *request.Caller) error { return w.Unlock(ctx, c, secrettest.Of(t, "sesame")) }, "locked"},
		{"Pass", "", func(w *walls, c *request.Caller) error { _, err := w.Pass(ctx, c, []byte{1}); return err }, "main forwarded login"},
		{"Status", "", func(w *walls, c *request.Caller) error { _, err := w.Status(ctx, c, nil); return err }, "main locked"},
		{"Login", "", func(w *walls, c *request.Caller) error {
			_, err := w.Login(ctx, c, request.TokenLogin{Provider: []byte("pkcs11:token=a"), PIN: secrettest.Of(t, "1234")})
			return err
		}, "main"},
		{"Logout", "", func(w *walls, c *request.Caller) error { return w.Logout(ctx, c, nil) }, "main locked"},
		{"List", "", nil, ""},
	}
	methods := map[string]bool{"Refuse": true} // it notes what the door has refused
	for _, row := range rows {
		methods[row.method] = true
		for _, column := range columns {
			t.Run(strings.TrimSpace(row.method+" "+row.what)+" "+column, func(t *testing.T) {
				w := newWalls(t)
				if column == "locked" {
					if err := w.Lock(ctx, local, secrettest.Of(t, "sesame")); err != nil {
						t.Fatal(err)
					}
					w.tokens.logouts = 0
				}
				c, visible := caller[column](w), sees[column]
				if row.do == nil {
					list, err := w.List(ctx, c)
					if err != nil {
						t.Fatal(err)
					}
					var got []string
					for _, id := range list.Identities {
						got = append(got, id.Comment)
					}
					if want := slices.DeleteFunc(slices.Clone(visible), func(s string) bool { return s == "agent" }); !slices.Equal(got, want) {
						t.Errorf("listed %q, want %q", got, want)
					}
					return
				}
				before := w.state(t)
				err := row.do(w, c)
				if want := slices.Contains(strings.Fields(row.done), column); (err == nil) != want {
					t.Errorf("done %v, want %v: %v", err == nil, want, err)
				}
				after := w.state(t)
				for name, was := range before {
					if now := after[name]; now != was && (!slices.Contains(visible, name) && column != "locked" || err != nil) {
						t.Errorf("%s was %q and is %q", name, was, now)
					}
				}
				if logouts := w.tokens.logouts; logouts > 0 && !slices.Contains([]string{"main", "confirm", "login", "locked"}, column) {
					// A forwarded -D logs out if it sees all keys of a token.
					if column != "forwarded" || slices.Contains(w.tokens.logins, "out of pkcs11:token=d") {
						t.Errorf("%d logouts: %q", logouts, w.tokens.logins)
					}
				}
				if confined(c) && slices.Contains(w.tokens.remote, false) {
					t.Error("a name that it gave was looked up as one of this machine")
				}
			})
		}
	}
	for method := range reflect.TypeFor[*Keyring]().Methods() {
		takes := false
		for i := range method.Type.NumIn() {
			takes = takes || method.Type.In(i) == reflect.TypeFor[*request.Caller]()
		}
		if takes != methods[method.Name] {
			t.Errorf("%s takes a Caller: %v, is in the table: %v", method.Name, takes, methods[method.Name])
		}
	}
}

// The agent tries a PIN from a socket for some keys only on the tokens of these keys.
func TestAttack04PIN(t *testing.T) {
	w := newWalls(t)
	some := &request.Caller{Socket: &request.Socket{Only: []request.Selection{prefix("pkcs11:token=b;id=1")}}}
	for _, provider := range []string{"pkcs11:token=a", "pkcs11:token=d", "pkcs11:token=b;id=2", "pkcs11:token=none"} {
		err := w.AddToken(t.Context(), some, request.Token{Provider: []byte(provider), PIN: secrettest.Of(t, "0000")})
		if err == nil || err.Error() != "no match" {
			t.Errorf("%s: %v", provider, err)
		}
	}
	if len(w.tokens.pins) > 0 {
		t.Errorf("PINs were tried: %q", w.tokens.pins)
	}
	// The client adds only keys that it sees, also later.
	if err := w.AddToken(t.Context(), some, request.Token{Provider: []byte("pkcs11:token"), Constraints: request.Constraints{Confirm: true}}); err != nil {
		t.Fatal(err)
	}
	late := edKey("pkcs11:token=e;id=1")
	w.tokens.set(w.shown, w.sibling, w.other, w.limited, late)
	for _, id := range w.now().identities {
		if want := id.Comment == w.shown.uri || id.Comment == w.other.uri; id.limits.confirm != want {
			t.Errorf("%s is confirmed: %v", id.Comment, id.limits.confirm)
		}
	}
	// The client does not end the owner's addition of all keys.
	w.add(t, "pkcs11:token", request.Constraints{Lifetime: time.Hour})
	if err := w.RemoveToken(t.Context(), some, request.Token{Provider: []byte("pkcs11:token")}); err != nil {
		t.Fatal(err)
	}
	for _, id := range w.now().identities {
		if len(id.Homes) > 0 && id.limits.lifetime != time.Hour {
			t.Errorf("%s has %+v", id.Comment, id.limits)
		}
	}
	if got := w.list(t); slices.Contains(got, w.shown.uri) || !slices.Contains(got, w.sibling.uri) {
		t.Errorf("listed %q", got)
	}
}
