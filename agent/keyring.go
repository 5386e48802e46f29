package agent

import (
	"bytes"
	"context"
	"crypto"
	"encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/pinentry/secret"
)

const (
	// startPatience is how long after its start the keyring waits for tokens to
	// be looked at before it lists keys: whoever starts an agent and lists its
	// keys wants to see them.
	startPatience = 2 * time.Second
	// emptyPatience is how long a list that would be empty waits for tokens to
	// be looked at again. One with keys in it never waits.
	emptyPatience = 500 * time.Millisecond
)

var (
	errUnknownKey = errors.New("the agent has no such key")
	errForwarded  = errors.New("it came over a forwarded connection")
	errDeclined   = errors.New("it was not confirmed")
	errHungUp     = errors.New("the client hung up")
)

// A Key is a private key on a token.
type Key interface {
	// Public is comparable by its Equal method, as keys of the standard library
	// are.
	Public() crypto.PublicKey
	// URI names the key, and is its comment.
	URI() string
	// Unfit says why the key is not offered unless it is named; empty: it is.
	Unfit() string
	// Insertions counts how often the token of the key has appeared.
	Insertions() uint64
	// SignMessageContext signs as crypto.MessageSigner does: ECDSA in ASN.1.
	SignMessageContext(ctx context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error)
}

// A Selection is what a client or the configuration names: it selects keys,
// also those that come later.
type Selection interface {
	String() string // for the log, and to know it again
	Match(Key) bool
	// Broad tells whether it selects keys without naming them one by one.
	Broad() bool
	// All tells whether it selects every key there is.
	All() bool
}

// Tokens finds keys on tokens. All methods but Rescan, Select and LogoutAll
// return at once.
type Tokens interface {
	// Keys returns the keys that are there, in their order.
	Keys() []Key
	// Generation changes whenever Keys does.
	Generation() uint64
	// Settled is closed when tokens were looked at for the first time.
	Settled() <-chan struct{}
	// Poke says that somebody looks at the keys.
	Poke()
	// Rescan looks at all tokens again.
	Rescan(ctx context.Context) error
	// Parse reads what a client named.
	Parse(provider []byte) (Selection, error)
	// Select returns the keys that are selected now, of which there is at least
	// one, and logs in to their token when a PIN is given.
	Select(ctx context.Context, s Selection, pin *secret.Secret) ([]Key, error)
	// Drop is told when a Selection that Parse made is of no more use.
	Drop(s Selection)
	// LogoutAll logs out of all tokens.
	LogoutAll(ctx context.Context) error
}

// A Confirmer asks a person whether a key may be used.
type Confirmer interface {
	// Confirm reports whether the person agreed. comment names the key.
	Confirm(ctx context.Context, comment, fingerprint string) (bool, error)
}

// Options make a Keyring.
type Options struct {
	Tokens Tokens
	// Automatic selects the identities that are there without being added, in
	// this order. nil: every key that is fit to log in with.
	Automatic []Selection
	// Name returns the configured name of a key, or nothing.
	Name func(Key) string
	// Lifetime is that of added identities which come with none; 0: for ever.
	Lifetime time.Duration
	// Confirm asks about identities added for confirmation; nil: nobody can be
	// asked, and adding such an identity is refused.
	Confirm Confirmer
	Log     *slog.Logger
}

// A Keyring holds the identities and decides who may use them. All methods may
// be called from any goroutine; none holds a lock while it waits for a person,
// a token or a process.
type Keyring struct {
	opts  Options // Automatic and Name under mu
	log   *slog.Logger
	start time.Time
	view  atomic.Pointer[view]

	mu     sync.Mutex
	change uint64 // counts the changes of what follows
	added  []*addition
	hidden map[string]uint64 // wire form of removed keys to the insertions there were
	empty  time.Time         // when an empty list was looked at again
}

// addition is what one ssh-add has added.
type addition struct {
	selection   Selection
	constraints Constraints
	expires     time.Time // zero: never
}

// identity is a key as clients see it, with every place it can be used at.
type identity struct {
	key         ssh.PublicKey
	wire        string
	comment     string
	homes       []Key
	constraints Constraints
}

// wiredKey is a public key that knows its wire form: clients list keys far more
// often than keys change.
type wiredKey struct {
	ssh.PublicKey
	wire []byte
}

// Marshal returns the wire form, which is not to be changed.
func (k wiredKey) Marshal() []byte { return k.wire }

// view is the list of identities for as long as nothing changes.
type view struct {
	generation uint64 // of the tokens
	change     uint64 // of the keyring
	expires    time.Time
	identities []*identity
	list       []Identity
	byKey      map[string]*identity
}

