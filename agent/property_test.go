package agent

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
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
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
)

// TestSeen sends random sequences of requests from connections of all kinds, and checks two
// properties:
//
//   - No request changes an identity, a token or a PIN that its connection does not see.
//   - No answer depends on a key that the connection does not see.
//
// For the second, TestSeen sends each sequence again to an agent without the keys that the
// connection does not see. If a sequence fails, it prints the seed and a shorter sequence.
func TestSeen(t *testing.T) {
	const sequences, length = 400, 60
	things := newThings(t)
	for seed := range uint64(sequences) {
		steps := randomSteps(rand.New(rand.NewPCG(seed, 0)), length)
		problem := things.try(t, steps)
		if problem == "" {
			continue
		}
		steps, problem = things.shorten(t, steps, problem)
		lines := make([]string, len(steps))
		for i, s := range steps {
			lines[i] = s.String()
		}
		t.Fatalf("seed %d: %s, after these steps:\n%s", seed, problem, strings.Join(lines, "\n"))
	}
}

// things are the keys that all sequences share, because making keys takes long.
type things struct {
	private map[string]ed25519.PrivateKey // by the URI, or name, of the key
	wire    map[string][]byte
	host    ssh.PublicKey // where the key of token d may be used
	bad     ssh.PublicKey // where it may not
	cert    *ssh.Certificate
	callers map[string]*request.Caller
}

// propertyKeys are the keys of tokens. Those of c can be used without a login.
var propertyKeys = []string{"pkcs11:token=a;id=1", "pkcs11:token=a;id=2", "pkcs11:token=b;id=1", "pkcs11:token=c;id=1", "pkcs11:token=d;id=1"}

// propertyShown is the key that the sockets for some keys show.
const propertyShown = "pkcs11:token=a;id=1"

// propertyLimited is the key that is limited to a destination from the start. No request
// lifts its limits.
const propertyLimited = "pkcs11:token=d;id=1"

const propertySoft = "file"

func newThings(t *testing.T) *things {
	x := &things{private: make(map[string]ed25519.PrivateKey), wire: make(map[string][]byte), host: keytest.New(t).Public, bad: keytest.New(t).Public}
	for _, name := range append(slices.Clone(propertyKeys), propertySoft) {
		k := keytest.New(t)
		x.private[name], x.wire[name] = k.Private, k.Public.Marshal()
		if name == propertyShown {
			x.cert = k.Certificate(t, keytest.New(t), ssh.UserCert, nil)
		}
	}
	only := []request.Selection{prefix(propertyShown)}
	forwarded := boundTo(true, x.bad)
	some := *forwarded
	some.Socket = &request.Socket{Name: "some-forwarded", Only: only}
	x.callers = map[string]*request.Caller{
		"main":           {Number: 1, Peer: peer.Peer{Known: true, PID: 4711}},
		"some":           {Number: 2, Socket: &request.Socket{Name: "some", Only: only}},
		"read-only":      {Number: 3, Socket: &request.Socket{Name: "read-only", Only: only, ReadOnly: true}},
		"forwarded":      forwarded,
		"some-forwarded": &some,
		"login":          boundTo(false, x.host),
	}
	return x
}

// sees tells whether a connection of a kind sees a key. It does not use the tested code.
func sees(caller, key string) bool {
	switch caller {
	case "some", "read-only", "some-forwarded":
		return key == propertyShown
	case "forwarded":
		return key != propertyLimited
	}
	return true
}

// propertyToken is a token with one PIN, which takes any number of tries.
type propertyToken struct {
	needsPIN bool
	loggedIn bool
	tries    int // of PINs, wrong or not
}

type propertyKey struct {
	*fakeKey
	of    *propertyToken
	trial *trial
}

func (k *propertyKey) AsksPIN() bool { return k.of.needsPIN && !k.of.loggedIn }

func (k *propertyKey) SignMessageContext(ctx context.Context, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	if k.of.needsPIN && !k.of.loggedIn {
		if !k.trial.yes {
			return nil, errors.New("no person gives a PIN")
		}
		k.of.tries++
		k.of.loggedIn = true
		waiting.Accepted(ctx)
	}
	return make([]byte, ed25519.SignatureSize), nil
}

