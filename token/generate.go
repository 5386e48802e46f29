package token

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"

	"p11-agent/pinentry/secret"
	"p11-agent/token/keygen"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

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
func (s *Store) Generate(ctx context.Context, u *pkcs11uri.URI, kind keygen.Kind, pin *secret.Secret) (*NewKey, error) {
	req, err := kind.Request()
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
				if t.matches(&only) {
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
			return nil, s.whyNone(ctx, selection.New(&only), nil)
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
func (t *Token) generate(ctx context.Context, req *wire.Generate, kind keygen.Kind, pin *secret.Secret) (*Key, *wire.GenerateReply, error) {
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
		err = keygen.Explain(err, t.ID, kind, t.module.supervisor.Wrap)
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
func (t *Token) checkGenerate(ctx context.Context, p *process.Process, req *wire.Generate, kind keygen.Kind) error {
	check := *req
	check.Check = true
	err := p.Call(ctx, process.ListTimeout, wire.TypeGenerate, &check, new(wire.GenerateReply))
	if wire.IsReason(err, wire.ReasonExists, wire.ReasonUnsupported) {
		return keygen.Explain(err, t.ID, kind, t.module.supervisor.Wrap)
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

// A stoppedError is the outcome of a request for a key whose context, the cause, has ended.
type stoppedError struct{ cause, err error }

func (e *stoppedError) Error() string        { return e.err.Error() }
func (e *stoppedError) Unwrap() error        { return e.err }
func (e *stoppedError) Is(target error) bool { return errors.Is(e.cause, target) }
