package module

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// maxBits bounds the bits of RSA keys that the token makes.
const maxBits = 16384

// generate makes a key pair, or checks whether it can. The agent has to log in first,
// except for a check. The agent also decides how long the token may take.
//
// Meanwhile no other request uses the token. A card makes one call at a time, and so no
// other request can take the ID first.
func (s *server) generate(ctx context.Context, lib *library, t *token, m *wire.Generate) (wire.Message, error) {
	if m.Bits > maxBits || len(m.ECParams) > 8 || (m.Bits == 0) == (len(m.ECParams) == 0) {
		return nil, nonsense("a key of no such kind is made here")
	}
	if err := t.gate.enter(ctx, true); err != nil {
		return nil, err
	}
	defer t.gate.leave(true)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	if err := canGenerate(lib, p.slot, m); err != nil {
		return nil, err
	}
	session, err := lib.openWritable(p.slot)
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	defer func() { _ = lib.closeSession(session) }() // the session may have gone with the token
	if _, err := p.identify(); err != nil {          // after the session was opened
		t.failed(p, 0, err)
		return nil, err
	}
	if m.Check {
		_, err := lib.freeID(ctx, session, m)
		return new(wire.GenerateReply), err
	}
	reply, err := lib.generate(ctx, session, m)
	p.forgetKeys()
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	return reply, nil
}

// canGenerate returns an error if the token's list of mechanisms does not allow a pair of
// this kind. If the token has no list, generate tries.
func canGenerate(lib *library, slot uint, m *wire.Generate) error {
	kinds, err := lib.mechanisms(slot)
	if err != nil {
		return err
	}
	if len(kinds) == 0 {
		return nil
	}
	no := &wire.Error{Reason: wire.ReasonUnsupported, Text: "the token does not make keys of this kind"}
	if !slices.Contains(kinds, uint(m.Mechanism)) {
		return no
	}
	info, err := lib.mechanismInfo(slot, uint(m.Mechanism))
	switch {
	case err != nil:
		return err
	case info.Flags&pkcs11.CKF_GENERATE_KEY_PAIR == 0:
		return no
	case m.Bits > 0 && info.MaxKeySize > 0 && (uint(m.Bits) < info.MinKeySize || uint(m.Bits) > info.MaxKeySize):
		no.Text = fmt.Sprintf("the token makes keys of %d to %d bits", info.MinKeySize, info.MaxKeySize)
		return no
	}
	return nil
}

// openWritable opens a session that can make objects.
func (l *library) openWritable(slot uint) (pkcs11.SessionHandle, error) {
	s, err := l.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	return s, failed("C_OpenSession", err)
}

// generate makes a pair in a session. It destroys the pair if the pair is not as
// required.
func (l *library) generate(ctx context.Context, s pkcs11.SessionHandle, m *wire.Generate) (*wire.GenerateReply, error) {
	id, err := l.freeID(ctx, s, m)
	if err != nil {
		return nil, err
	}
	public, private, err := l.generatePair(ctx, s, m, id)
	if err != nil {
		return nil, err
	}
	reply, err := l.readPair(s, public, private)
	if err == nil && ctx.Err() != nil {
		err = ctx.Err() // the agent has cancelled, and does not know the pair
	}
	if err == nil {
		return reply, nil
	}
	return nil, l.destroyPair(s, public, private, err)
}

// freeID returns the ID for the new pair. It fails when the requested ID or label is
// taken.
func (l *library) freeID(ctx context.Context, s pkcs11.SessionHandle, m *wire.Generate) ([]byte, error) {
	taken := make(map[string]bool)
	for _, class := range []uint{wire.CKOPrivateKey, wire.CKOPublicKey, wire.CKOCertificate} {
		handles, more, err := l.find(s, wire.MaxObjects, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class))
		if err != nil {
			return nil, err
		}
		if more {
			return nil, &wire.Error{Reason: wire.ReasonUnsupported, Text: fmt.Sprintf(
				"the token has more than %d objects of one kind, so that a free id cannot be told: nothing was made", wire.MaxObjects)}
		}
		for _, h := range handles {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			v, err := l.attributes(s, h, []attribute{{pkcs11.CKA_ID, roomText}, {pkcs11.CKA_LABEL, roomText}})
			if err != nil {
				return nil, err
			}
			label := label(v[1])
			switch {
			case len(m.ID) > 0 && slices.Equal(v[0], m.ID):
				return nil, &wire.Error{Reason: wire.ReasonExists, Text: fmt.Sprintf(
					"%s %q with the id %x is on the token already: nothing was made", className(class), label, v[0])}
			case class != wire.CKOCertificate && m.Label != "" && label == m.Label:
				return nil, &wire.Error{Reason: wire.ReasonExists, Text: fmt.Sprintf(
					"%s with the label %q is on the token already, with the id %x: nothing was made", className(class), label, v[0])}
			}
			taken[string(v[0])] = true
		}
	}
	if len(m.ID) > 0 {
		return m.ID, nil
	}
	for n := byte(1); n != 0; n++ {
		if !taken[string([]byte{n})] {
			return []byte{n}, nil
		}
	}
	id := make([]byte, 20)
	_, _ = rand.Read(id) // never fails
	return id, nil
}

func className(class uint) string {
	switch class {
	case wire.CKOPrivateKey:
		return "a private key"
	case wire.CKOPublicKey:
		return "a public key"
	default:
		return "a certificate"
	}
}

