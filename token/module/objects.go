package module

import (
	"context"
	"encoding/binary"
	"errors"
	"log"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// Rooms for attributes that are byte strings. A longer attribute counts as missing.
const (
	roomText   = 4 << 10 // IDs, labels, RSA numbers, curves and points
	roomObject = 64 << 10
	// roomLong is for the few certificates that are longer than roomObject.
	roomLong = 1 << 20
)

const (
	// A part of a list is sent when it has partObjects objects or partBytes bytes. A slow
	// token reads so many objects well within the time that a module has for an answer.
	partObjects = 128
	partBytes   = 512 << 10
	// maxRestarts is how often a list begins again after a login or a logout. The last
	// list keeps logins waiting until its end.
	maxRestarts = 3
	// maxTooBig is how many objects of a class may be read in vain when the room is too
	// small.
	maxTooBig = 16
)

// errRestart makes a list begin again, because the login has changed. Handles of private
// keys have become invalid, or private keys have become visible.
var errRestart = errors.New("the login has changed")

// listObjects lists the visible keys and X.509 certificates. send sends a part of the
// list. Between two parts a login may take its turn.
func (s *server) listObjects(ctx context.Context, lib *library, m *wire.Objects, send func(*wire.ObjectsPart) error) (wire.Message, error) {
	if m.Peek {
		return s.peek(ctx, lib, m, send)
	}
	t := s.token(m.Token)
	if m.Placed {
		s.place(t, uint(m.Slot))
	}
	if err := t.gate.enter(ctx, false); err != nil {
		return nil, err
	}
	inside := true
	defer func() {
		if inside {
			t.gate.leave(false)
		}
	}()
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	session, err := p.session(ctx)
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	r := &reading{lib: lib, session: session, log: s.log, send: send}
	for restarts := 0; ; restarts++ {
		logins := p.changes()
		r.begin()
		r.pause = func() error {
			if restarts == maxRestarts {
				return ctx.Err()
			}
			t.gate.leave(false)
			inside = false
			if err := t.gate.enter(ctx, false); err != nil {
				return err
			}
			inside = true
			if p.changes() != logins {
				return errRestart
			}
			return nil
		}
		if err = r.all(m.Named); !errors.Is(err, errRestart) {
			break
		}
	}
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
	return &wire.ObjectsReply{Info: info, Objects: r.part.Objects, Cut: r.cut, Long: r.long}, nil
}

// A reading builds a list of objects.
type reading struct {
	lib     *library
	session pkcs11.SessionHandle
	log     *log.Logger
	send    func(*wire.ObjectsPart) error
	pause   func() error // lets others have their turn

	part  wire.ObjectsPart
	size  int // of part, in bytes
	count int // objects that were read
	room  int // bytes that are left for objects
	most  int // objects that may be read
	seen  map[pkcs11.ObjectHandle]bool
	cut   bool
	long  uint32
}

// begin drops what was read.
func (r *reading) begin() {
	r.part, r.size = wire.ObjectsPart{First: true}, 0
	r.count, r.room, r.most = 0, wire.MaxObjectBytes, wire.MaxObjects
	r.seen, r.cut, r.long = make(map[pkcs11.ObjectHandle]bool), false, 0
}

var classes = []uint{wire.CKOPublicKey, wire.CKOPrivateKey, wire.CKOCertificate}

// all reads the objects that the agent can use, as many as there is room for. If objects
// are left out, it then searches for the named objects.
func (r *reading) all(named []wire.ObjectName) error {
	for _, class := range classes {
		more, err := r.find(class, r.most-r.count)
		if err != nil {
			return err
		}
		r.cut = r.cut || more
	}
	if !r.cut {
		return nil
	}
	r.log.Printf("the token has more than is listed: %d objects are; others are found by their names only", r.count)
	r.most, r.room = r.count+wire.MaxNamedObjects, wire.MaxNamedBytes
	for _, name := range named {
		for _, class := range classes {
			if _, err := r.find(class, r.most-r.count, template(name)...); err != nil {
				return err
			}
		}
		if err := r.flush(); err != nil { // a search takes time, even if it finds nothing
			return err
		}
	}
	return nil
}

// template returns the attributes of a named object.
func template(name wire.ObjectName) (all []*pkcs11.Attribute) {
	if len(name.ID) > 0 {
		all = append(all, pkcs11.NewAttribute(pkcs11.CKA_ID, name.ID))
	}
	if name.Label != "" {
		all = append(all, pkcs11.NewAttribute(pkcs11.CKA_LABEL, name.Label))
	}
	return all
}

// find reads at most so many objects of a class that have certain attributes, except
// objects that were already read. more tells that others exist, or that there is no room
// for them.
func (r *reading) find(class uint, most int, with ...*pkcs11.Attribute) (more bool, err error) {
	handles, more, err := r.lib.find(r.session, most, append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}, with...)...)
	if err != nil {
		return false, err
	}
	tooBig := 0
	for _, h := range handles {
		if r.seen[h] {
			continue
		}
		o, err := r.object(class, h)
		if err != nil {
			return false, err
		}
		if o == nil {
			r.seen[h] = true
			continue
		}
		const numbers = 96 // more than the bytes of its numbers, booleans and lengths
		size := numbers + len(o.ID) + len(o.Label) + len(o.Modulus) + len(o.Exponent) +
			len(o.ECParams) + len(o.ECPoint) + len(o.Value)
		if size > r.room {
			// A smaller object may fit.
			more = true
			if tooBig++; tooBig == maxTooBig {
				break
			}
			continue
		}
		r.seen[h] = true
		r.room -= size
		r.count++
		r.part.Objects = append(r.part.Objects, *o)
		if r.size += size; r.size >= partBytes || len(r.part.Objects) >= partObjects {
			if err := r.flush(); err != nil {
				return false, err
			}
		}
	}
	return more, nil
}

