package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
)

// fakeKey plays a key of a token. Its token may be absent. It counts its signatures.
type fakeKey struct {
	crypto.Signer
	mu         sync.Mutex
	uri        string
	unfit      string
	insertions uint64
	absent     bool
	asks       bool // for a PIN
	another    bool // another request gets the PIN, and not this one
	err        error
	signed     int
	use        *request.Use // of the last signature
	caller     *request.Caller
}

type absentError struct{}

func (absentError) Error() string { return "away" }
func (absentError) Absent() bool  { return true }

func (k *fakeKey) URI() string        { return k.uri }
func (k *fakeKey) Unfit() string      { return k.unfit }
func (k *fakeKey) Insertions() uint64 { return k.insertions }
func (k *fakeKey) TokenName() string  { return "the token of " + k.uri }

func (k *fakeKey) AsksPIN() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asks
}

func (k *fakeKey) Present() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.absent
}

func (k *fakeKey) setAbsent(absent bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.absent = absent
}

func (k *fakeKey) SignMessageContext(ctx context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asks && !k.another {
		waiting.Accepted(ctx)
	}
	k.use, k.caller = request.UseFrom(ctx), request.CallerFrom(ctx)
	switch {
	case k.absent:
		return nil, fmt.Errorf("sign: %w", absentError{})
	case k.err != nil:
		return nil, k.err
	}
	k.signed++
	if h := opts.HashFunc(); h != 0 {
		w := h.New()
		w.Write(msg)
		msg = w.Sum(nil)
	}
	return k.Sign(rand.Reader, msg, opts)
}

// fakeTokens is a list of keys.
type fakeTokens struct {
	caller *request.Caller // of the last Select

	mu         sync.Mutex
	keys       []request.Key
	away       []request.Key
	generation uint64
	changed    chan struct{}
	settled    chan struct{}
	rescans    int
	onRescan   func()
	pokes      int
	dropped    []string
	logouts    int
	pins       []string
	selectErr  error
	remote     []bool   // the arguments of Parse
	logins     []string // the calls of Login, Logout and LogoutOf
	answer     request.LoginAnswer
}

func newFakeTokens(keys ...request.Key) *fakeTokens {
	t := &fakeTokens{keys: keys, settled: make(chan struct{}), changed: make(chan struct{})}
	close(t.settled)
	return t
}

func (t *fakeTokens) set(keys ...request.Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys = keys
	t.changeLocked()
}

func (t *fakeTokens) changeLocked() {
	t.generation++
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *fakeTokens) Away() []request.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.away
}

func (t *fakeTokens) Changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}

func (t *fakeTokens) Keys() []request.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.keys
}

func (t *fakeTokens) Generation() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.generation
}

func (t *fakeTokens) Settled() <-chan struct{} { return t.settled }

func (t *fakeTokens) Poke() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pokes++
}

func (t *fakeTokens) Rescan(context.Context) error {
	t.mu.Lock()
	t.rescans++
	f := t.onRescan
	t.mu.Unlock()
	if f != nil {
		f()
	}
	return nil
}

// prefix selects the keys whose URI begins so.
type prefix string

func (p prefix) String() string           { return string(p) }
func (p prefix) Match(k request.Key) bool { return strings.HasPrefix(k.URI(), string(p)) }
func (p prefix) Broad() bool              { return !strings.Contains(string(p), "id=") }
func (p prefix) All() bool                { return p == "pkcs11:" }

func (t *fakeTokens) Parse(provider []byte, remote bool) (request.Selection, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remote = append(t.remote, remote)
	if !bytes.HasPrefix(provider, []byte("pkcs11:")) {
		return nil, errors.New("not allowed")
	}
	return prefix(provider), nil
}

