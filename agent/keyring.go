package agent

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/certdir"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
	"p11-agent/pinentry/secret"
)

const (
	// startPatience bounds how long after its start the keyring waits for the first look
	// at the tokens before it lists keys. If it knows keys from before, it does not wait.
	// A person who starts an agent and lists its keys wants to see them.
	startPatience = 2 * time.Second
	// emptyPatience bounds the wait of an empty list for another look at the tokens. A
	// list with keys never waits.
	emptyPatience = 500 * time.Millisecond
)

var errUnknownKey = errors.New("the agent has no such key")

// Tokens finds keys on tokens. All methods but Rescan, Select, Login, Logout,
// LogoutOf and LogoutAll return at once.
type Tokens interface {
	// Keys returns the present keys, in their order.
	Keys() []request.Key
	// Away returns the known keys that are absent.
	Away() []request.Key
	// Generation returns another number after each change of Keys or Away.
	Generation() uint64
	// Changed returns a channel that is closed at the next such change.
	Changed() <-chan struct{}
	// Settled returns a channel that is closed after the first look at the tokens.
	Settled() <-chan struct{}
	// Poke says that a client uses the keys.
	Poke()
	// Rescan looks at all tokens again.
	Rescan(ctx context.Context) error
	// Parse reads the provider that a client names. For a remote client, it looks at no
	// file. Then it takes only a URI that names no module file and has no PIN.
	Parse(provider []byte, remote bool) (request.Selection, error)
	// Select returns the keys that s selects now and for which reached returns true, at
	// least one. Other keys count as absent. If there is a PIN, Select logs in to their
	// token. taken says that the token took this PIN just now. A token that needs no
	// login does not try the PIN.
	Select(ctx context.Context, s request.Selection, reached func(request.Key) bool, pin *secret.Secret) (keys []request.Key, taken bool, err error)
	// Drop says that the Keyring does not need a Selection of Parse any more.
	Drop(s request.Selection)
	// LogoutAll logs out of all tokens.
	LogoutAll(ctx context.Context) error
	// LogoutOf logs out of the tokens for whose known keys chosen returns true.
	LogoutOf(ctx context.Context, chosen func([]request.Key) bool) error
	// Login logs in to the single token that s selects. If pin is nil, Login gets the PIN
	// from the same place as a signature. If one try is left, it first asks a person.
	Login(ctx context.Context, s request.Selection, pin *secret.Secret) (request.LoginAnswer, error)
	// Logout logs out of the tokens that s selects.
	Logout(ctx context.Context, s request.Selection) error
}

// Rules are the part of Options that Configure changes.
type Rules struct {
	// Automatic selects the identities that the agent offers without an addition, in
	// this order. nil: every key that is fit for logins.
	Automatic []request.Selection
	// Name returns the configured name of a key, or nothing.
	Name func(request.Key) string
	// Listed returns the comment in the list of identities for a key of a token without
	// a configured name. All other places show the URI. nil: the list has the URI, too.
	Listed func(request.Key) string
	// OfferAway tells whether the agent offers a key while its token is absent. named
	// says that Automatic selects the key. nil: the agent offers no such key.
	OfferAway func(k request.Key, named bool) bool
	// Allow returns the kinds of data that a key of a token signs besides logins, SSH
	// signatures and the tests of ssh-add -T. KindUnknown stands for all kinds. nil: no
	// key signs other kinds.
	Allow func(request.Key) []request.Kind
	// Approval returns when the agent asks a person before a key of a token signs. For
	// nil, it returns the policy of all keys that are on no token. nil: never.
	Approval func(request.Key) approval.Policy
}

// Options make a Keyring.
type Options struct {
	Tokens Tokens
	Rules
	// Insert asks a person for an absent token whose key a request uses. nil: there is
	// no way to ask.
	Insert approval.Inserter
	// InsertTimeout bounds how long a signature waits for the token; 0: a minute.
	InsertTimeout time.Duration
	// Lifetime is the lifetime of added identities that come without one; 0: for ever.
	Lifetime time.Duration
	// Confirm asks whether a request may use a key. nil: there is no way to ask. Then the
	// Keyring refuses uses that need an approval, and additions with that constraint.
	Confirm approval.Confirmer
	// Questions decides whether the agent may ask a person. All code that shows a
	// question to a person shares it. nil: the Keyring makes its own.
	Questions *approval.Questions
	// SoftwareKeys lets clients add private keys. The Keyring keeps them in memory.
	SoftwareKeys bool
	// RemoteTokens lets clients behind forwarded connections add keys of tokens.
	RemoteTokens bool
	// Certificates has certificates for keys of tokens. The Keyring lists both; nil: none.
	Certificates *certdir.Dir
	// Upstreams get the requests for keys that the Keyring does not have, in this order.
	Upstreams []Upstream
	// Hosts gives names to host keys; nil: they have none.
	Hosts request.HostNamer
	// Fingerprint names a key for people; nil: ssh.FingerprintSHA256.
	Fingerprint func(ssh.PublicKey) string
	// Failed gets each request of this machine that the agent refuses, unless a person has
	// just refused it in a prompt. It must not wait. It may be nil.
	Failed func(audit.Event)
	// Report makes the answer to a request for the status. The Selection selects the
	// tokens of the answer; nil: all. Report must not wait. nil: there is no status.
	Report func(Status, request.Selection) ([]byte, error)
	// Log gets one line for each request that uses or changes keys.
	Log *slog.Logger
}

