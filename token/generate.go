package token

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// A KeyKind is a kind of key that Generate can make on a token.
type KeyKind string

// The kinds.
const (
	RSA2048   KeyKind = "rsa-2048"
	RSA3072   KeyKind = "rsa-3072"
	RSA4096   KeyKind = "rsa-4096"
	ECDSAP256 KeyKind = "ecdsa-p256"
	ECDSAP384 KeyKind = "ecdsa-p384"
	ECDSAP521 KeyKind = "ecdsa-p521"
	Ed25519   KeyKind = "ed25519"
)

// KeyKinds lists all kinds.
var KeyKinds = []KeyKind{ECDSAP256, ECDSAP384, ECDSAP521, Ed25519, RSA2048, RSA3072, RSA4096}

// request returns the request to a module process for a key of this kind. Tokens take the name
// of the curve of Ed25519 in different forms (PKCS#11 v3.0 section 2.3.5, RFC 8410 section 3).
func (k KeyKind) request() (*wire.Generate, error) {
	curve := func(mechanism uint64, values ...any) (*wire.Generate, error) {
		r := &wire.Generate{Mechanism: mechanism}
		for _, v := range values {
			der, err := asn1.Marshal(v)
			if err != nil {
				return nil, err
			}
			r.ECParams = append(r.ECParams, wire.Value{Bytes: der})
		}
		return r, nil
	}
	switch k {
	case RSA2048:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 2048}, nil
	case RSA3072:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 3072}, nil
	case RSA4096:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 4096}, nil
	case ECDSAP256:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP256)
	case ECDSAP384:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP384)
	case ECDSAP521:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP521)
	case Ed25519:
		name := asn1.RawValue{Tag: asn1.TagPrintableString, Bytes: []byte(pairs.NameEd25519)}
		return curve(wire.CKMECEdwardsKeyPairGen, name, pairs.OIDEd25519, pairs.OIDEdwards25519)
	}
	return nil, fmt.Errorf("there is no kind of key %q", string(k))
}

// A NewKey is a key that Generate made on a token.
type NewKey struct {
	*Key
	// What the token reports of the history of the private key: CKA_ALWAYS_SENSITIVE,
	// CKA_NEVER_EXTRACTABLE and CKA_LOCAL. Some tokens do not report them.
	AlwaysSensitive, NeverExtractable, Local wire.Tri
}

// Generate makes a key pair on the token that the URI selects. The URI must select exactly one
// token. The object of the URI becomes the label of the key, and the id becomes its ID. If the
// URI has no id, the module chooses a free ID. The key can sign. Its private part cannot be
// read, and cannot leave the token.
//
// If pin is not nil, it is the PIN that a person gave; it still belongs to the caller.
// Otherwise Generate gets a PIN in the same way as a signature does.
//
// Generate replaces no object of the token. If a key or certificate has the ID, or if a key has
// the label, Generate fails with a *wire.Error whose Reason is ReasonExists. The module
// destroys a new key that could leave the token. If ctx ends while the card makes the key, the
// module destroys the key too. Generate returns only after the module has destroyed it. At the
// end, Generate tries the key with one signature.
//
// A card may need minutes to make a key. Other requests for the token wait meanwhile.
func (s *Store) Generate(ctx context.Context, u *pkcs11uri.URI, kind KeyKind, pin *secret.Secret) (*NewKey, error) {
	req, err := kind.request()
	if err != nil {
		return nil, err
	}
	if u.PIN() != nil || u.PINSource != nil {
		return nil, errors.New("a PIN for a new key is asked for, or comes from the configuration, but not from its URI")
	}
	if u.Type != "" && u.Type != pkcs11uri.ClassPrivate {
		return nil, fmt.Errorf("the URI is about an object of type %q: a new key is a private one", u.Type)
	}
	t, err := s.oneToken(ctx, u)
	if err != nil {
		return nil, err
	}
	req.Token, req.ID = t.ID, u.ID
	if u.Object != nil {
		req.Label = *u.Object
	}
	k, reply, err := t.generate(ctx, req, kind, pin)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("the key %v was made before this could be stopped: %w", k, err)
	}
	if err := k.try(ctx); err != nil {
		return nil, fmt.Errorf("the key %v was made, and does not sign: %w", k, err)
	}
	return &NewKey{Key: k, AlwaysSensitive: reply.AlwaysSensitive, NeverExtractable: reply.NeverExtractable, Local: reply.Local}, nil
}