func (t *fakeTokens) Select(ctx context.Context, s request.Selection, reached func(request.Key) bool, pin *secret.Secret) (all []request.Key, taken bool, err error) {
	t.mu.Lock()
	t.caller = request.CallerFrom(ctx)
	keys, err := t.keys, t.selectErr
	t.mu.Unlock()
	if err != nil {
		return nil, false, err
	}
	for _, k := range keys {
		if s.Match(k) && reached(k) {
			all = append(all, k)
			if k, ok := k.(*fakeKey); ok && pin.Len() > 0 {
				taken = taken || k.asks
			}
		}
	}
	if len(all) == 0 {
		return nil, false, errors.New("no match")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pins = append(t.pins, string(pin.Bytes()))
	return all, taken, nil
}

func (t *fakeTokens) Drop(s request.Selection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropped = append(t.dropped, s.String())
}

func (t *fakeTokens) LogoutAll(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logouts++
	return nil
}

func (t *fakeTokens) LogoutOf(_ context.Context, chosen func([]request.Key) bool) error {
	t.mu.Lock()
	keys := t.keys
	t.mu.Unlock()
	tokens := make(map[string][]request.Key)
	for _, k := range keys {
		token, _, _ := strings.Cut(k.URI(), ";")
		tokens[token] = append(tokens[token], k)
	}
	for token, keys := range tokens {
		if chosen(keys) {
			t.mu.Lock()
			t.logouts++
			t.logins = append(t.logins, "out of "+token)
			t.mu.Unlock()
		}
	}
	return nil
}

func (t *fakeTokens) Login(_ context.Context, s request.Selection, pin *secret.Secret) (request.LoginAnswer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logins = append(t.logins, fmt.Sprintf("%s %s", s, pin.Bytes()))
	return t.answer, t.selectErr
}

func (t *fakeTokens) Logout(_ context.Context, s request.Selection) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logins = append(t.logins, "out of "+s.String())
	return t.selectErr
}

type fakeConfirm struct {
	answer bool
	err    error
	asked  []string
	use    *request.Use // of the last question
	caller *request.Caller
}

func (c *fakeConfirm) Confirm(ctx context.Context, r approval.Question) (answer approval.Answer, err error) {
	err = r.Asking.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
		answer, err = c.confirm(ctx, r)
		return err
	}})
	return answer, err
}

func (c *fakeConfirm) confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	c.use, c.caller = request.UseFrom(ctx), request.CallerFrom(ctx)
	if c.use != r.Use {
		panic("the request is about another use")
	}
	c.asked = append(c.asked, r.Comment+" "+r.KeyFingerprint)
	return approval.Answer{Allowed: c.answer}, c.err
}

func edKey(uri string) *fakeKey {
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return &fakeKey{Signer: priv, uri: uri, insertions: 1}
}

func wireOf(k request.Key) []byte {
	pub, err := ssh.NewPublicKey(k.Public())
	if err != nil {
		panic(err)
	}
	return pub.Marshal()
}

type fixture struct {
	*Keyring
	tokens  *fakeTokens
	confirm *fakeConfirm
	log     *bytes.Buffer
}

func newFixture(o Options, keys ...request.Key) *fixture {
	f := &fixture{tokens: newFakeTokens(keys...), confirm: new(fakeConfirm), log: new(bytes.Buffer)}
	o.Tokens = f.tokens
	if o.Confirm == nil {
		o.Confirm = f.confirm
	}
	if o.Name == nil {
		o.Name = func(request.Key) string { return "" }
	}
	if o.Allow == nil {
		// Most tests sign only a word.
		o.Allow = func(request.Key) []request.Kind { return []request.Kind{request.KindUnknown} }
	}
	o.Log = slog.New(slog.NewTextHandler(f.log, nil))
	f.Keyring = NewKeyring(o)
	return f
}

var (
	local     = &request.Caller{Number: 1, Peer: peer.Peer{Known: true, PID: 4711}}
	forwarded = &request.Caller{Number: 2, Peer: peer.Peer{Known: true, PID: 4712}, Forwarded: true}
)

func (f *fixture) list(t *testing.T) []string {
	t.Helper()
	list, err := f.List(t.Context(), local)
	if err != nil {
		t.Fatal(err)
	}
	comments := []string{}
	for _, id := range list.Identities {
		comments = append(comments, id.Comment)
	}
	return comments
}

func (f *fixture) wantList(t *testing.T, want ...string) {
	t.Helper()
	if got := f.list(t); !slices.Equal(got, want) {
		t.Errorf("list is %q, want %q", got, want)
	}
}