// A Keyring holds the identities, and decides which connection may use which of them. Any
// goroutine may call its methods. They hold no lock while they wait for a person, a token
// or a process.
type Keyring struct {
	*Guard

	opts  Options // Rules under mu
	log   *slog.Logger
	start time.Time
	// A goroutine makes both views under mu. A change of the keys in memory ends view, and
	// leaves tokens.
	tokens atomic.Pointer[tokenView]
	view   atomic.Pointer[view]
	knew   bool // at the start, keys from before were known: a list need not wait for tokens

	computing turns

	change atomic.Uint64 // counts the changes of the fields below but software, under mu

	mu       sync.Mutex
	plain    map[request.Key]*plainKey // of the present view
	added    []*addition
	software softwareKeys
	hidden   map[string]uint64 // removed identities, by wire form: insertions at the removal
	// owed has the limits that keys of tokens have lost, by the wire form of the key. A
	// key loses limits when a client removes it, or when its time is over. If the key
	// comes back with weaker limits, its first use costs a PIN or an approval.
	owed     map[string]*limits
	empty    time.Time           // when an empty list last caused a look at the tokens
	origins  map[string]Upstream // of the keys in the last list of upstream agents, by wire form
	sizes    map[any]int         // of destinations and certificates; see addedLocked
	troubles map[string]string   // the last logged trouble of an upstream agent, by its name
}

// NewKeyring makes a Keyring.
func NewKeyring(opts Options) *Keyring {
	if opts.Questions == nil {
		opts.Questions = approval.NewQuestions()
	}
	k := &Keyring{
		Guard: newGuard(&opts),
		opts:  opts, log: opts.Log, start: time.Now(),
		hidden: make(map[string]uint64), owed: make(map[string]*limits), troubles: make(map[string]string),
	}
	k.knew = len(k.now().identities) > 0
	return k
}

// List returns the identities that a connection may see, in their order. The identities of
// upstream agents come after them. List waits for tokens only just after the start, and if
// the list would be empty. While the agent is locked, the list is empty.
func (k *Keyring) List(ctx context.Context, c *request.Caller) (*Listing, error) {
	if k.lock.locked() {
		return new(Listing), nil
	}
	if !k.knew {
		k.settle(ctx)
	}
	k.opts.Certificates.Look()
	v := k.now()
	k.opts.Tokens.Poke()
	if len(v.identities) == 0 && k.lookAgain() {
		ctx, cancel := context.WithTimeout(ctx, emptyPatience)
		defer cancel()
		// The list has the keys that Rescan has found by then.
		_ = k.opts.Tokens.Rescan(ctx)
		v = k.now()
	}
	theirs := k.listUpstreams(ctx, c)
	if !v.limited && !restricted(c.Socket) && len(theirs) == 0 {
		return &v.list, nil
	}
	own := &Listing{Identities: make([]Identity, 0, len(v.identities)+len(theirs))}
	for i, id := range v.identities {
		if id.seenBy(c) == nil {
			own.Identities = append(own.Identities, v.list.Identities[i])
		}
	}
	for _, id := range theirs {
		if v.byKey[string(id.Key.Marshal())] == nil {
			id.Named = true // the configuration names its agent
			own.Identities = append(own.Identities, id)
		}
	}
	return own, nil
}

// Alive takes the first steps of List and Sign, and returns. It looks at no token and shows
// no prompt. So it returns at once unless the Keyring hangs. A watchdog calls it.
func (k *Keyring) Alive() {
	k.lock.locked()
	k.now()
	k.mu.Lock() // List needs it only after a change
	defer k.mu.Unlock()
}

// settle waits for the first look at the tokens, until startPatience after the start.
func (k *Keyring) settle(ctx context.Context) {
	select {
	case <-k.opts.Tokens.Settled():
		return
	default:
	}
	ctx, cancel := context.WithDeadline(ctx, k.start.Add(startPatience))
	defer cancel()
	select {
	case <-k.opts.Tokens.Settled():
	case <-ctx.Done():
	}
}

// lookAgain tells whether an empty list may look at the tokens again. It returns true at
// most once a second.
func (k *Keyring) lookAgain() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.empty) < time.Second {
		return false
	}
	k.empty = time.Now()
	return true
}