// trial is an agent that gets a sequence. It is also the Tokens and the Confirmer of the
// agent.
type trial struct {
	*fakeTokens
	keyring *Keyring
	tokens  map[string]*propertyToken
	yes     bool // the answer of a person
}

func (w *trial) Confirm(context.Context, approval.Question) (approval.Answer, error) {
	return approval.Answer{Allowed: w.yes}, nil
}

func tokenName(uri string) string { name, _, _ := strings.Cut(uri, ";"); return name }

// newTrial makes an agent with the keys that the connection sees. An empty caller stands
// for all keys.
func (x *things) newTrial(caller string) *trial {
	w := &trial{tokens: make(map[string]*propertyToken)}
	var keys []request.Key
	for _, uri := range propertyKeys {
		if caller != "" && !sees(caller, uri) {
			continue
		}
		name := tokenName(uri)
		if w.tokens[name] == nil {
			w.tokens[name] = &propertyToken{needsPIN: name != "pkcs11:token=c"}
		}
		keys = append(keys, &propertyKey{&fakeKey{Signer: x.private[uri], uri: uri, insertions: 1}, w.tokens[name], w})
	}
	w.fakeTokens = newFakeTokens(keys...)
	w.keyring = NewKeyring(Options{
		Tokens: w, Confirm: w, SoftwareKeys: true, RemoteTokens: true, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Rules: Rules{Name: func(request.Key) string { return "" }, Allow: func(request.Key) []request.Kind { return []request.Kind{request.KindUnknown} }},
	})
	if caller == "" || sees(caller, propertyLimited) {
		_ = w.keyring.AddToken(context.Background(), x.callers["main"], request.Token{
			Provider: []byte(propertyLimited), Constraints: request.Constraints{Destinations: []request.Destination{to("", nil, x.host)}},
		})
	}
	return w
}

// Select logs in with a PIN. It tries the PIN if no login is in force. It refuses a wrong
// PIN even if a token needs none, so that the result does not depend on other tokens that
// the request names.
func (w *trial) Select(_ context.Context, s request.Selection, reached func(request.Key) bool, pin *secret.Secret) (all []request.Key, taken bool, err error) {
	for _, k := range w.Keys() {
		if s.Match(k) && reached(k) {
			all = append(all, k)
		}
	}
	if len(all) == 0 {
		return nil, false, errors.New("no match")
	}
	if pin.Len() == 0 {
		return all, false, nil
	}
	right := string(pin.Bytes()) == "right"
	for _, k := range all {
		if of := k.(*propertyKey).of; of.needsPIN && !of.loggedIn {
			of.tries++
			of.loggedIn = right
			taken = right
		}
	}
	if !right {
		return nil, false, errors.New("wrong PIN")
	}
	return all, taken, nil
}

func (w *trial) LogoutAll(ctx context.Context) error {
	return w.LogoutOf(ctx, func([]request.Key) bool { return true })
}

func (w *trial) LogoutOf(_ context.Context, chosen func([]request.Key) bool) error {
	for name, token := range w.tokens {
		of := slices.DeleteFunc(slices.Clone(w.Keys()), func(k request.Key) bool { return tokenName(k.URI()) != name })
		if chosen(of) {
			token.loggedIn = false
		}
	}
	return nil
}

// step is a request, or an event between requests. It is data, so that a test can repeat
// it.
type step struct {
	caller, do, what string
	limits           int    // index of the constraints
	pin              string // empty: none
	yes              bool   // the answer of a person
}

func (s step) String() string {
	text := fmt.Sprintf("%s: %s", s.caller, s.do)
	for _, more := range []struct {
		name  string
		value any
		set   bool
	}{{"", s.what, s.what != ""}, {"constraints ", s.limits, s.limits > 0}, {"PIN ", s.pin, s.pin != ""}, {"a person says ", s.yes, s.do == "sign"}} {
		if more.set {
			text += fmt.Sprintf(", %s%v", more.name, more.value)
		}
	}
	return text
}

// constraints returns the constraints with index i, for additions.
func (x *things) constraints(i int) request.Constraints {
	return []request.Constraints{
		{},
		{Confirm: true},
		{Lifetime: 10 * time.Second},
		{Lifetime: time.Minute},
		{Destinations: []request.Destination{to("", nil, x.host)}},
		{Certificates: []*ssh.Certificate{x.cert}, CertificatesOnly: true},
		{Confirm: true, Lifetime: time.Minute, Certificates: []*ssh.Certificate{x.cert}},
	}[i]
}

