package token

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token/objects"
	"p11-agent/token/operation"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/usage"
	"p11-agent/token/wire"
)

// Key is a private key on a token. Its public key, its token and its ID identify it, not the slot.
// A Key stays valid while its token is away, while its module starts again, and after another
// program logs the token out. Methods may be called from any goroutine.
type Key struct {
	token *Token
	pair  *pairs.Pair
	uri   *pkcs11uri.URI
	text  string       // uri, printed
	use   *usage.Usage // shared by every Key of the same pair
}

var (
	_ crypto.Signer        = (*Key)(nil)
	_ crypto.MessageSigner = (*Key)(nil)
)

// newKey makes the Key of a pair. The URI names the token by label and serial number, and the key
// by ID. Both stay the same after a login. The URI has the label only if several keys of the token
// have the ID. set holds the pairs of the token, or is nil for a key that is yet to be made.
func newKey(t *Token, p *pairs.Pair, set *objects.Set) *Key {
	label := ""
	if !set.Alone(p) {
		label = p.Label
	}
	u := pkcs11uri.ForKey(t.ID, label, p.ID)
	return &Key{token: t, pair: p, uri: u, text: u.String(), use: new(usage.Usage)}
}

// Public returns the public half: *rsa.PublicKey, *ecdsa.PublicKey or
// ed25519.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.pair.Public }

// URI returns the canonical PKCS#11 URI of the key.
func (k *Key) URI() string { return k.text }

// Label returns the object's label on the token, which may be empty.
func (k *Key) Label() string { return k.pair.Label }

// PublicLabel returns the label of the object that shows the key without a login: its public key or
// certificate. A login may change Label, but not PublicLabel. It is Label if no such object has a
// label.
func (k *Key) PublicLabel() string { return k.pair.PublicLabel() }

// ID returns CKA_ID, which may be empty.
func (k *Key) ID() []byte { return bytes.Clone(k.pair.ID) }

// Token returns the token the key is on.
func (k *Key) Token() wire.TokenID { return k.token.ID }

// Module returns the name of the module that shows the token.
func (k *Key) Module() string { return k.token.module.spec.Name }

// Certificates returns the X.509 certificates of the key on the token, in DER.
func (k *Key) Certificates() (all [][]byte) {
	for _, c := range k.pair.Certificates {
		all = append(all, c.DER)
	}
	return all
}

// AlwaysAuthenticate reports whether the key wants the PIN for each signature
// (CKA_ALWAYS_AUTHENTICATE). Some tokens show that only after a login.
func (k *Key) AlwaysAuthenticate() bool { return k.pair.Always }

// Unfit returns the reason not to offer the key unless a user names it, or "". Such keys are not
// for signing, or attestation keys, or have an encryption certificate.
func (k *Key) Unfit() string { return k.pair.Unfit }

// Present reports whether the token of the key is present, as far as the agent knows. Just after
// the start, that is the state at the end of the last run.
func (k *Key) Present() bool { return k.token.present() }

// TokenReader returns the reader of the token if another token of the same name is present, and ""
// otherwise.
func (k *Key) TokenReader() string { return k.token.reader() }

// TokenName returns a name of the token for a person.
func (k *Key) TokenName() string { return k.token.name() }

// AsksPIN reports whether a signature that begins now would ask a user for the PIN, as far as the
// agent knows without asking the token. It would not after a login, unless the key wants the PIN
// for each signature. It would not if a source or the kept PIN logs in, or while a login is under
// way, whose prompt may be about another key.
func (k *Key) AsksPIN() bool {
	t, s := k.token, k.token.module.store
	each := t.current(k).pair.Always
	t.mu.Lock()
	wanted := t.slot.Info.Flags&wire.CKFLoginRequired != 0
	open := t.logins.Possible() != nil
	t.mu.Unlock()
	if !wanted || open && !each || s.source(k) != nil {
		return false
	}
	return t.pins.Asks()
}