// generatePair calls C_GenerateKeyPair with each form of the curve. The first template
// says that the key is not for other uses. If the token refuses it, the second template
// only says what the key is for.
func (l *library) generatePair(ctx context.Context, s pkcs11.SessionHandle, m *wire.Generate, id []byte) (public, private pkcs11.ObjectHandle, err error) {
	if l.fn.generate_key_pair == nil || l.fn.destroy_object == nil {
		return 0, 0, &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRFunctionNotSupported}
	}
	params := m.ECParams
	if m.Bits > 0 {
		params = []wire.Value{{}}
	}
	for _, curve := range params {
		for _, strict := range []bool{true, false} {
			if err := ctx.Err(); err != nil {
				return 0, 0, err
			}
			if err != nil { // by its error, the last call has made nothing
				again := *m
				again.ID = id
				if _, is := l.freeID(ctx, s, &again); is != nil {
					return 0, 0, is
				}
			}
			pub, priv := templates(m, id, curve.Bytes, strict)
			public, private, err = l.ctx.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(uint(m.Mechanism), nil)}, pub, priv)
			if err == nil {
				return public, private, nil
			}
			err = failed("C_GenerateKeyPair", err)
			if !refusesTemplate(code(err)) {
				return 0, 0, err
			}
		}
	}
	return 0, 0, err
}

// refusesTemplate tells whether another template may work. libtpm2_pkcs11 1.9 returns
// CKR_GENERAL_ERROR for a template with CKA_ENCRYPT or CKA_DECRYPT.
func refusesTemplate(rv uint64) bool {
	switch rv {
	case wire.CKRAttributeReadOnly, wire.CKRAttributeTypeInvalid, wire.CKRAttributeValueInvalid,
		wire.CKRTemplateIncomplete, wire.CKRTemplateInconsistent,
		wire.CKRDomainParamsInvalid, wire.CKRCurveNotSupported, wire.CKRGeneralError:
		return true
	}
	return false
}

func templates(m *wire.Generate, id, curve []byte, strict bool) (public, private []*pkcs11.Attribute) {
	public = []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, m.Label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
	private = []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, m.Label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
	if strict {
		for _, use := range []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_VERIFY_RECOVER} {
			public = append(public, pkcs11.NewAttribute(use, false))
		}
		for _, use := range []uint{pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_SIGN_RECOVER, pkcs11.CKA_DERIVE} {
			private = append(private, pkcs11.NewAttribute(use, false))
		}
	}
	if m.Bits > 0 {
		public = append(public,
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, uint(m.Bits)),
			pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
	} else {
		public = append(public, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve))
	}
	return public, private
}

// readPair reads the new pair. It fails if the private key may leave the token, or if the
// token does not say that the key may not leave it.
func (l *library) readPair(s pkcs11.SessionHandle, public, private pkcs11.ObjectHandle) (*wire.GenerateReply, error) {
	v, err := l.attributes(s, private, []attribute{
		{pkcs11.CKA_SENSITIVE, roomBool},
		{pkcs11.CKA_EXTRACTABLE, roomBool},
		{pkcs11.CKA_ALWAYS_SENSITIVE, roomBool},
		{pkcs11.CKA_NEVER_EXTRACTABLE, roomBool},
		{pkcs11.CKA_LOCAL, roomBool},
	})
	if err != nil {
		return nil, err
	}
	if tri(v[0]) != wire.True || tri(v[1]) != wire.False {
		return nil, &wire.Error{Reason: wire.ReasonExtractable, Text: "the token made a private key that could leave it, or does not say that it cannot"}
	}
	reply := &wire.GenerateReply{AlwaysSensitive: tri(v[2]), NeverExtractable: tri(v[3]), Local: tri(v[4])}
	for _, half := range []struct {
		handle pkcs11.ObjectHandle
		class  uint
		to     *wire.Object
	}{{public, wire.CKOPublicKey, &reply.Public}, {private, wire.CKOPrivateKey, &reply.Private}} {
		o, err := readKey(l, s, half.handle, half.class)
		if err != nil {
			return nil, err
		}
		if o == nil {
			return nil, garbage("C_GenerateKeyPair", "what it made is no key")
		}
		*half.to = *o
	}
	return reply, nil
}

// destroyPair destroys a pair. It returns the error why, and adds what happened to the
// pair.
func (l *library) destroyPair(s pkcs11.SessionHandle, public, private pkcs11.ObjectHandle, why error) error {
	var left []string
	for _, half := range []struct {
		handle pkcs11.ObjectHandle
		name   string
	}{{private, "private"}, {public, "public"}} {
		if err := failed("C_DestroyObject", l.ctx.DestroyObject(s, half.handle)); err != nil {
			left = append(left, fmt.Sprintf("the %s key is still there: %v", half.name, err))
		}
	}
	if len(left) == 0 {
		left = []string{"the pair was destroyed again"}
	}
	e, ok := errors.AsType[*wire.Error](why)
	if !ok { // the agent has cancelled
		e = &wire.Error{RV: wire.CKRFunctionCanceled, Text: "no client waits for the key any more"}
	}
	told := *e
	told.Text, told.Function = e.Error(), ""
	for _, l := range left {
		told.Text += "; " + l
	}
	return &told
}
