package module

import (
	"context"
	"encoding/binary"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// Rooms for attributes that are byte strings. A longer one counts as missing.
const (
	roomText   = 4 << 10 // IDs, labels, RSA numbers, curves and points
	roomObject = 64 << 10
)

// replyRoom is how many bytes of a list of objects are left for what is not
// counted: the list's head.
const replyRoom = 4 << 10

// listObjects lists the keys and X.509 certificates that are visible.
func (s *server) listObjects(ctx context.Context, lib *library, m *wire.Objects) (wire.Message, error) {
	if m.Peek {
		return s.peek(ctx, lib, m)
	}
	t := s.token(m.Token)
	if m.Placed {
		s.place(t, uint(m.Slot))
	}
	if err := t.gate.enter(ctx, false); err != nil {
		return nil, err
	}
	defer t.gate.leave(false)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	session, err := p.session(ctx)
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	objects, err := s.readObjects(ctx, lib, session)
	if err != nil {
		t.failed(p, session, err)
		return nil, err
	}
	p.release(session)
	info, err := p.info()
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	return &wire.ObjectsReply{Info: info, Objects: objects}, nil
}

// readObjects reads all objects that the agent has a use for. One that cannot be
// read is left out, and so are those for which the answer has no room.
func (s *server) readObjects(ctx context.Context, lib *library, session pkcs11.SessionHandle) ([]wire.Object, error) {
	var objects []wire.Object
	room := wire.MaxReply - replyRoom
	for _, class := range []uint{wire.CKOPublicKey, wire.CKOPrivateKey, wire.CKOCertificate} {
		handles, err := lib.find(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class))
		if err != nil {
			return nil, err
		}
		for _, h := range handles {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			var o *wire.Object
			if class == wire.CKOCertificate {
				o, err = readCertificate(lib, session, h)
			} else {
				o, err = readKey(lib, session, h, class)
			}
			if err != nil {
				if _, dead := lib.sessionInfo(session); dead != nil {
					return nil, err
				}
				s.log.Printf("an object of class %d is left out: %v", class, err)
				continue
			}
			if o == nil {
				continue
			}
			const numbers = 96 // more than its numbers, booleans and lengths take
			room -= numbers + len(o.ID) + len(o.Label) + len(o.Modulus) + len(o.Exponent) +
				len(o.ECParams) + len(o.ECPoint) + len(o.Value)
			if room < 0 || len(objects) == wire.MaxList {
				s.log.Printf("the token has more than can be listed: %d objects are, others are left out", len(objects))
				return objects, nil
			}
			objects = append(objects, *o)
		}
	}
	return objects, nil
}

// readKey reads a key, or nothing when it is of no known type.
func readKey(lib *library, session pkcs11.SessionHandle, h pkcs11.ObjectHandle, class uint) (*wire.Object, error) {
	use := uint(pkcs11.CKA_VERIFY)
	if class == wire.CKOPrivateKey {
		use = pkcs11.CKA_SIGN
	}
	wanted := []attribute{
		{pkcs11.CKA_ID, roomText},
		{pkcs11.CKA_LABEL, roomText},
		{pkcs11.CKA_KEY_TYPE, roomULong},
		{pkcs11.CKA_PRIVATE, roomBool},
		{use, roomBool},
		{pkcs11.CKA_ALWAYS_AUTHENTICATE, roomBool},
	}
	if class == wire.CKOPublicKey {
		wanted = wanted[:5]
	}
	v, err := lib.attributes(session, h, wanted)
	if err != nil {
		return nil, err
	}
	keyType, ok := ulong(v[2])
	if !ok {
		return nil, nil
	}
	o := &wire.Object{
		Class:   uint64(class),
		ID:      v[0],
		Label:   label(v[1]),
		KeyType: keyType,
		Private: tri(v[3]),
		Sign:    tri(v[4]),
	}
	if class == wire.CKOPrivateKey {
		o.AlwaysAuth = tri(v[5])
	}
	switch keyType {
	case wire.CKKRSA:
		v, err = lib.attributes(session, h, []attribute{
			{pkcs11.CKA_MODULUS, roomText},
			{pkcs11.CKA_PUBLIC_EXPONENT, roomText},
		})
		o.Modulus, o.Exponent = pair(v)
	case wire.CKKEC, wire.CKKECEdwards:
		v, err = lib.attributes(session, h, []attribute{
			{pkcs11.CKA_EC_PARAMS, roomText},
			{pkcs11.CKA_EC_POINT, roomText},
		})
		o.ECParams, o.ECPoint = pair(v)
	}
	return o, err
}

// pair returns both of two values, or nothing after an error.
func pair(v [][]byte) (a, b []byte) {
	if len(v) != 2 {
		return nil, nil
	}
	return v[0], v[1]
}

// readCertificate reads an X.509 certificate, or nothing when it is another kind
// of certificate.
func readCertificate(lib *library, session pkcs11.SessionHandle, h pkcs11.ObjectHandle) (*wire.Object, error) {
	v, err := lib.attributes(session, h, []attribute{
		{pkcs11.CKA_CERTIFICATE_TYPE, roomULong},
		{pkcs11.CKA_ID, roomText},
		{pkcs11.CKA_LABEL, roomText},
		{pkcs11.CKA_PRIVATE, roomBool},
		{pkcs11.CKA_TRUSTED, roomBool},
		{pkcs11.CKA_CERTIFICATE_CATEGORY, roomULong},
		{pkcs11.CKA_VALUE, roomObject},
	})
	if err != nil {
		return nil, err
	}
	if kind, ok := ulong(v[0]); !ok || kind != pkcs11.CKC_X_509 {
		return nil, nil
	}
	o := &wire.Object{
		Class:   wire.CKOCertificate,
		ID:      v[1],
		Label:   label(v[2]),
		Private: tri(v[3]),
		Trusted: tri(v[4]),
		Value:   v[6],
	}
	if category, ok := ulong(v[5]); ok {
		o.CertCategory = category
	}
	return o, nil
}

// tri reads a CK_BBOOL. One that is neither CK_FALSE nor CK_TRUE says nothing.
func tri(v []byte) wire.Tri {
	switch {
	case len(v) != roomBool:
		return wire.Unknown
	case v[0] == 0:
		return wire.False
	case v[0] == 1:
		return wire.True
	}
	return wire.Unknown
}

// ulong reads a CK_ULONG.
func ulong(v []byte) (uint64, bool) {
	if len(v) != roomULong {
		return 0, false
	}
	if roomULong == 4 {
		return uint64(binary.NativeEndian.Uint32(v)), true
	}
	return binary.NativeEndian.Uint64(v), true
}
