package module

import (
	"bytes"
	"context"
	"encoding/binary"

	"github.com/miekg/pkcs11"

	"p11-agent/pinentry/secret"
	"p11-agent/token/wire"
)

// maxResult bounds the bytes that the agent may expect. An RSA key of 64 Kibit has 8
// KiB.
const maxResult = 8 << 10

// mayTry returns an error if the process must not try the PIN on the token now. The
// caller has just read info. mayTry does not check whether a person can type a PIN on the
// reader. Tokens report that wrongly, and the agent's configuration knows it.
func mayTry(info wire.TokenInfo, lastTry bool) error {
	e := &wire.Error{HasInfo: true, Info: info}
	switch {
	case info.Flags&wire.CKFUserPINLocked != 0:
		e.Reason = wire.ReasonPINLocked
	case info.Flags&wire.CKFUserPINFinalTry != 0 && !lastTry:
		e.Reason = wire.ReasonLastTry
	default:
		return nil
	}
	return e
}

// checkPIN checks that a request has a PIN, or that a person types the PIN on the reader.
func checkPIN(pin *secret.Secret, pad bool) error {
	if (pin.Len() == 0) != pad {
		return nonsense("a PIN comes either with the request or from the reader")
	}
	return nil
}

// withInfo adds the token's current state to the error of a login, as far as it can be
// read.
func withInfo(err error, p *presence) error {
	e, ok := err.(*wire.Error)
	if !ok {
		return err
	}
	if info, err := p.info(); err == nil {
		e.HasInfo, e.Info = true, info
	}
	return e
}

// login logs the user in, if the PIN is for the token that is there.
func (s *server) login(ctx context.Context, lib *library, t *token, m *wire.Login) (wire.Message, error) {
	if err := checkPIN(m.PIN, m.Pad); err != nil {
		return nil, err
	}
	if err := t.gate.enter(ctx, true); err != nil {
		return nil, err
	}
	defer t.gate.leave(true)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	if err := p.stays(m.Stay); err != nil {
		return nil, err
	}
	info, err := p.identify()
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	if err := mayTry(info, m.LastTry); err != nil {
		return nil, err
	}
	if _, err := p.sessionInfo(p.anchor); err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = lib.login(p.anchor, pkcs11.CKU_USER, m.PIN.Bytes())
	m.PIN.Wipe()
	p.loginChanged()
	if err != nil && code(err) != wire.CKRUserAlreadyLoggedIn {
		err = withInfo(err, p)
		t.failed(p, 0, err)
		return nil, err
	}
	return t.report(p)
}

// logout logs the user out, when no request uses the token any more.
func (s *server) logout(ctx context.Context, lib *library, t *token) (wire.Message, error) {
	if err := t.gate.enter(ctx, true); err != nil {
		return nil, err
	}
	defer t.gate.leave(true)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	err = lib.logout(p.anchor)
	p.loginChanged()
	if err != nil && code(err) != wire.CKRUserNotLoggedIn {
		t.failed(p, 0, err)
		return nil, err
	}
	return t.report(p)
}

// operate does one operation with a private key. It uses room if the result fits in
// there. The caller wipes a result that is a secret.
func (s *server) operate(ctx context.Context, lib *library, t *token, m *wire.Operate, room []byte) (result []byte, err error) {
	if m.ResultLen == 0 || m.ResultLen > maxResult {
		return nil, nonsense("a result of no such length is made here")
	}
	alone := m.ContextLogin
	if alone {
		if err := checkPIN(m.PIN, m.Pad); err != nil {
			return nil, err
		}
	} else if m.PIN.Len() > 0 || m.Pad {
		return nil, nonsense("a PIN came with an operation that needs none")
	}
	if err := t.gate.enter(ctx, alone); err != nil {
		return nil, err
	}
	defer t.gate.leave(alone)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	if m.ContextLogin {
		if err := p.stays(m.Stay); err != nil {
			return nil, err
		}
		// Check before C_SignInit: between C_SignInit and C_Sign there is no place for
		// this.
		info, err := p.identify()
		if err != nil {
			t.failed(p, 0, err)
			return nil, err
		}
		if err := mayTry(info, m.LastTry); err != nil {
			return nil, err
		}
	}
	session, err := p.session(ctx)
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	if m.ContextLogin {
		if _, err := p.sessionInfo(session); err != nil {
			t.retire(p) // does not close the session, which belongs to another slot
			return nil, err
		}
	}
	result, err = p.operate(ctx, session, m, room)
	switch {
	case err == errLeft:
		t.failed(p, session, nil)
		return result, nil
	case err == nil || unharmed(err):
		p.release(session)
	default:
		err = p.conceal(session, err)
		t.failed(p, session, err)
	}
	return result, err
}