func randomSteps(r *rand.Rand, n int) []step {
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	providers := append([]string{"pkcs11:", "pkcs11:token=a", "pkcs11:token=b", "pkcs11:token=none"}, propertyKeys...)
	steps := make([]step, n)
	for i := range steps {
		s := &steps[i]
		s.caller = pick("main", "main", "some", "some", "read-only", "forwarded", "forwarded", "some-forwarded", "some-forwarded", "login")
		s.do = pick("list", "sign", "sign", "sign", "add", "add", "add", "add-file", "remove", "remove", "remove-token", "remove-token", "remove-all", "lock", "unlock", "wait", "insert", "configure")
		s.yes = r.IntN(2) == 0
		switch s.do {
		case "sign", "remove":
			s.what = pick(append(propertyKeys, propertySoft)...)
		case "add":
			s.what, s.limits, s.pin = pick(providers...), r.IntN(7), pick("", "", "right", "wrong")
		case "add-file":
			s.limits = r.IntN(5)
		case "remove-token":
			s.what = pick(providers...)
		case "wait", "insert", "configure":
			s.caller = "none"
		}
		// A client that sees the limited key may lift its limits by a use or by a PIN.
		// Then every connection would see the key, and the test would check nothing.
		if sees(s.caller, propertyLimited) && s.caller != "none" {
			if s.do == "sign" && s.what == propertyLimited {
				s.what = propertyKeys[0]
			}
			if strings.HasPrefix(propertyLimited, s.what) {
				s.pin = ""
			}
		}
	}
	return steps
}

// ask runs a step, and returns the answer as far as a client can see it.
func (x *things) ask(w *trial, s step) string {
	w.yes = s.yes
	ctx, k, c := context.Background(), w.keyring, x.callers[s.caller]
	secretOf := func(text string) *secret.Secret {
		if text == "" {
			return nil
		}
		p, err := secret.From([]byte(text))
		if err != nil {
			panic(err)
		}
		return p
	}
	var err error
	switch s.do {
	case "list":
		list, err := k.List(ctx, c)
		if err != nil {
			return "refused"
		}
		var all []string
		for _, id := range list.Identities {
			all = append(all, id.Key.Type()+" "+id.Comment)
		}
		return strings.Join(all, ", ")
	case "sign":
		_, err = k.Sign(ctx, c, request.Sign{Key: x.wire[s.what], Data: []byte("data"), Login: login("me", c)})
	case "add":
		pin := secretOf(s.pin)
		err = k.AddToken(ctx, c, request.Token{Provider: []byte(s.what), PIN: pin, Constraints: x.constraints(s.limits)})
		pin.Wipe()
	case "add-file":
		private := x.private[propertySoft]
		public, _ := ssh.NewPublicKey(private.Public())
		err = k.Add(ctx, c, request.AddKey{Private: private, Public: public, Comment: propertySoft, Constraints: x.constraints(s.limits)})
	case "remove":
		err = k.Remove(ctx, c, x.wire[s.what])
	case "remove-token":
		err = k.RemoveToken(ctx, c, request.Token{Provider: []byte(s.what)})
	case "remove-all":
		err = k.RemoveAll(ctx, c)
	case "lock", "unlock":
		phrase := secretOf("sesame")
		defer phrase.Wipe()
		do := k.Lock
		if s.do == "unlock" {
			do = k.Unlock
		}
		err = do(ctx, c, phrase)
	case "wait":
		time.Sleep(11 * time.Second)
	case "insert":
		k.now() // ends the additions whose time is over
		for _, key := range w.Keys() {
			key.(*propertyKey).insertions++
			key.(*propertyKey).of.loggedIn = false
		}
		w.set(w.Keys()...)
	case "configure":
		k.Configure(k.opts.Rules)
	}
	if err != nil {
		return "refused"
	}
	return "done"
}

// snapshot has all that a request may change, by the name of the key and of the token.
type snapshot struct {
	keys   map[string]string
	tokens map[string]propertyToken
	locked bool
}