func (f *fixture) add(t *testing.T, provider string, c request.Constraints) {
	t.Helper()
	if err := f.AddToken(t.Context(), local, request.Token{Provider: []byte(provider), Constraints: c}); err != nil {
		t.Fatalf("add %s: %v", provider, err)
	}
}

func TestListSelection(t *testing.T) {
	a, b, c := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1"), edKey("pkcs11:token=b;id=2")
	c.unfit = "attestation"
	all := []request.Key{a, b, c}
	names := func(k request.Key) string {
		if k == request.Key(a) {
			return "laptop"
		}
		return ""
	}
	for name, test := range map[string]struct {
		automatic []request.Selection
		want      []string
	}{
		"absent: all that are fit":         {nil, []string{"laptop", b.uri}},
		"empty: none":                      {[]request.Selection{}, nil},
		"in the order of the selections":   {[]request.Selection{prefix("pkcs11:token=b"), prefix("pkcs11:token=a")}, []string{b.uri, "laptop"}},
		"unfit only when named":            {[]request.Selection{prefix("pkcs11:token=b;id=2")}, []string{c.uri}},
		"selected twice is one":            {[]request.Selection{prefix("pkcs11:token=a"), prefix("pkcs11:")}, []string{"laptop", b.uri}},
		"what is not there shows up later": {[]request.Selection{prefix("pkcs11:token=z")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: test.automatic, Name: names}}, all...)
			f.wantList(t, test.want...)
			if test.automatic != nil && len(test.want) == 0 && len(test.automatic) > 0 {
				f.tokens.set(append(all, edKey("pkcs11:token=z"))...)
				f.wantList(t, "pkcs11:token=z")
			}
		})
	}
}

// "ssh-add -s pkcs11:" brings back only the keys that the configuration lists.
func TestAddEveryKey(t *testing.T) {
	a, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1")
	f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{prefix("pkcs11:token=a")}}}, a, b)
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	f.add(t, "pkcs11:", request.Constraints{})
	f.wantList(t, a.uri)
	f.Configure(Rules{Name: func(request.Key) string { return "" }})
	f.wantList(t, a.uri, b.uri)
	// If the configuration lists no keys, it brings back all keys.
	f = newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, a, b)
	f.wantList(t)
	f.add(t, "pkcs11:", request.Constraints{})
	f.wantList(t, a.uri, b.uri)
}

func TestSignEveryType(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]crypto.Signer{"rsa": rsaKey}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[c.Params().Name] = k
	}
	keys["ed25519"] = edKey("").Signer
	for _, test := range []struct {
		key    string
		flags  request.SignatureFlags
		format string
	}{
		{"rsa", 0, ssh.KeyAlgoRSA},
		{"rsa", request.SignatureRSASHA2256, ssh.KeyAlgoRSASHA256},
		{"rsa", request.SignatureRSASHA2512, ssh.KeyAlgoRSASHA512},
		{"rsa", request.SignatureRSASHA2256 | request.SignatureRSASHA2512, ssh.KeyAlgoRSASHA256},
		{"P-256", 0, ssh.KeyAlgoECDSA256},
		{"P-256", request.SignatureRSASHA2512, ssh.KeyAlgoECDSA256},
		{"P-384", 0, ssh.KeyAlgoECDSA384},
		{"P-521", 0, ssh.KeyAlgoECDSA521},
		{"ed25519", 0, ssh.KeyAlgoED25519},
	} {
		t.Run(fmt.Sprintf("%s with flags %d", test.key, test.flags), func(t *testing.T) {
			k := &fakeKey{Signer: keys[test.key], uri: "pkcs11:" + test.key}
			f := newFixture(Options{}, k)
			data := []byte("what is signed")
			sig, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k), Data: data, Flags: test.flags})
			if err != nil {
				t.Fatal(err)
			}
			if sig.Format != test.format {
				t.Errorf("algorithm is %s, want %s", sig.Format, test.format)
			}
			pub, err := ssh.ParsePublicKey(wireOf(k))
			if err != nil {
				t.Fatal(err)
			}
			if err := pub.Verify(data, sig); err != nil {
				t.Errorf("the signature is wrong: %v", err)
			}
		})
	}
}