// conceal replaces an error of C_Decrypt by one that does not tell what is wrong with the
// ciphertext. With the module's own error, a client that sends many altered ciphertexts
// could find out the plaintext (Bleichenbacher, CRYPTO 1998; Manger, CRYPTO 2001). An
// error that tells of the session, the token or a person stays.
func (p *presence) conceal(session pkcs11.SessionHandle, err error) error {
	e, ok := err.(*wire.Error)
	if !ok || e.Function != "C_Decrypt" {
		return err
	}
	switch e.RV {
	case wire.CKRDeviceRemoved, wire.CKRTokenNotPresent, wire.CKRTokenNotRecognized, wire.CKRSlotIDInvalid,
		wire.CKRSessionHandleInvalid, wire.CKRSessionClosed, wire.CKROperationNotInitialized,
		wire.CKRKeyHandleInvalid, wire.CKRObjectHandleInvalid, wire.CKRCryptokiNotInitialized,
		wire.CKRUserNotLoggedIn, wire.CKRFunctionCanceled:
		return err
	}
	// Modules return the same errors for a wrong ciphertext and for a lost card. So ask
	// for the card.
	if _, err := p.identify(); err != nil {
		return err
	}
	if _, err := p.sessionInfo(session); err != nil {
		return err
	}
	return &wire.Error{Function: "C_Decrypt", Reason: wire.ReasonCiphertext}
}

// begins tells whether a function of the module begins an operation. When it fails, it
// leaves no operation on the session.
func begins(function string) bool {
	return function == "C_SignInit" || function == "C_DecryptInit" || function == "C_DeriveKey"
}

// unharmed tells whether an error leaves no operation on the session, because the
// operation has not begun.
func unharmed(err error) bool {
	e, ok := err.(*wire.Error)
	switch {
	case !ok: // cancelled before the request reached the module
		return true
	case e.Function == "":
		return e.Reason == wire.ReasonNoKey || e.Reason == wire.ReasonAmbiguous
	case !begins(e.Function):
		return false
	}
	switch e.RV {
	case wire.CKRKeyHandleInvalid, wire.CKRObjectHandleInvalid, wire.CKRKeyTypeInconsistent,
		wire.CKRKeyFunctionNotPermitted, wire.CKRMechanismInvalid, wire.CKRMechanismParamInvalid,
		wire.CKRUserNotLoggedIn:
		return true
	}
	return false
}

// operate does an operation on a session. It uses room if the result fits in there.
func (p *presence) operate(ctx context.Context, session pkcs11.SessionHandle, m *wire.Operate, room []byte) ([]byte, error) {
	for first := true; ; first = false {
		key, known, err := p.key(session, &m.Key)
		if isAmbiguous(err) {
			return p.signWithOneOf(ctx, session, m, room)
		}
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		result, err := p.operateWith(session, key, m, room, true)
		if e, ok := err.(*wire.Error); !ok || !first || !known || !begins(e.Function) ||
			e.RV != wire.CKRKeyHandleInvalid && e.RV != wire.CKRObjectHandleInvalid ||
			m.ContextLogin && m.Function == wire.Derive { // the PIN is used up
			return result, err
		}
		p.forgetKeys() // the remembered handles are out of date: look for the key once more
	}
}

// operateWith does an operation with one private key. It uses room if the result fits in
// there. last tells that no other key needs the PIN.
func (p *presence) operateWith(session pkcs11.SessionHandle, key pkcs11.ObjectHandle, m *wire.Operate, room []byte, last bool) (result []byte, err error) {
	switch m.Function {
	case wire.Sign:
		err = p.lib.signInit(session, m.Mechanism, &m.Params, key)
	case wire.Decrypt:
		err = p.lib.decryptInit(session, m.Mechanism, &m.Params, key)
	}
	if err != nil {
		return nil, err
	}
	if m.ContextLogin {
		err := p.lib.login(session, pkcs11.CKU_CONTEXT_SPECIFIC, m.PIN.Bytes())
		if last {
			m.PIN.Wipe()
		}
		if err != nil && code(err) != wire.CKRUserAlreadyLoggedIn {
			return nil, withInfo(err, p)
		}
	}
	if cap(room) < int(m.ResultLen) {
		room = make([]byte, m.ResultLen)
	}
	room = room[:m.ResultLen]
	switch m.Function {
	case wire.Decrypt:
		result, err = p.lib.decrypt(session, m.Data, room)
	case wire.Derive:
		result, err = p.lib.derive(session, m.Mechanism, key, m.Data, room)
	default:
		return p.lib.sign(session, m.Data, room)
	}
	if result == nil {
		clear(room)
	}
	return result, err
}