// Signatures returns how many signatures the key has made since the start, and when it made the
// last. The time is zero if it made none.
func (k *Key) Signatures() (n uint64, last time.Time) { return k.use.Signatures(), k.use.Last() }

// Insertions returns how often the token of the key has appeared.
func (k *Key) Insertions() uint64 {
	return k.token.visits.Count()
}

// Matches reports whether a URI selects the key.
func (k *Key) Matches(u *pkcs11uri.URI) bool {
	return objects.Names(u, k.pair) && k.token.matches(u)
}

// String returns the URI.
func (k *Key) String() string { return k.text }

// Sign signs a digest without a context, for code such as crypto/tls (crypto.Signer). See
// SignContext.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

// SignMessage signs a message without a context (crypto.MessageSigner). See SignMessageContext.
func (k *Key) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignMessageContext(context.Background(), msg, opts)
}

// SignContext makes the token sign a digest that the caller made with opts.HashFunc. RSA keys use
// PKCS #1 v1.5 padding, or PSS if opts is *rsa.PSSOptions. ECDSA signatures are in ASN.1. Ed25519
// signs the message itself, with hash 0. A prompt asks for the PIN if the token wants one.
//
// The error is a *PINError, ErrCancelled, ErrAbsent, a *ModuleError, or the error of ctx. The agent
// verifies each RSA signature, each signature of a card, and each signature that takes a quarter of
// a millisecond or more. Of other signatures, it verifies the first of each module process, and
// some more within a twentieth of the token's time.
func (k *Key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	plan, err := operation.ForDigest(k.pair.Public, digest, opts)
	if err != nil {
		return nil, err
	}
	return k.operate(ctx, &plan)
}

// SignMessageContext is SignContext for the message itself. The agent hashes it with opts.HashFunc,
// or the token does if it insists.
func (k *Key) SignMessageContext(ctx context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	plan, err := operation.ForMessage(k.pair.Public, msg, opts)
	if err != nil {
		return nil, err
	}
	return k.operate(ctx, &plan)
}

// Operate makes the token sign, decrypt or derive, in the terms of PKCS#11 v2.40 (sections 5.11, 5.9
// and 5.13). The mechanisms and their parameters are those of package operation. A prompt asks for
// the PIN if the token wants one. If the token lacks a mechanism that hashes, the agent hashes.
//
// The result has the bytes that C_Sign or C_Decrypt would return, or the value (CKA_VALUE) of the
// derived key. An ECDSA signature is r and s, each with the bytes of the curve. A derived secret is
// the x coordinate of the shared point. Signatures are verified as SignContext does it.
//
// A plaintext and a derived secret are secrets: the caller wipes the result. The agent keeps no copy
// and logs nothing of it.
//
// The error is one of SignContext. Or it is operation.ErrMechanism, ErrParams, ErrData or
// ErrNotPermitted: then the token was not asked. Every ciphertext that the token refuses gives the
// same operation.ErrCiphertext. But CKM_RSA_PKCS still tells whether the padding was right, as every
// implementation of it does: let only clients decrypt that may read the plaintext.
func (k *Key) Operate(ctx context.Context, op operation.Operation) ([]byte, error) {
	plan, err := operation.For(k.pair.Public, op)
	if err == nil && !k.May(op.Function) {
		err = operation.ErrNotPermitted
	}
	if err != nil {
		return nil, fmt.Errorf("%v with token %q: %w", op.Function, k.token.ID.Label, err)
	}
	return k.operate(ctx, &plan)
}

// May reports whether the key may do a function, as far as the token has shown its private key
// (CKA_SIGN, CKA_DECRYPT, CKA_DERIVE). If the token has not said so, only a try can tell. libykcs11
// 2.2 says that no key may derive, although its keys can. The agent believes the token.
func (k *Key) May(f operation.Function) bool {
	pair := k.token.current(k).pair
	switch f {
	case operation.Sign:
		return pair.Sign != wire.False
	case operation.Decrypt:
		return pair.Decrypt != wire.False && !pair.Loose
	case operation.Derive:
		return pair.Derive != wire.False && !pair.Loose
	}
	return false
}