func TestSignRefusals(t *testing.T) {
	k := edKey("pkcs11:token=a")
	f := newFixture(Options{}, k)
	other := wireOf(edKey("pkcs11:token=other"))
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: other}); !errors.Is(err, errUnknownKey) {
		t.Errorf("unknown key: %v", err)
	}
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: []byte("garbage")}); !errors.Is(err, errUnknownKey) {
		t.Errorf("garbage: %v", err)
	}
	k.err = errors.New("the PIN is locked")
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); !errors.Is(err, k.err) {
		t.Errorf("failing key: %v", err)
	}
	log := f.log.String()
	pub, err := ssh.ParsePublicKey(wireOf(k))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"process 4711", "the PIN is locked", ssh.FingerprintSHA256(pub), "the agent has no such key"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not say %q:\n%s", want, log)
		}
	}
	if n := strings.Count(log, "request refused"); n != 3 {
		t.Errorf("%d lines for 3 refusals:\n%s", n, log)
	}
}

func TestOneKeyOnTwoTokens(t *testing.T) {
	first := edKey("pkcs11:token=first")
	second := &fakeKey{Signer: first.Signer, uri: "pkcs11:token=second", insertions: 1}
	f := newFixture(Options{}, first, second)
	f.wantList(t, first.uri)
	sign := func() error {
		_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(first)})
		return err
	}
	if err := sign(); err != nil || first.signed != 1 {
		t.Errorf("both there: %v, first signed %d times", err, first.signed)
	}
	first.absent = true
	if err := sign(); err != nil || second.signed != 1 {
		t.Errorf("first away: %v, second signed %d times", err, second.signed)
	}
	first.absent, first.err = false, errors.New("declined")
	if err := sign(); err == nil || second.signed != 1 {
		t.Errorf("declined on the first: %v, and the second was asked: %d", err, second.signed)
	}
}

func TestAddAndRemove(t *testing.T) {
	a, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1")
	f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, a, b)
	f.wantList(t)
	f.add(t, "pkcs11:token=b", request.Constraints{})
	f.wantList(t, b.uri)
	f.add(t, "pkcs11:", request.Constraints{})
	f.wantList(t, b.uri, a.uri)

	remove := func(p string) error { return f.RemoveToken(t.Context(), local, request.Token{Provider: []byte(p)}) }
	if err := remove("pkcs11:"); err != nil {
		t.Fatal(err)
	}
	// The addition of "pkcs11:" is gone, for each client that has made it.
	f.wantList(t)
	if err := remove("pkcs11:"); err == nil {
		t.Error("removed what was not there")
	}
	f.add(t, "pkcs11:token=b", request.Constraints{})
	f.wantList(t, b.uri)
	if err := f.Remove(t.Context(), local, wireOf(b)); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	if err := f.Remove(t.Context(), local, wireOf(b)); err == nil {
		t.Error("removed a key twice")
	}
	f.add(t, "pkcs11:", request.Constraints{})
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	if f.tokens.logouts != 3 { // of both tokens, when all keys were removed, and of all at once
		t.Errorf("%d logouts", f.tokens.logouts)
	}
	slices.Sort(f.tokens.dropped)
	if len(f.added) != 0 || !slices.Contains(f.tokens.dropped, "pkcs11:token=b") {
		t.Errorf("left: %d, dropped: %q", len(f.added), f.tokens.dropped)
	}
}

func TestAutomaticReturn(t *testing.T) {
	back := map[string]func(f *fixture, k *fakeKey){
		"with the next insertion": func(f *fixture, k *fakeKey) { k.insertions++; f.tokens.set(k) },
		"with the configuration":  func(f *fixture, _ *fakeKey) { f.Configure(Rules{Name: func(request.Key) string { return "" }}) },
		"when added again": func(f *fixture, _ *fakeKey) {
			if err := f.AddToken(context.Background(), local, request.Token{Provider: []byte("pkcs11:")}); err != nil {
				panic(err)
			}
		},
	}
	for name, how := range back {
		t.Run(name, func(t *testing.T) {
			k := edKey("pkcs11:token=a")
			f := newFixture(Options{}, k)
			f.wantList(t, k.uri)
			if err := f.RemoveAll(t.Context(), local); err != nil {
				t.Fatal(err)
			}
			f.tokens.set(k) // looked at again, but not inserted again
			f.wantList(t)
			if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); err == nil {
				t.Error("a removed key signed")
			}
			how(f, k)
			f.wantList(t, k.uri)
		})
	}
}

func TestAddRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		caller  *request.Caller
		request request.Token
		fail    error
	}{
		"over a forwarded connection":  {forwarded, request.Token{Provider: []byte("pkcs11:")}, nil},
		"a path that is not allowed":   {local, request.Token{Provider: []byte("/tmp/evil.so")}, nil},
		"what matches nothing":         {local, request.Token{Provider: []byte("pkcs11:token=none")}, nil},
		"a PIN that the token refuses": {local, request.Token{Provider: []byte("pkcs11:")}, errors.New("wrong PIN")},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, edKey("pkcs11:token=a"))
			f.tokens.selectErr = test.fail
			if err := f.AddToken(t.Context(), test.caller, test.request); err == nil {
				t.Error("it was added")
			}
			f.wantList(t)
			if !strings.Contains(f.log.String(), "request refused") {
				t.Errorf("nothing in the log:\n%s", f.log)
			}
		})
	}
}

func TestConfirm(t *testing.T) {
	k := edKey("pkcs11:token=a")
	f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, k)
	f.add(t, "pkcs11:", request.Constraints{Confirm: true})
	sign := func() error {
		_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)})
		return err
	}
	if err := sign(); !errors.Is(err, approval.ErrDeclined) || k.signed != 0 {
		t.Errorf("declined: %v, %d signatures", err, k.signed)
	}
	f.confirm.answer = true
	if err := sign(); err != nil || k.signed != 1 {
		t.Errorf("agreed: %v, %d signatures", err, k.signed)
	}
	f.confirm.err = errors.New("no way to ask")
	if err := sign(); !errors.Is(err, f.confirm.err) || k.signed != 1 {
		t.Errorf("without a prompt: %v, %d signatures", err, k.signed)
	}
	if len(f.confirm.asked) != 3 || !strings.Contains(f.confirm.asked[0], k.uri) {
		t.Errorf("asked: %q", f.confirm.asked)
	}
}

func TestLifetime(t *testing.T) {
	for name, test := range map[string]struct {
		agent, request, want time.Duration
	}{
		"of the request":         {0, time.Minute, time.Minute},
		"of the agent":           {time.Hour, 0, time.Hour},
		"the request's counts":   {time.Hour, time.Minute, time.Minute},
		"also when it is longer": {time.Minute, time.Hour, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := edKey("pkcs11:token=a")
				f := newFixture(Options{Lifetime: test.agent}, k) // automatic, and added as well
				f.add(t, "pkcs11:", request.Constraints{Lifetime: test.request})
				time.Sleep(test.want - time.Nanosecond)
				f.wantList(t, k.uri)
				time.Sleep(time.Nanosecond)
				f.wantList(t)
				if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)}); err == nil {
					t.Error("a key signed after its time")
				}
				k.insertions++
				f.tokens.set(k)
				f.wantList(t, k.uri)
			})
		})
	}
}

// Just after the start, a list waits for tokens, for two seconds at most. Later lists never
// wait. If the agent knows keys from before, the first list does not wait either.
func TestListPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := edKey("pkcs11:token=a")
		f := newFixture(Options{}, k)
		f.tokens.settled = make(chan struct{})
		began := time.Now()
		f.wantList(t, k.uri)
		if d := time.Since(began); d != 0 {
			t.Errorf("a list of keys from before took %v", d)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		k := edKey("pkcs11:token=a")
		f := newFixture(Options{})
		f.tokens.set(k)
		f.tokens.settled = make(chan struct{})
		began := time.Now()
		f.wantList(t, k.uri)
		if d := time.Since(began); d != startPatience {
			t.Errorf("first list took %v", d)
		}
		began = time.Now()
		f.wantList(t, k.uri)
		if d := time.Since(began); d != 0 {
			t.Errorf("second list took %v", d)
		}
		close(f.tokens.settled)
		f.wantList(t, k.uri)
		if f.tokens.pokes != 3 || f.tokens.rescans != 0 {
			t.Errorf("%d pokes, %d rescans", f.tokens.pokes, f.tokens.rescans)
		}
	})
}