// NewKeyring makes a Keyring.
func NewKeyring(opts Options) *Keyring {
	return &Keyring{opts: opts, log: opts.Log, start: time.Now(), hidden: make(map[string]uint64)}
}

// now returns the present view, made anew when something has changed.
func (k *Keyring) now() *view {
	v := k.view.Load()
	generation := k.opts.Tokens.Generation()
	if v != nil && v.generation == generation && (v.expires.IsZero() || time.Now().Before(v.expires)) {
		k.mu.Lock()
		change := k.change
		k.mu.Unlock()
		if v.change == change {
			return v
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	v = k.lookLocked(generation)
	k.view.Store(v)
	return v
}

// lookLocked puts the identities together.
func (k *Keyring) lookLocked(generation uint64) *view {
	k.expireLocked()
	v := &view{generation: generation, change: k.change, byKey: make(map[string]*identity)}
	keys := k.opts.Tokens.Keys()
	wires := make([]string, len(keys))
	take := func(i int, c Constraints, replace bool) {
		key := keys[i]
		id := v.byKey[wires[i]]
		if id == nil {
			pub, err := ssh.NewPublicKey(key.Public())
			if err != nil {
				return // not of a type that SSH has
			}
			wires[i] = string(pub.Marshal())
			if id = v.byKey[wires[i]]; id == nil {
				if n, ok := k.hidden[wires[i]]; ok && key.Insertions() <= n {
					return
				}
				id = &identity{key: wiredKey{pub, []byte(wires[i])}, wire: wires[i], comment: key.URI()}
				if name := k.opts.Name(key); name != "" {
					id.comment = name
				}
				v.byKey[id.wire] = id
				v.identities = append(v.identities, id)
			}
		}
		if !slices.Contains(id.homes, key) {
			id.homes = append(id.homes, key)
		}
		if replace {
			id.constraints = c
		}
	}
	if k.opts.Automatic == nil {
		for i, key := range keys {
			if key.Unfit() == "" {
				take(i, Constraints{}, false)
			}
		}
	}
	for _, s := range k.opts.Automatic {
		for i, key := range keys {
			if selects(s, key) {
				take(i, Constraints{}, false)
			}
		}
	}
	for _, a := range k.added {
		for i, key := range keys {
			if k.selectsLocked(a.selection, key) {
				take(i, a.constraints, true)
			}
		}
		if !a.expires.IsZero() && (v.expires.IsZero() || a.expires.Before(v.expires)) {
			v.expires = a.expires
		}
	}
	v.list = make([]Identity, len(v.identities))
	for i, id := range v.identities {
		v.list[i] = Identity{Key: id.key, Comment: id.comment}
	}
	return v
}

func selects(s Selection, k Key) bool {
	return s.Match(k) && (k.Unfit() == "" || !s.Broad())
}

// selectsLocked is selects for what a client named. Who names every key where
// the configuration lists some means those: this is how they are brought back.
func (k *Keyring) selectsLocked(s Selection, key Key) bool {
	if s.All() && len(k.opts.Automatic) > 0 {
		return slices.ContainsFunc(k.opts.Automatic, func(s Selection) bool { return selects(s, key) })
	}
	return selects(s, key)
}

// expireLocked ends what was added for a time that is over. An automatic
// identity that was added again for a time goes too: that is what was asked for.
// One that was added once more after that stays, as the last word counts.
func (k *Keyring) expireLocked() {
	now := time.Now()
	added := slices.Clone(k.added)
	for i, a := range added {
		if a.expires.IsZero() || now.Before(a.expires) {
			continue
		}
		k.dropLocked(a)
		later := added[i+1:]
		for _, key := range k.opts.Tokens.Keys() {
			if k.selectsLocked(a.selection, key) && !slices.ContainsFunc(later, func(o *addition) bool { return k.selectsLocked(o.selection, key) }) {
				k.hideKeyLocked(key)
			}
		}
	}
}

// dropLocked forgets an addition.
func (k *Keyring) dropLocked(a *addition) {
	k.added = slices.DeleteFunc(k.added, func(o *addition) bool { return o == a })
	k.opts.Tokens.Drop(a.selection)
	k.change++
}

// hideKeyLocked removes a key until its token is inserted again or it is added
// again.
func (k *Keyring) hideKeyLocked(key Key) int {
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return 0
	}
	w := string(pub.Marshal())
	k.hidden[w] = max(k.hidden[w], key.Insertions())
	k.change++
	return 1
}

// List returns the identities in their order. It waits for tokens only just
// after the start, and when there would be nothing to show; the answer is not
// to be changed.
func (k *Keyring) List(ctx context.Context, _ *Caller) ([]Identity, error) {
	k.settle(ctx)
	v := k.now()
	k.opts.Tokens.Poke()
	if len(v.list) == 0 && k.lookAgain() {
		ctx, cancel := context.WithTimeout(ctx, emptyPatience)
		defer cancel()
		// Whatever it has found by then is what there is.
		_ = k.opts.Tokens.Rescan(ctx)
		v = k.now()
	}
	return v.list, nil
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

// Sign makes a signature, asking for confirmation where the identity was added
// for it and for a PIN where the token wants one.
func (k *Keyring) Sign(ctx context.Context, c *Caller, r SignRequest) (*ssh.Signature, error) {
	ctx = peer.NewContext(ctx, c.Peer)
	k.settle(ctx)
	id := k.now().byKey[string(r.Key)]
	if id == nil {
		k.opts.Tokens.Poke()
		k.refused(c, "sign", describe(r.Key), errUnknownKey)
		return nil, errUnknownKey
	}
	sig, err := k.sign(ctx, id, r)
	if err != nil {
		k.refused(c, "sign", ssh.FingerprintSHA256(id.key), err)
		return nil, err
	}
	k.log.Debug("signed", "key", ssh.FingerprintSHA256(id.key), "comment", id.comment, "algorithm", sig.Format,
		"client", c.Peer.String(), "connection", c.Number)
	return sig, nil
}

func (k *Keyring) sign(ctx context.Context, id *identity, r SignRequest) (*ssh.Signature, error) {
	algorithm, hash, err := algorithmFor(id.key, r.Flags)
	if err != nil {
		return nil, err
	}
	if id.constraints.Confirm {
		ok, err := k.opts.Confirm.Confirm(ctx, id.comment, ssh.FingerprintSHA256(id.key))
		if err != nil {
			return nil, fmt.Errorf("ask for confirmation: %w", err)
		}
		if !ok {
			return nil, errDeclined
		}
	}
	var all []error
	for _, home := range id.homes {
		raw, err := home.SignMessageContext(ctx, r.Data, hash)
		if err == nil {
			blob, err := signatureBlob(id.key, raw)
			if err != nil {
				return nil, err
			}
			return &ssh.Signature{Format: algorithm, Blob: blob}, nil
		}
		all = append(all, err)
		// Only a token that is away is reason to try another: what a person
		// declined on one is not asked for again on the next.
		if ctx.Err() != nil || !isAbsent(err) {
			break
		}
	}
	return nil, errors.Join(all...)
}

// isAbsent tells whether a key failed because it is not there.
func isAbsent(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Absent() bool
	}](err)
	return ok && e.Absent()
}