// oneToken returns the only token that a URI selects. It ignores what the URI says of objects. If
// the URI selects no token, oneToken looks for tokens again.
func (s *Store) oneToken(ctx context.Context, u *pkcs11uri.URI) (*Token, error) {
	only := *u
	only.Object, only.ID, only.Type = nil, nil, ""
	for again := true; ; again = false {
		var found []*Token
		for _, m := range s.modulesNow() {
			for _, t := range m.present() {
				if t.matches(&only, true) {
					found = append(found, t)
				}
			}
		}
		home := s.atHome(func(t *Token) bool { return slices.Contains(found, t) })
		found = slices.DeleteFunc(found, func(t *Token) bool { return home[t.ID] != nil && home[t.ID] != t })
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) == 0 && again:
			if err := s.Rescan(ctx); err != nil {
				return nil, err
			}
			continue
		case len(found) == 0:
			return nil, s.whyNone(ctx, NewSelector(&only), nil)
		}
		var names, modules []string
		for _, t := range found {
			names, modules = append(names, t.name()), append(modules, t.module.spec.Name)
		}
		if slices.Sort(names); len(slices.Compact(slices.Clone(names))) == 1 {
			return nil, &AmbiguousError{Token: found[0].ID.Label, Modules: modules}
		}
		return nil, fmt.Errorf("a key is made on one token, and the URI selects %s: name one by its token and serial attributes",
			strings.Join(names, ", "))
	}
}

// generate makes a key pair, and returns the key as the token lists it.
func (t *Token) generate(ctx context.Context, req *wire.Generate, kind KeyKind, pin *secret.Secret) (*Key, *wire.GenerateReply, error) {
	defer t.module.supervisor.Use()()
	p, err := t.module.supervisor.Process(ctx)
	if err != nil {
		return nil, nil, err
	}
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, nil, t.module.supervisor.Wrap(err)
	}
	if info.Flags&wire.CKFWriteProtected != 0 {
		return nil, nil, fmt.Errorf("token %q is write-protected: no key can be made on it", t.ID.Label)
	}
	if err := t.checkGenerate(ctx, p, req, kind); err != nil {
		return nil, nil, err
	}
	if info.Flags&wire.CKFLoginRequired != 0 {
		// The agent takes the policy and the sources of PINs of the key that it is to make.
		f := &pairs.Pair{ID: req.ID, Label: req.Label, Members: []pairs.Member{{Class: wire.CKOPrivateKey, Name: pairs.Name{ID: req.ID, Label: req.Label}}}, Visible: true}
		typed, err := t.login(ctx, newKey(t, f, nil), supply(pin))
		typed.Wipe()
		if err != nil {
			return nil, nil, err
		}
	}
	reply := new(wire.GenerateReply)
	if err := t.ask(ctx, p, req, reply); err != nil {
		err = t.explainGenerate(err, kind)
		if ctx.Err() != nil {
			err = &stoppedError{cause: ctx.Err(), err: err}
		}
		return nil, nil, err
	}
	// The key exists. So the caller gets it, even if ctx has ended.
	k, err := t.made(context.WithoutCancel(ctx), p, reply)
	if err != nil {
		return nil, nil, fmt.Errorf("a key with the id %x was made on token %q, but cannot be used: %w", reply.Private.ID, t.ID.Label, err)
	}
	return k, reply, nil
}

// checkGenerate finds obstacles to a new key before a login, so that no person types a PIN in
// vain. It ignores other errors: the attempt to make the key finds them.
func (t *Token) checkGenerate(ctx context.Context, p *process.Process, req *wire.Generate, kind KeyKind) error {
	check := *req
	check.Check = true
	err := p.Call(ctx, process.ListTimeout, wire.TypeGenerate, &check, new(wire.GenerateReply))
	if wire.IsReason(err, wire.ReasonExists, wire.ReasonUnsupported) {
		return t.explainGenerate(err, kind)
	}
	return ctx.Err()
}