// flush sends the part, and then lets others have their turn.
func (r *reading) flush() error {
	if err := r.send(&r.part); err != nil {
		return err
	}
	r.part, r.size = wire.ObjectsPart{}, 0
	return r.pause()
}

// object reads an object. It returns nil if the agent has no use for the object, or if
// the object cannot be read.
func (r *reading) object(class uint, h pkcs11.ObjectHandle) (o *wire.Object, err error) {
	if class == wire.CKOCertificate {
		var long bool
		if o, long, err = readCertificate(r.lib, r.session, h); long {
			r.long++
		}
	} else {
		o, err = readKey(r.lib, r.session, h, class)
	}
	if err != nil {
		if _, dead := r.lib.sessionInfo(r.session); dead != nil {
			return nil, err
		}
		r.log.Printf("an object of class %d is left out: %v", class, err)
		return nil, nil
	}
	return o, nil
}

// readKey reads a key. It returns nil if the key is of no known type.
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
		{pkcs11.CKA_DECRYPT, roomBool},
		{pkcs11.CKA_DERIVE, roomBool},
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
		o.AlwaysAuth, o.Decrypt, o.Derive = tri(v[5]), tri(v[6]), tri(v[7])
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

// readCertificate reads an X.509 certificate. It returns nil for another kind of
// certificate. long tells that the value has more bytes than roomLong.
func readCertificate(lib *library, session pkcs11.SessionHandle, h pkcs11.ObjectHandle) (_ *wire.Object, long bool, _ error) {
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
		return nil, false, err
	}
	if kind, ok := ulong(v[0]); !ok || kind != pkcs11.CKC_X_509 {
		return nil, false, nil
	}
	if v[6] == nil {
		value, err := lib.attributes(session, h, []attribute{{pkcs11.CKA_VALUE, roomLong}})
		if err != nil {
			return nil, false, err
		}
		v[6] = value[0]
		long = v[6] == nil
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
	return o, long, nil
}

// tri reads a CK_BBOOL. A value other than CK_FALSE and CK_TRUE means unknown.
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