// Sign makes a signature. It asks a person for an approval if the limits of the identity,
// the socket or the rules say so. It asks for a PIN if the token needs one. If only an
// upstream agent has the key, the upstream agent makes the signature.
func (k *Keyring) Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error) {
	r.Content = judged(c, r.Content)
	s := new(signing)
	k.setUse(&s.use, &s.login, c, r)
	rec := k.audit.Begin(request.ActionSign, &s.use)
	sig, err := k.signFor(ctx, rec, s, r)
	k.audit.End(rec, err)
	return sig, err
}

func (k *Keyring) signFor(ctx context.Context, rec *audit.Record, s *signing, r request.Sign) (*ssh.Signature, error) {
	c := rec.Use.Caller
	inside, err := k.lock.enter(ctx, c, rec.Use)
	if err != nil {
		rec.Key = k.describe(r.Key)
		return nil, err
	}
	defer inside.leave()
	ctx = inside
	id, unseen := k.find(c, r.Key)
	if id == nil {
		// The key may have come a moment ago.
		k.settle(ctx)
		k.opts.Certificates.Look()
		id, unseen = k.find(c, r.Key)
	}
	switch {
	case id == nil && unseen != nil:
		// The answer takes as long as for a key that does not exist.
		k.opts.Tokens.Poke()
		k.upstreamOf(ctx, c, r.Key)
		rec.Key = k.describe(r.Key)
		return nil, unseen
	case id == nil:
		k.opts.Tokens.Poke()
		rec.Key = k.describe(r.Key)
		sig, err := k.signUpstream(ctx, rec, r)
		return sig, inside.reason(err)
	}
	rec.About(&id.Target, &id.prefix)
	sig, err := k.sign(ctx, rec, s, id, r)
	return sig, inside.reason(err)
}

func (k *Keyring) sign(ctx context.Context, rec *audit.Record, s *signing, id *identity, r request.Sign) (*ssh.Signature, error) {
	c := rec.Use.Caller
	algorithm, hash, err := algorithmFor(id.plain, r.Flags)
	if err != nil {
		return nil, err
	}
	if err := id.limits.permitsLogin(c, r.Login); err != nil {
		return nil, err
	}
	if id.owed != nil && c.Forwarded {
		if err := id.owed.permitsLogin(c, r.Login); err != nil {
			return nil, err
		}
	}
	rec.Use.Unlimited = id.owed != nil
	// The token may stop asking for a PIN until the signature. Then use asks for an
	// approval.
	rec.Use.PINPays = rec.Use.Unlimited && id.asksPIN()
	s.access = access{Target: &id.Target, await: id.awaited && id.software == nil}
	s.data, s.hash = r.Data, hash
	if id.limits.confirm {
		s.each = "ssh-add -c, with which the key was added"
	}
	if id.software != nil {
		s.elsewhere = func(ctx context.Context) (err error) {
			s.raw, err = k.signSoftware(ctx, c, id.software, r.Data, hash)
			return err
		}
	}
	if id.hidden() {
		s.check = func() error { return k.stillThere(c, id) }
	}
	err = k.Guard.use(ctx, rec, &s.access, s)
	s.data = nil // the data is the door's memory, and the record lives longer
	if err != nil {
		return nil, err
	}
	if id.owed != nil {
		k.paid(id)
	}
	return signature(id.plain, algorithm, s.raw)
}

// signing has the data of a request to sign, and then its signature.
type signing struct {
	use   request.Use
	login request.Login // of use
	access
	data []byte
	hash crypto.Hash
	raw  []byte // the signature, as the token returns it
}

// operate signs with a key of a token.
func (s *signing) operate(ctx context.Context, key request.Key) (err error) {
	s.raw, err = key.SignMessageContext(ctx, s.data, s.hash)
	return err
}

// setUse fills use from a request. It copies the fields of the request, because they are
// the door's memory. A prompt outlives the request if other requests share the prompt.
func (k *Keyring) setUse(use *request.Use, login *request.Login, c *request.Caller, r request.Sign) {
	use.Caller, use.Content, use.Hosts, use.Fingerprint = c, r.Content, k.opts.Hosts, k.opts.Fingerprint
	l := r.Login
	if l == nil {
		return
	}
	n := len(l.SessionID)
	own := append(append(make([]byte, 0, n+len(l.HostKey)), l.SessionID...), l.HostKey...)
	*login = request.Login{User: l.User, SessionID: own[:n:n]}
	if l.HostKey != nil {
		login.HostKey = own[n:]
	}
	use.Login = login
}

// fingerprint returns the fingerprint of a key, for people.
func (k *Keyring) fingerprint(key ssh.PublicKey) string {
	if k.opts.Fingerprint != nil {
		return k.opts.Fingerprint(key)
	}
	return ssh.FingerprintSHA256(key)
}

// describe returns the fingerprint of a key in wire form, or says that it is unreadable.
func (k *Keyring) describe(key []byte) string {
	pub, err := ssh.ParsePublicKey(key)
	if err != nil {
		return "a key of unknown kind"
	}
	return k.fingerprint(sshkey.Plain(pub))
}