// ask tells the module to make a key pair.
func (t *Token) ask(ctx context.Context, p *process.Process, req *wire.Generate, reply *wire.GenerateReply) error {
	if f := t.module.store.opts.Generating; f != nil {
		defer f(t.ID)()
	}
	return p.CallThrough(ctx, process.GenerateTimeout, wire.TypeGenerate, req, reply)
}

// made returns the key that the module has just made.
func (t *Token) made(ctx context.Context, p *process.Process, reply *wire.GenerateReply) (*Key, error) {
	pub, err := pairs.PublicKey(reply.Public)
	if err != nil {
		return nil, err
	}
	if err := t.lookAgain(ctx, p); err != nil {
		return nil, err
	}
	t.module.store.publish()
	for _, k := range t.keyList() {
		if pairs.Equal(k.pair.Public, pub) {
			return k, nil
		}
	}
	return nil, errors.New("the token does not list it")
}

// try signs with the key. Signing verifies the signature.
func (k *Key) try(ctx context.Context) error {
	var opts crypto.SignerOpts = crypto.SHA256
	switch k.Public().(type) {
	case ed25519.PublicKey:
		opts = &ed25519.Options{}
	case *rsa.PublicKey:
		opts = crypto.SHA512
	}
	_, err := k.SignMessageContext(ctx, []byte("p11-agent tries a new key"), opts)
	return err
}

// explainGenerate turns the error of a request for a new key into an error for a person.
func (t *Token) explainGenerate(err error, kind KeyKind) error {
	e, ok := errors.AsType[*wire.Error](err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err // the module did not get the request
	case !ok:
		return fmt.Errorf("make a key on token %q: %w; it may be there nevertheless: look with p11-agent list", t.ID.Label, t.module.supervisor.Wrap(err))
	case e.Reason == wire.ReasonExists, e.Reason == wire.ReasonExtractable:
		return fmt.Errorf("token %q: %w", t.ID.Label, err)
	case e.Reason == wire.ReasonUnsupported:
		return &GenerateError{Token: t.ID.Label, Kind: kind, Advice: t.otherTool(), Err: err}
	case e.Function == "C_GenerateKeyPair" || e.Function == "C_OpenSession":
		switch e.RV {
		case wire.CKRHostMemory, wire.CKRDeviceMemory, wire.CKRDeviceError, wire.CKRDeviceRemoved, wire.CKRTokenNotPresent,
			wire.CKRSessionCount, wire.CKRFunctionCanceled, wire.CKRFunctionRejected:
		default: // modules have many codes for what they do not support
			return &GenerateError{Token: t.ID.Label, Kind: kind, Advice: t.otherTool(), Err: err}
		}
	}
	return &GenerateError{Token: t.ID.Label, Kind: kind, Err: err}
}

// otherTool names a program that makes keys on the token, for a module that does not.
func (t *Token) otherTool() string {
	text := strings.ToLower(t.ID.Manufacturer + " " + t.ID.Model)
	switch {
	case strings.Contains(text, "yubi"):
		return "make the key with ykman piv keys generate, or yubico-piv-tool -a generate"
	case strings.Contains(text, "piv"):
		return "make the key with the card's own program: ykman piv keys generate or yubico-piv-tool -a generate for a YubiKey, piv-tool -G for others"
	case strings.Contains(text, "pkcs#15"), strings.Contains(text, "opensc"):
		return "make the key with pkcs15-init --generate-key"
	}
	return "make the key with the token's own program"
}

// A GenerateError says that a token did not make a key. No new key is left on the token.
type GenerateError struct {
	Token  string // label
	Kind   KeyKind
	Advice string // what to do instead; may be empty
	Err    error
}

func (e *GenerateError) Error() string {
	text := fmt.Sprintf("token %q did not make a key of kind %s: %v", e.Token, e.Kind, e.Err)
	if e.Advice != "" {
		text += "; " + e.Advice
	}
	return text
}

func (e *GenerateError) Unwrap() error { return e.Err }

// A stoppedError is the outcome of a request for a key whose context, the cause, has ended.
type stoppedError struct{ cause, err error }

func (e *stoppedError) Error() string        { return e.err.Error() }
func (e *stoppedError) Unwrap() error        { return e.err }
func (e *stoppedError) Is(target error) bool { return errors.Is(e.cause, target) }