// An empty list makes the agent look at the tokens again, once a second at most.
func TestEmptyList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(Options{})
		f.wantList(t)
		f.wantList(t)
		if f.tokens.rescans != 1 {
			t.Errorf("%d rescans", f.tokens.rescans)
		}
		time.Sleep(time.Second)
		k := edKey("pkcs11:token=a")
		f.tokens.onRescan = func() { f.tokens.set(k) }
		f.wantList(t, k.uri)
		if f.tokens.rescans != 2 {
			t.Errorf("%d rescans", f.tokens.rescans)
		}
	})
}

func TestPINReachesTokens(t *testing.T) {
	f := newFixture(Options{}, edKey("pkcs11:token=a"))
	pin, err := secret.From([]byte("1234"))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Wipe()
	if err := f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:"), PIN: pin}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.tokens.pins, []string{"1234"}) {
		t.Errorf("PINs: %q", f.tokens.pins)
	}
	if strings.Contains(f.log.String(), "1234") {
		t.Errorf("the log tells the PIN:\n%s", f.log)
	}
}

func TestConcurrentUse(t *testing.T) {
	keys := []request.Key{edKey("pkcs11:token=a"), edKey("pkcs11:token=b")}
	f := newFixture(Options{}, keys...)
	f.Keyring.log = slog.New(slog.DiscardHandler)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				_, _ = f.List(context.Background(), local)
				_ = f.AddToken(context.Background(), local, request.Token{Provider: []byte("pkcs11:token=a"), Constraints: request.Constraints{Lifetime: time.Nanosecond}})
				_ = f.Remove(context.Background(), local, wireOf(keys[1]))
				f.tokens.set(keys...)
				f.Configure(Rules{Name: func(request.Key) string { return "n" }})
				_ = f.RemoveAll(context.Background(), local)
			}
		})
	}
	wg.Wait()
	f.Configure(Rules{Name: func(request.Key) string { return "n" }})
	if got := f.list(t); len(got) != 2 {
		t.Errorf("list is %q", got)
	}
}

// TestSignAllocations counts allocations before the answer of a signature, and afterwards
// for its log line.
func TestSignAllocations(t *testing.T) {
	k, keys := stillKeyring(t, slog.NewTextHandler(io.Discard, nil), 2)
	var rest func()
	c := &request.Caller{Number: 1, Peer: peer.Self(), Later: func(f func()) { rest = f }}
	for _, test := range []struct {
		name string
		request.Sign
		// The allocations are the record of the request with its use, its context, which
		// ends with the lock (4), the signature (2), and the function for the log line. A
		// login has memory of its own.
		want float64
	}{{"git", gitRequest(keys[1]), 9}, {"login", loginRequest(keys[1]), 10}} {
		if n := testing.AllocsPerRun(100, func() {
			if _, err := k.Sign(t.Context(), c, test.Sign); err != nil {
				t.Fatal(err)
			}
		}); n > test.want {
			t.Errorf("%s: %v allocations for a signature, want %v", test.name, n, test.want)
		}
	}
	if _, err := k.Sign(t.Context(), c, gitRequest(keys[1])); err != nil {
		t.Fatal(err)
	}
	// The attributes that do not fit into a record. The race detector also empties pools
	// now and then.
	if n := testing.AllocsPerRun(100, rest); n > 4 {
		t.Errorf("a line in the log allocates %v times", n)
	}
}

// The keyring makes a list once. Each further request costs only a look at it.
func TestListAllocations(t *testing.T) {
	var keys []request.Key
	for i := range 1000 {
		keys = append(keys, edKey(fmt.Sprintf("pkcs11:id=%d", i)))
	}
	f := newFixture(Options{}, keys...)
	if n := len(f.list(t)); n != len(keys) {
		t.Fatalf("%d keys are listed", n)
	}
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() { _, _ = f.List(ctx, local) }); n > 0 {
		t.Errorf("a list of 1,000 keys allocates %v times", n)
	}
}