// Can reports whether the key can do a function with a mechanism (CKM), as far as the token says so.
// A token that lists no mechanisms may have all of them. Can also counts a mechanism that the agent
// composes by hashing for the token.
func (k *Key) Can(f operation.Function, mechanism uint64) bool {
	t := k.token
	ways := operation.Ways(k.pair.Public, f, mechanism)
	t.mu.Lock()
	listed := slices.ContainsFunc(ways, func(m uint64) bool { return t.listsLocked(f, m) })
	t.mu.Unlock()
	return listed && k.May(f)
}

// An outcome is what an operation gave.
type outcome struct {
	answer []byte // of the token
	by     *process.Process
	took   time.Duration // the shortest time of such operations
}

// operate makes the token do an operation, and checks a signature.
func (k *Key) operate(ctx context.Context, plan *operation.Plan) ([]byte, error) {
	o, err := k.operateWith(ctx, plan)
	if err != nil {
		if plan.DigestOnly && refusesMechanism(err) {
			err = fmt.Errorf("token %q does not sign digests with this key, and the message is not known here: %w", k.token.ID.Label, err)
		}
		return nil, err
	}
	now := time.Now()
	if plan.Function == operation.Sign {
		k.use.Signed(now)
		k.token.use.Signed(now)
	} else {
		k.token.use.Used(now)
	}
	k.token.used(ctx, k)
	result, err := plan.Result(o.answer)
	if err == nil && plan.Function == operation.Sign { // nothing else can be verified with the public key
		_, isRSA := k.pair.Public.(*rsa.PublicKey)
		err = k.use.Verify(o.by, o.took, isRSA || k.token.removable(), func() error { return plan.Verify(result) })
	}
	if err != nil {
		clear(o.answer)
		return nil, fmt.Errorf("token %q, through module %q: %w", k.token.ID.Label, k.Module(), err)
	}
	return result, nil
}

