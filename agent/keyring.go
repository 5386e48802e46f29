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
	// at the tokens before it lists keys, if it knows no keys from before. A person who
	// starts an agent and lists its keys wants to see them.
	startPatience = 2 * time.Second
	// emptyPatience bounds how long a list that would be empty waits for another look at
	// the tokens. A list with keys never waits.
	emptyPatience = 500 * time.Millisecond
)

var errUnknownKey = errors.New("the agent has no such key")

// Tokens finds keys on tokens. All methods but Rescan, Select, Login, Logout,
// LogoutOf and LogoutAll return at once.
type Tokens interface {
	// Keys returns the keys that are there, in their order.
	Keys() []request.Key
	// Away returns the keys that are known and not there.
	Away() []request.Key
	// Generation changes whenever Keys or Away does.
	Generation() uint64
	// Changed returns a channel that is closed at the next such change.
	Changed() <-chan struct{}
	// Settled is closed when tokens were looked at for the first time.
	Settled() <-chan struct{}
	// Poke says that a client uses the keys.
	Poke()
	// Rescan looks at all tokens again.
	Rescan(ctx context.Context) error
	// Parse reads what a client names. For a remote client it looks at no file, and takes
	// only a URI that names no module file and has no PIN.
	Parse(provider []byte, remote bool) (request.Selection, error)
	// Select returns the keys that are selected now and may be reached, of which there
	// is at least one, and logs in to their token when a PIN is given. Other keys count
	// as not there. taken tells that the token took this PIN just now. A token that wants
	// no login tries none.
	Select(ctx context.Context, s request.Selection, reached func(request.Key) bool, pin *secret.Secret) (keys []request.Key, taken bool, err error)
	// Drop is told when a Selection that Parse made is of no more use.
	Drop(s request.Selection)
	// LogoutAll logs out of all tokens.
	LogoutAll(ctx context.Context) error
	// LogoutOf logs out of the tokens that are chosen by all their known keys.
	LogoutOf(ctx context.Context, chosen func([]request.Key) bool) error
	// Login logs in to the one token that is selected. A nil PIN comes from where a
	// signature would get it. When one try is left, a person is asked first.
	Login(ctx context.Context, s request.Selection, pin *secret.Secret) (request.LoginAnswer, error)
	// Logout logs out of the tokens that are selected.
	Logout(ctx context.Context, s request.Selection) error
}

// Rules are what Configure changes.
type Rules struct {
	// Automatic selects the identities that are there without being added, in
	// this order. nil: every key that is fit to log in with.
	Automatic []request.Selection
	// Name returns the configured name of a key, or nothing.
	Name func(request.Key) string
	// Listed returns the comment that the list of identities has for a key of a token
	// without a configured name; nil: its URI. Everything else has the URI.
	Listed func(request.Key) string
	// OfferAway tells whether a key is offered while its token is away; named says
	// that Automatic selects it. nil: none is.
	OfferAway func(k request.Key, named bool) bool
	// Allow returns what kinds of data a key of a token signs besides logins and
	// SSH signatures, and the tests of ssh-add -T; KindUnknown stands for all. nil: no other.
	Allow func(request.Key) []request.Kind
	// Approval returns when a person is asked before a key of a token signs; for
	// nil, every key that is on none. nil: never.
	Approval func(request.Key) approval.Policy
}

// Options make a Keyring.
type Options struct {
	Tokens Tokens
	Rules
	// Insert asks for the token of such a key before it signs. nil: there is no way to
	// ask.
	Insert approval.Inserter
	// InsertTimeout bounds how long a signature waits for the token; 0: a minute.
	InsertTimeout time.Duration
	// Lifetime is that of added identities which come with none; 0: for ever.
	Lifetime time.Duration
	// Confirm asks whether a key may be used. nil: there is no way to ask. Then the Keyring
	// refuses uses that are to be confirmed, and additions with that constraint.
	Confirm approval.Confirmer
	// Questions decides whether a person may be asked; nil: one of the Keyring's own.
	// All that show a question to a person share one.
	Questions *approval.Questions
	// SoftwareKeys lets clients add private keys, which are kept in memory.
	SoftwareKeys bool
	// RemoteTokens lets clients behind forwarded connections add keys of tokens.
	RemoteTokens bool
	// Certificates are shown with the keys of tokens that they certify; nil: none.
	Certificates *certdir.Dir
	// Upstreams are asked for what the Keyring does not have, in this order.
	Upstreams []Upstream
	// Hosts gives names to host keys; nil: they have none.
	Hosts request.HostNamer
	// Fingerprint is how keys are named to people; nil: ssh.FingerprintSHA256.
	Fingerprint func(ssh.PublicKey) string
	// Failed gets each request of this machine that the agent refuses, unless a person has
	// just refused it in a prompt. It must not wait. It may be nil.
	Failed func(audit.Event)
	// Report makes the answer to a question for the status out of what the keyring
	// knows, of the tokens that are selected; nil: of all. It must not wait. nil: there
	// is no status.
	Report func(Status, request.Selection) ([]byte, error)
	// Log gets one line for each request that uses or changes keys.
	Log *slog.Logger
}