func (w *trial) snapshot() snapshot {
	s := snapshot{keys: make(map[string]string), tokens: make(map[string]propertyToken), locked: w.keyring.lock.locked()}
	k := w.keyring
	v := k.now()
	k.mu.Lock()
	for _, key := range k.knownLocked() {
		s.keys[key.URI()] = fmt.Sprintf("hidden %d, owes %+v", k.hidden[key.wire], k.owed[key.wire])
	}
	k.mu.Unlock()
	for _, id := range v.identities {
		s.keys[id.Comment] += fmt.Sprintf(", %s with %+v", id.key.Type(), id.limits)
	}
	for name, token := range w.tokens {
		s.tokens[name] = *token
	}
	return s
}

// changed describes a change of a key or a token that the connection does not see.
func changed(caller string, before, after snapshot) string {
	names := slices.Concat(propertyKeys, []string{propertySoft})
	for _, name := range names {
		if !sees(caller, name) && before.keys[name] != after.keys[name] {
			return fmt.Sprintf("%s was %q and is %q", name, before.keys[name], after.keys[name])
		}
	}
	for name, was := range before.tokens {
		seen, unseen := false, false
		for _, key := range propertyKeys {
			if tokenName(key) == name {
				seen, unseen = seen || sees(caller, key), unseen || !sees(caller, key)
			}
		}
		switch now := after.tokens[name]; {
		case !seen && now != was:
			return fmt.Sprintf("the token %s was %+v and is %+v", name, was, now)
		case unseen && was.loggedIn && !now.loggedIn:
			return fmt.Sprintf("the token %s, which has keys that it does not see, was logged out", name)
		}
	}
	if limited := !slices.Contains([]string{"main"}, caller); limited && before.locked != after.locked {
		return "the agent was locked or unlocked"
	}
	return ""
}

// try runs a sequence. It returns the first wrong answer or wrong change, or an empty text.
func (x *things) try(t *testing.T, steps []step) (problem string) {
	synctest.Test(t, func(*testing.T) { problem = x.ran(steps) })
	return problem
}

func (x *things) ran(steps []step) string {
	whole := x.newTrial("")
	// These agents lack only the keys that the connections do not see.
	parts := map[string]*trial{"some": x.newTrial("some"), "forwarded": x.newTrial("forwarded")}
	likes := map[string]string{"some": "some", "read-only": "some", "some-forwarded": "some", "forwarded": "forwarded"}
	for i, s := range steps {
		before := whole.snapshot()
		answer := x.ask(whole, s)
		if s.do == "wait" { // the time passes for all agents
			s.do = "nothing"
		}
		if s.caller != "none" {
			if problem := changed(s.caller, before, whole.snapshot()); problem != "" {
				return fmt.Sprintf("step %d: %s", i+1, problem)
			}
		}
		for name, part := range parts {
			// A connection that sees a key of a token may learn whether a login is in
			// force.
			for token, of := range part.tokens {
				of.loggedIn = before.tokens[token].loggedIn
			}
			there := x.ask(part, s)
			if likes[s.caller] == name && there != answer {
				return fmt.Sprintf("step %d tells of what it does not see: %q, and without it %q", i+1, answer, there)
			}
		}
	}
	return ""
}

// shorten leaves out steps as long as the rest of the sequence still fails.
func (x *things) shorten(t *testing.T, steps []step, problem string) ([]step, string) {
	for again := true; again; {
		again = false
		for i := len(steps) - 1; i >= 0; i-- {
			fewer := slices.Delete(slices.Clone(steps), i, i+1)
			if p := x.try(t, fewer); p != "" {
				steps, problem, again = fewer, p, true
			}
		}
	}
	return steps, problem
}

// An agent that hides no keys fails the test.
func TestSeenFinds(t *testing.T) {
	x := newThings(t)
	x.callers["some"] = x.callers["main"]
	steps := randomSteps(rand.New(rand.NewPCG(1, 0)), 200)
	problem := x.try(t, steps)
	if problem == "" {
		t.Fatal("nothing was found")
	}
	short, again := x.shorten(t, steps, problem)
	if again == "" || len(short) > 5 {
		t.Errorf("%q after %d steps", again, len(short))
	}
}