// operateWith makes the token do an operation with the first method that it supports.
func (k *Key) operateWith(ctx context.Context, plan *operation.Plan) (o outcome, err error) {
	methods := k.token.prefer(plan.Methods)
	err = k.heal(ctx, task{
		function: plan.Function,
		attempt: func(p *process.Process, mustLogin bool) (login uint64, err error) {
			o, login, err = k.attempt(ctx, p, plan, methods[0], mustLogin)
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
	return o, err
}

// attempt logs in if the key needs it, and makes the token do the operation once. login is the
// number of the login that it used.
func (k *Key) attempt(ctx context.Context, p *process.Process, plan *operation.Plan, method operation.Method, mustLogin bool) (o outcome, login uint64, err error) {
	t := k.token
	if !t.present() {
		return outcome{}, 0, ErrAbsent
	}
	now := t.current(k)
	var with prelude
	defer func() { with.typed.Wipe() }()
	if (mustLogin || now.needsLogin()) && !t.loggedIn(p) {
		if with.typed, err = t.login(ctx, k, supplied{}); err != nil {
			return outcome{}, 0, err
		}
		with.fresh = true
		now = t.current(k)
		if plan.Function.Secret() && !k.May(plan.Function) { // which the login has shown
			return outcome{}, 0, operation.ErrNotPermitted
		}
	}
	login = t.lastLogin()
	o, err = now.operateOnce(ctx, p, plan, method, with)
	return o, login, err
}

// prelude is what happened for an operation before the request for it.
type prelude struct {
	fresh bool           // this operation caused a login just now
	typed *secret.Secret // the PIN that a user has typed for this operation
}

// refusesMechanism reports whether a signature failed because of its mechanism.
func refusesMechanism(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	return ok && (e.Function == "C_SignInit" || e.Function == "C_Sign") &&
		wire.IsRV(err, wire.CKRMechanismInvalid, wire.CKRMechanismParamInvalid, wire.CKRFunctionNotSupported,
			wire.CKRDataLenRange, wire.CKRDataInvalid)
}

// needsLogin reports whether the key probably needs a login. The token must have logins. The key
// must have been hidden before a login, or want its PIN for each signature, on top of a login
// (PKCS#11 v2.40 section 4.9, CKA_ALWAYS_AUTHENTICATE).
func (k *Key) needsLogin() bool {
	if k.pair.Open && !k.pair.Always {
		return false
	}
	return k.token.info().Flags&wire.CKFLoginRequired != 0
}

// operateOnce requests one operation.
func (k *Key) operateOnce(ctx context.Context, p *process.Process, plan *operation.Plan, m operation.Method, with prelude) (outcome, error) {
	// CKA_ALWAYS_AUTHENTICATE is about signatures and decryptions. A derivation has no beginning
	// after which the token takes the PIN.
	if k.pair.Always && plan.Function != operation.Derive {
		return k.operateWithPIN(ctx, p, plan, m, with)
	}
	turn, err := p.AwaitTurn(ctx, k.token.ID, k.token.info())
	if err != nil {
		return outcome{}, err
	}
	done := k.working(ctx)
	k.describe(&turn.Request, plan, m)
	answer, took, err := p.Operate(ctx, turn)
	done()
	if k.pair.Always && wire.IsRV(err, wire.CKRUserNotLoggedIn) && k.token.loggedIn(p) {
		return k.operateWithPIN(ctx, p, plan, m, with) // this token wants the PIN all the same
	}
	return outcome{answer, p, took}, err
}

// operateWithPIN requests one operation with a key that wants its PIN for it.
func (k *Key) operateWithPIN(ctx context.Context, p *process.Process, plan *operation.Plan, m operation.Method, with prelude) (outcome, error) {
	req := new(wire.Operate)
	k.describe(req, plan, m)
	start := time.Now()
	answer, err := k.token.operateWithPIN(ctx, p, k, req, with)
	return outcome{answer, p, time.Since(start)}, err
}

// describe fills in the request for an operation.
func (k *Key) describe(req *wire.Operate, plan *operation.Plan, m operation.Method) {
	req.Key = wire.KeyID{
		Token: k.token.ID, ID: k.pair.ID, Label: k.pair.Label, KeyType: k.pair.KeyType,
		Modulus: k.pair.Modulus, ECPoint: k.pair.Point, Any: k.pair.Loose,
	}
	req.Function, req.ResultLen = plan.Function, plan.ResultLen
	m.Describe(req)
}

// working calls Options.Working. The caller calls done when the token has done its work.
func (k *Key) working(ctx context.Context) (done func()) {
	if f := k.token.module.store.opts.Working; f != nil {
		return f(ctx, k)
	}
	return func() {}
}

// prefer moves methods of signing to the end that the token does not support: it has refused their
// mechanism, or does not list it.
func (t *Token) prefer(methods []operation.Method) []operation.Method {
	if len(methods) == 1 {
		return methods
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return operation.Prefer(methods, func(mechanism uint64) bool {
		return t.refusesMechanism[mechanism] || !t.listsLocked(operation.Sign, mechanism)
	})
}

// listsLocked reports whether the token lists a mechanism for a function. A token may list none.
func (t *Token) listsLocked(f operation.Function, mechanism uint64) bool {
	return len(t.slot.Mechanisms) == 0 || slices.ContainsFunc(t.slot.Mechanisms, func(m wire.Mechanism) bool {
		return m.Type == mechanism && m.Flags&f.Flag() != 0
	})
}

// refuse remembers that the token refuses a mechanism.
func (t *Token) refuse(mechanism uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusesMechanism[mechanism] = true
}