// A Keyring holds the identities, and decides which connection may use which of them. All
// methods may be called from any goroutine. None holds a lock while it waits for a person,
// a token or a process.
type Keyring struct {
	*Guard

	opts  Options // Rules under mu
	log   *slog.Logger
	start time.Time
	// Made under mu. tokens goes on while keys in memory come and go, and view does not.
	tokens atomic.Pointer[tokenView]
	view   atomic.Pointer[view]
	knew   bool // there were keys from before at the start: what is listed need not wait for tokens

	computing turns

	change atomic.Uint64 // counts the changes of what follows but software; made under mu

	mu       sync.Mutex
	plain    map[request.Key]*plainKey // those of the present view
	added    []*addition
	software softwareKeys
	hidden   map[string]uint64 // wire form of removed identities to the insertions there were
	// owed are the limits that keys of tokens had, by their wire form, and have not any
	// more because they were removed or their time was over. A key that is back with less
	// than that costs a PIN or an approval when it is used first.
	owed     map[string]*limits
	empty    time.Time           // when an empty list was looked at again
	origins  map[string]Upstream // wire form of the keys of upstream agents, as listed last
	sizes    map[any]int         // of what additions share; see addedLocked
	troubles map[string]string   // what was logged last about an upstream agent, by its name
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

// List returns the identities that a connection may see, in their order, and
// after them those of upstream agents. It waits for tokens only just after the
// start, and when there would be nothing to show. While the agent is locked it is
// empty.
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
		// The list has what the look has found by then.
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
			id.Named = true // so is its agent, by the configuration
			own.Identities = append(own.Identities, id)
		}
	}
	return own, nil
}

// Alive does what List and Sign begin with, and returns. It looks at no token and shows no
// prompt. So it returns at once unless the Keyring hangs. It is for a watchdog.
func (k *Keyring) Alive() {
	k.lock.locked()
	k.now()
	k.mu.Lock() // which no list needs while nothing changes
	defer k.mu.Unlock()
}

// settle waits until tokens were looked at once, for a bounded time after the
// start.
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

// lookAgain tells whether an empty list is reason to look at the tokens again:
// once a second.
func (k *Keyring) lookAgain() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.empty) < time.Second {
		return false
	}
	k.empty = time.Now()
	return true
}

// Sign makes a signature. It asks for confirmation where the limits of the identity, the
// socket or the rules want it, and for a PIN where the token does. For a key that only an
// upstream agent has, that agent makes it.
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
		// It may have come a moment ago.
		k.settle(ctx)
		k.opts.Certificates.Look()
		id, unseen = k.find(c, r.Key)
	}
	switch {
	case id == nil && unseen != nil:
		// It takes as long as for a key that is not there.
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
	// Whether a PIN is asked for may change until it is. Then it is not the price.
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
	s.data = nil // the door's memory, which the record outlives
	if err != nil {
		return nil, err
	}
	if id.owed != nil {
		k.paid(id)
	}
	return signature(id.plain, algorithm, s.raw)
}

// signing is a signature that is being made, and what it is for.
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

// setUse sets use to what a request is for. It copies what the request says: that is the
// door's memory, and a prompt outlives the request when others share the prompt.
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

// fingerprint names a key to people.
func (k *Keyring) fingerprint(key ssh.PublicKey) string {
	if k.opts.Fingerprint != nil {
		return k.opts.Fingerprint(key)
	}
	return ssh.FingerprintSHA256(key)
}

// describe names a key by its fingerprint, when it is one.
func (k *Keyring) describe(key []byte) string {
	pub, err := ssh.ParsePublicKey(key)
	if err != nil {
		return "a key of unknown kind"
	}
	return k.fingerprint(sshkey.Plain(pub))
}
