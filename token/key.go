package token

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/signing"
	"p11-agent/token/wire"
)

// Key is a private key on a token. It is known by its public key and by the
// token and ID it was found with, not by where it is plugged in: a Key stays
// good while its token is away and comes back, while its module is restarted,
// and while others log the token out. Methods may be called from any goroutine.
type Key struct {
	token *Token
	pair  *pairs.Pair
	uri   *pkcs11uri.URI
	text  string // the URI in its canonical form
	use   *usage // that of every Key of the same pair
}

// usage counts signatures. It is read and written at any time.
type usage struct {
	count atomic.Uint64
	last  atomic.Int64 // nanoseconds since 1970; 0: never
	proof proof
}

func (u *usage) note(now time.Time) {
	u.count.Add(1)
	u.last.Store(now.UnixNano())
}

func (u *usage) lastTime() time.Time {
	if n := u.last.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

var (
	_ crypto.Signer        = (*Key)(nil)
	_ crypto.MessageSigner = (*Key)(nil)
)

// newKey makes the key of a pair. Its URI names the token by label and serial
// and the key by its ID, which stay the same before and after a login; the
// label only where the ID does not tell it from the others of the token: ids counts the
// keys of each ID.
func newKey(t *Token, p *pairs.Pair, ids map[string]int) *Key {
	label := ""
	if len(p.ID) == 0 || ids[string(p.ID)] > 1 {
		label = p.Label
	}
	u := pkcs11uri.ForKey(t.ID, label, p.ID)
	return &Key{token: t, pair: p, uri: u, text: u.String(), use: new(usage)}
}

// Public returns the public half: *rsa.PublicKey, *ecdsa.PublicKey or
// ed25519.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.pair.Public }

// URI returns the canonical PKCS#11 URI of the key.
func (k *Key) URI() string { return k.text }

// Label returns the object's label on the token, which may be empty.
func (k *Key) Label() string { return k.pair.Label }

// PublicLabel returns the label of the object that shows the key without a login: its
// public key or certificate. It is the same before and after a login; Label may change. It
// is Label where no such object has a label.
func (k *Key) PublicLabel() string { return k.pair.PublicLabel() }

// ID returns CKA_ID, which may be empty.
func (k *Key) ID() []byte { return bytes.Clone(k.pair.ID) }

// Token returns the token the key is on.
func (k *Key) Token() wire.TokenID { return k.token.ID }

// Module returns the name of the module that the token is seen through.
func (k *Key) Module() string { return k.token.module.spec.Name }

// Certificates returns the X.509 certificates of the key on the token, in DER.
func (k *Key) Certificates() [][]byte { return slices.Clone(k.pair.Certificates) }

// AlwaysAuthenticate tells whether the key wants the PIN for each signature, as
// far as that is known: some tokens say it only after a login.
func (k *Key) AlwaysAuthenticate() bool { return k.pair.Always }

// Unfit says why the key is not one to offer unless it is named, or is empty:
// keys that are not for signing, attestation keys, encryption certificates.
func (k *Key) Unfit() string { return k.pair.Unfit }

// Present tells whether the key's token is there, as far as is known: just after
// the start that is what was known before.
func (k *Key) Present() bool { return k.token.present() }

// TokenReader returns the reader that the key's token is in, when another token of the
// same name is there as well; empty otherwise.
func (k *Key) TokenReader() string { return k.token.reader() }

// TokenName names the key's token to a person.
func (k *Key) TokenName() string { return k.token.name() }

// AsksPIN tells whether a signature that begins now would have a person give the PIN, as far
// as is known without asking the token. It would not when somebody is logged in, unless the
// key wants the PIN for each signature; when a source or the PIN that is kept logs in; or
// when a login is under way, whose prompt may be about another key.
func (k *Key) AsksPIN() bool {
	t, s := k.token, k.token.module.store
	each := t.current(k).pair.Always
	t.mu.Lock()
	wanted := t.slot.Info.Flags&wire.CKFLoginRequired != 0
	open := t.session != nil || t.attempted != nil
	t.mu.Unlock()
	if !wanted || open && !each || s.source(k) != nil {
		return false
	}
	return t.pins.Asks()
}

// Signatures returns how many signatures the key has made since the start, and when
// the last one was, zero for never.
func (k *Key) Signatures() (n uint64, last time.Time) { return k.use.count.Load(), k.use.lastTime() }

// Insertions counts how often the key's token has appeared.
func (k *Key) Insertions() uint64 {
	return k.token.inserts()
}

// Matches tells whether a URI selects the key where it is now.
func (k *Key) Matches(u *pkcs11uri.URI) bool { return k.matches(u, true) }

func (k *Key) matches(u *pkcs11uri.URI, byPath bool) bool {
	if u.ID != nil && !k.pair.HasID(u.ID) { // most of thousands of keys end here
		return false
	}
	if !k.token.matches(u, byPath) {
		return false
	}
	// A URI may name the key by any of the objects that belong to it; private
	// keys that show only after a login count as being there.
	fits := func(class uint64) bool {
		return u.MatchObject(pkcs11uri.ObjectInfo{Class: className(class), ID: u.ID, Label: text(u.Object)})
	}
	label := u.Object == nil || k.pair.HasLabel(*u.Object)
	return label && (fits(wire.CKOPrivateKey) || slices.ContainsFunc(k.pair.Members, func(m pairs.Member) bool { return fits(m.Class) }))
}

func text(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func className(cko uint64) pkcs11uri.Class {
	switch cko {
	case wire.CKOCertificate:
		return pkcs11uri.ClassCert
	case wire.CKOPublicKey:
		return pkcs11uri.ClassPublic
	default:
		return pkcs11uri.ClassPrivate
	}
}

// String returns the URI.
func (k *Key) String() string { return k.text }

// Sign signs a digest; see SignContext. It is for code that has no context,
// such as crypto/tls (crypto.Signer).
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

// SignMessage signs a message; see SignMessageContext (crypto.MessageSigner).
func (k *Key) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignMessageContext(context.Background(), msg, opts)
}

// SignContext has the token sign a digest that was made with opts.HashFunc:
// RSA with PKCS #1 v1.5 padding, or PSS when opts is *rsa.PSSOptions; ECDSA,
// encoded in ASN.1. Ed25519 signs the message itself, with hash 0. A PIN is
// asked for when the token wants one.
//
// It fails with a *pin.Error, pin.ErrCancelled, ErrAbsent, a *ModuleError, or the
// context's error. The signature was verified with the public key when it is one of
// RSA, or of a token that takes a quarter of a millisecond for it or more. Of others it is the first
// that each module process makes, and then those that a twentieth of the time for making
// them is enough for.
func (k *Key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	r, err := signing.ForDigest(digest, opts)
	if err != nil {
		return nil, err
	}
	return k.sign(ctx, r)
}

// SignMessageContext is SignContext for the message itself, which is hashed
// with opts.HashFunc here or, where the token insists, by the token.
func (k *Key) SignMessageContext(ctx context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	r, err := signing.ForMessage(msg, opts)
	if err != nil {
		return nil, err
	}
	return k.sign(ctx, r)
}

// made is a signature as a token has made it.
type made struct {
	signature []byte
	by        *process.Process
	took      time.Duration // at least
}

// sign has the token sign, and puts right once each what may have broken since
// the last time: the module process, the session, the login.
func (k *Key) sign(ctx context.Context, r signing.Request) ([]byte, error) {
	methods, err := r.Methods(k.pair.Public)
	if err != nil {
		return nil, err
	}
	methods = k.token.prefer(methods)
	m, err := k.signWith(ctx, methods)
	if err == nil {
		now := time.Now()
		k.use.note(now)
		k.token.use.note(now)
		k.token.used(ctx, k)
	} else {
		if r.Message == nil && refusesMechanism(err) {
			err = fmt.Errorf("token %q does not sign digests with this key, and the message is not known here: %w", k.token.ID.Label, err)
		}
		return nil, err
	}
	sig, err := signing.Encode(k.pair.Public, m.signature)
	if err == nil {
		err = k.check(r, m, sig)
	}
	if err != nil {
		return nil, fmt.Errorf("token %q, through module %q: %w", k.token.ID.Label, k.Module(), err)
	}
	return sig, nil
}

// signWith has the token sign with the first method that it supports.
func (k *Key) signWith(ctx context.Context, methods []signing.Method) (m made, err error) {
	err = k.heal(ctx, operation{
		attempt: func(p *process.Process, mustLogin bool) (login uint64, err error) {
			m, login, err = k.attempt(ctx, p, methods[0], mustLogin)
			return login, err
		},
		adapt: func(err error) bool {
			if len(methods) == 1 || !refusesMechanism(err) {
				return false
			}
			k.token.refuse(methods[0].Mechanism)
			methods = methods[1:]
			return true
		},
	})
	return m, err
}

// attempt logs in, where that is expected to be needed, and signs, once. login is
// the number of the login that it signed with.
func (k *Key) attempt(ctx context.Context, p *process.Process, method signing.Method, mustLogin bool) (m made, login uint64, err error) {
	t := k.token
	if !t.present() {
		return made{}, 0, ErrAbsent
	}
	now := t.current(k)
	var with prelude
	defer func() { with.typed.Wipe() }()
	if (mustLogin || now.needsLogin()) && !t.loggedIn(p) {
		if with.typed, err = t.login(ctx, k, supplied{}); err != nil {
			return made{}, 0, err
		}
		with.fresh = true
		now = t.current(k)
	}
	login = t.lastLogin()
	m, err = now.signOnce(ctx, p, method, with)
	return m, login, err
}

// prelude is what was done for a signature before it is made.
type prelude struct {
	fresh bool           // somebody has logged in just now
	typed *secret.Secret // what a person has given for this signature already
}

// refusesMechanism tells whether a signature failed because of how it was to be
// made.
func refusesMechanism(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	return ok && (e.Function == "C_SignInit" || e.Function == "C_Sign") &&
		wire.IsRV(err, wire.CKRMechanismInvalid, wire.CKRMechanismParamInvalid, wire.CKRFunctionNotSupported,
			wire.CKRDataLenRange, wire.CKRDataInvalid)
}

// needsLogin tells whether the key can be expected to want a login: its token
// has logins, and it did not show before one, or wants its PIN for each
// signature, which comes on top of a login (PKCS#11 v2.40 section 4.9,
// CKA_ALWAYS_AUTHENTICATE).
func (k *Key) needsLogin() bool {
	if k.pair.Open && !k.pair.Always {
		return false
	}
	return k.token.info().Flags&wire.CKFLoginRequired != 0
}

// signOnce has the token sign.
func (k *Key) signOnce(ctx context.Context, p *process.Process, m signing.Method, with prelude) (made, error) {
	if k.pair.Always {
		req := new(wire.Sign)
		k.describe(req, m)
		start := time.Now()
		sig, err := k.token.signWithPIN(ctx, p, k, req, with)
		return made{sig, p, time.Since(start)}, err
	}
	turn, err := p.AwaitTurn(ctx, k.token.ID, k.token.info())
	if err != nil {
		return made{}, err
	}
	defer k.working(ctx)()
	k.describe(&turn.Request, m)
	sig, took, err := p.Sign(ctx, turn)
	return made{sig, p, took}, err
}

// describe makes the request for a signature.
func (k *Key) describe(req *wire.Sign, m signing.Method) {
	req.Key = wire.KeyID{
		Token: k.token.ID, ID: k.pair.ID, Label: k.pair.Label, KeyType: k.pair.KeyType,
		Modulus: k.pair.Modulus, ECPoint: k.pair.Point, Any: k.pair.Loose,
	}
	req.SignatureLen = signing.Length(k.pair.Public)
	m.Describe(req)
}

// working tells that the token begins to work on a signature. The function it
// returns tells that the work is over.
func (k *Key) working(ctx context.Context) (done func()) {
	if f := k.token.module.store.opts.Working; f != nil {
		return f(ctx, k)
	}
	return func() {}
}

// prefer puts the methods last that the token does not support: those whose mechanism it
// has refused, or does not list.
func (t *Token) prefer(methods []signing.Method) []signing.Method {
	t.mu.Lock()
	defer t.mu.Unlock()
	return signing.Prefer(methods, func(mechanism uint64) bool {
		listed := slices.ContainsFunc(t.slot.Mechanisms, func(m wire.Mechanism) bool { return m.Type == mechanism })
		return t.refusesMechanism[mechanism] || len(t.slot.Mechanisms) > 0 && !listed
	})
}

// refuse remembers that the token does not take a mechanism.
func (t *Token) refuse(mechanism uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusesMechanism[mechanism] = true
}