// key returns the handle of a private key, and whether the handle was remembered.
func (p *presence) key(session pkcs11.SessionHandle, id *wire.KeyID) (_ pkcs11.ObjectHandle, known bool, _ error) {
	var room [1 << 10]byte
	name := appendKeyName(room[:0], id)
	p.mu.Lock()
	h, ok := p.keys[string(name)]
	p.mu.Unlock()
	if ok {
		return h, true, nil
	}
	h, err := p.lookFor(session, id)
	if err != nil {
		return 0, false, err
	}
	p.remember(id, h)
	return h, false, nil
}

// appendKeyName appends a name that differs for different keys of a token.
func appendKeyName(b []byte, id *wire.KeyID) []byte {
	b = binary.BigEndian.AppendUint64(b, id.KeyType)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(id.ID))), id.ID...)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(id.Label))), id.Label...)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(id.Modulus))), id.Modulus...)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(id.ECPoint))), id.ECPoint...)
}

// lookFor finds a private key. The type must fit, and so must the ID, if the key has one.
// If the token shows the public half, the half must be the right one. Among several keys
// the label decides. A key without an ID must match by its public half or its label.
func (p *presence) lookFor(session pkcs11.SessionHandle, id *wire.KeyID) (pkcs11.ObjectHandle, error) {
	h, candidates, err := p.searchFor(session, id)
	if len(candidates) > 0 {
		err = &wire.Error{Reason: wire.ReasonAmbiguous}
	}
	return h, err
}

// searchFor does what lookFor does, and also returns the candidates. These are private
// keys that fit equally well.
func (p *presence) searchFor(session pkcs11.SessionHandle, id *wire.KeyID) (h pkcs11.ObjectHandle, candidates []pkcs11.ObjectHandle, err error) {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(id.KeyType)),
	}
	if len(id.ID) > 0 && !id.Any {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id.ID))
	}
	handles, _, err := p.lib.find(session, wire.MaxObjects, template...)
	if err != nil {
		return 0, nil, err
	}
	public := attribute{pkcs11.CKA_EC_POINT, roomText}
	if id.KeyType == wire.CKKRSA {
		public.kind = pkcs11.CKA_MODULUS
	}
	var proven, possible, labelled []pkcs11.ObjectHandle
	for _, h := range handles {
		v, err := p.lib.attributes(session, h, []attribute{public, {pkcs11.CKA_LABEL, roomText}})
		if err != nil {
			return 0, nil, err
		}
		switch {
		case len(v[0]) > 0 && (len(id.Modulus) > 0 || len(id.ECPoint) > 0):
			if isPublic(v[0], id) {
				proven = append(proven, h)
			}
		case label(v[1]) == id.Label && !id.Any:
			labelled = append(labelled, h)
			possible = append(possible, h)
		default:
			possible = append(possible, h)
		}
	}
	switch {
	case len(proven) > 0:
		return proven[0], nil, nil // several copies are the same key
	case len(labelled) == 1 && (len(possible) == 1 || id.Label != ""):
		return labelled[0], nil, nil
	case len(possible) == 1 && (len(id.ID) > 0 || id.Any):
		return possible[0], nil, nil
	case len(possible) == 0, len(id.ID) == 0 && len(labelled) == 0 && !id.Any:
		e := &wire.Error{Reason: wire.ReasonNoKey}
		return 0, nil, withInfo(e, p) // a missing login may be the cause
	case len(labelled) > 1:
		return 0, labelled, nil
	default:
		return 0, possible, nil
	}
}

// isPublic tells whether v is the public half of the key. v is an attribute of a private
// key.
func isPublic(v []byte, id *wire.KeyID) bool {
	if id.KeyType == wire.CKKRSA {
		return bytes.Equal(bytes.TrimLeft(v, "\x00"), bytes.TrimLeft(id.Modulus, "\x00"))
	}
	if bytes.Equal(v, id.ECPoint) {
		return true
	}
	// By the standard the point is in a DER OCTET STRING. Some tokens return it bare.
	der := []byte{0x04, byte(len(id.ECPoint))}
	if len(id.ECPoint) > 0x7f {
		der = []byte{0x04, 0x81, byte(len(id.ECPoint))}
	}
	return len(id.ECPoint) <= 0xff && bytes.Equal(v, append(der, id.ECPoint...))
}