// AddToken adds what the request's provider selects.
func (k *Keyring) AddToken(ctx context.Context, c *Caller, r TokenRequest) error {
	ctx = peer.NewContext(ctx, c.Peer)
	what, err := k.addToken(ctx, c, r)
	if err != nil {
		k.refused(c, "add", what, err)
		return err
	}
	return nil
}

func (k *Keyring) addToken(ctx context.Context, c *Caller, r TokenRequest) (what string, err error) {
	switch {
	case c.Forwarded:
		return "", errForwarded
	case len(r.Constraints.Unsupported) > 0:
		return "", fmt.Errorf("these constraints cannot be kept: %q", r.Constraints.Unsupported)
	case r.Constraints.Confirm && k.opts.Confirm == nil:
		return "", errors.New("nobody can be asked for confirmation")
	}
	s, err := k.opts.Tokens.Parse(r.Provider)
	if err != nil {
		return "", err
	}
	keys, err := k.opts.Tokens.Select(ctx, s, r.PIN)
	if err != nil {
		k.opts.Tokens.Drop(s)
		return s.String(), err
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	for _, a := range slices.Clone(k.added) {
		if a.selection.String() == s.String() {
			k.dropLocked(a)
		}
	}
	a := &addition{selection: s, constraints: r.Constraints}
	if a.constraints.Lifetime == 0 {
		a.constraints.Lifetime = k.opts.Lifetime
	}
	if a.constraints.Lifetime > 0 {
		a.expires = time.Now().Add(a.constraints.Lifetime)
	}
	k.added = append(k.added, a)
	n := 0
	for _, key := range keys {
		if !k.selectsLocked(s, key) {
			continue
		}
		if pub, err := ssh.NewPublicKey(key.Public()); err == nil {
			delete(k.hidden, string(pub.Marshal()))
			n++
		}
	}
	k.change++
	k.log.Info("keys added", "provider", s.String(), "keys", n, "client", c.Peer.String())
	return s.String(), nil
}

// RemoveToken removes what AddToken has added for the same provider, and what
// it selects of the automatic identities.
func (k *Keyring) RemoveToken(ctx context.Context, c *Caller, r TokenRequest) error {
	s, err := k.opts.Tokens.Parse(r.Provider)
	if err != nil {
		k.refused(c, "remove", "", err)
		return err
	}
	defer k.opts.Tokens.Drop(s)
	before := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, a := range slices.Clone(k.added) {
		if a.selection.String() == s.String() {
			k.dropLocked(a)
			n++
		}
	}
	for _, id := range before.identities {
		for _, key := range id.homes {
			if s.Match(key) {
				n += k.hideKeyLocked(key)
			}
		}
	}
	if n == 0 {
		k.refused(c, "remove", s.String(), errUnknownKey)
		return errUnknownKey
	}
	k.log.Info("keys removed", "provider", s.String(), "client", c.Peer.String())
	return nil
}

// Remove removes one identity until its token is inserted again or it is added
// again.
func (k *Keyring) Remove(_ context.Context, c *Caller, key []byte) error {
	id := k.now().byKey[string(key)]
	if id == nil {
		k.refused(c, "remove", describe(key), errUnknownKey)
		return errUnknownKey
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, home := range id.homes {
		k.hideKeyLocked(home)
	}
	k.log.Info("key removed", "key", ssh.FingerprintSHA256(id.key), "client", c.Peer.String())
	return nil
}

// RemoveAll removes every identity and logs out of every token.
func (k *Keyring) RemoveAll(ctx context.Context, c *Caller) error {
	k.mu.Lock()
	for _, a := range slices.Clone(k.added) {
		k.dropLocked(a)
	}
	for _, key := range k.opts.Tokens.Keys() {
		k.hideKeyLocked(key)
	}
	k.mu.Unlock()
	k.log.Info("all keys removed", "client", c.Peer.String())
	if err := k.opts.Tokens.LogoutAll(ctx); err != nil {
		k.refused(c, "log out", "", err)
		return err
	}
	return nil
}

// Configure changes what is offered without being added, and the names of
// keys. Automatic identities that were removed are back.
func (k *Keyring) Configure(automatic []Selection, name func(Key) string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.opts.Automatic, k.opts.Name = automatic, name
	clear(k.hidden)
	k.change++
}

// refused writes the one line about a request that was not granted.
func (k *Keyring) refused(c *Caller, request, what string, err error) {
	level := slog.LevelWarn
	if errors.Is(err, context.Canceled) {
		level, err = slog.LevelInfo, errHungUp
	}
	attrs := []any{"request", request}
	if what != "" {
		attrs = append(attrs, "what", what)
	}
	k.log.Log(context.Background(), level, "request refused", append(attrs, "reason", err,
		"client", c.Peer.String(), "forwarded", c.Forwarded, "connection", c.Number)...)
}

// describe names a key by its fingerprint, when it is one.
func describe(key []byte) string {
	pub, err := ssh.ParsePublicKey(key)
	if err != nil {
		return "a key of unknown kind"
	}
	return ssh.FingerprintSHA256(pub)
}

// algorithmFor returns the signature algorithm and hash that a request for a
// key means (RFC 9987 section 5.6.1). OpenSSH prefers SHA-256 when both are
// asked for (ssh-agent.c, agent_decode_alg).
func algorithmFor(key ssh.PublicKey, flags SignatureFlags) (string, crypto.Hash, error) {
	switch t := key.Type(); t {
	case ssh.KeyAlgoRSA:
		switch {
		case flags&SignatureRSASHA2256 != 0:
			return ssh.KeyAlgoRSASHA256, crypto.SHA256, nil
		case flags&SignatureRSASHA2512 != 0:
			return ssh.KeyAlgoRSASHA512, crypto.SHA512, nil
		default:
			return ssh.KeyAlgoRSA, crypto.SHA1, nil
		}
	case ssh.KeyAlgoECDSA256:
		return t, crypto.SHA256, nil
	case ssh.KeyAlgoECDSA384:
		return t, crypto.SHA384, nil
	case ssh.KeyAlgoECDSA521:
		return t, crypto.SHA512, nil
	case ssh.KeyAlgoED25519:
		return t, 0, nil
	default:
		return "", 0, fmt.Errorf("no signature algorithm is known for a key of type %s", t)
	}
}

// signatureBlob turns a signature into the form it has in SSH (RFC 5656 section
// 3.1.2 for ECDSA; the others stay as they are).
func signatureBlob(key ssh.PublicKey, sig []byte) ([]byte, error) {
	switch key.Type() {
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		r, s, err := parseECDSA(sig)
		if err != nil {
			return nil, err
		}
		return ssh.Marshal(struct{ R, S *big.Int }{r, s}), nil
	}
	return bytes.Clone(sig), nil
}

func parseECDSA(sig []byte) (r, s *big.Int, err error) {
	var v struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(sig, &v)
	if err != nil || len(rest) > 0 {
		return nil, nil, errors.New("the token gave a malformed ECDSA signature")
	}
	return v.R, v.S, nil
}
