package token

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"p11-agent/token/wire"
)

// RSA keys outside these bounds are not used: shorter ones are refused by
// every current OpenSSH, longer ones only cost time.
const (
	minRSABits = 2048
	maxRSABits = 16384
)

// found is a key pair put together from the objects of a token.
type found struct {
	id      []byte
	label   string   // of the private key when visible, else of what there is
	labels  []string // of all its objects: a URI may name any of them
	classes []uint64 // CKO of its objects
	ids     [][]byte // likewise
	keyType uint64
	public  crypto.PublicKey
	sum     [sha256.Size]byte // digest of public
	modulus []byte
	point   []byte // without the OCTET STRING
	certs   [][]byte
	visible bool // the private object was there
	open    bool // and showed without a login, so that it may sign without one
	always  bool // CKA_ALWAYS_AUTHENTICATE
	unfit   string
	private *privateName // nil: the token has never shown it
	params  []byte       // CKA_EC_PARAMS of the private key
	foreign bool         // it is nothing but the certificate of an authority
	loose   bool         // its private key is one of several: a signature tells which
}

// pair puts the objects of a token together to key pairs, in the order of the
// token's objects. When hidden is true the token may hold private keys that
// show only after a login: then a public key or a certificate stands for its
// private key. Objects that cannot be used are left out; why is told by skip.
func pair(objects []wire.Object, token wire.TokenID, hidden bool, skip func(o wire.Object, reason error)) []*found {
	return pairOf(objects, token, hidden, false, skip)
}

// pairOf is pair for a list that may be cut short. Then the private key of a public key may
// be among the objects that are not listed, and the public key stands for it.
func pairOf(objects []wire.Object, token wire.TokenID, hidden, cut bool, skip func(o wire.Object, reason error)) []*found {
	return pairInto(newPairIndex(), objects, token, hidden, cut, skip)
}

// pairInto is pairOf with the index to use.
func pairInto(known *pairIndex, objects []wire.Object, token wire.TokenID, hidden, cut bool, skip func(o wire.Object, reason error)) []*found {
	var all []*found
	// find returns the pair that an object belongs to: the one with its public
	// half, or, when either does not show one, one with its ID, if possible with
	// its label. An object without an ID has that of its public half. A pair has
	// one private key.
	find := func(o wire.Object, keyType uint64, pub crypto.PublicKey, sum [sha256.Size]byte) *found {
		var best *found
		rank := 0
		for f := range known.candidates(o, keyType, pub, sum) {
			if f.keyType != keyType {
				continue
			}
			sameID := bytes.Equal(f.id, o.ID)
			n := 0
			switch {
			case f.public != nil && pub != nil:
				switch {
				case f.sum != sum:
				case sameID:
					n = 4
				case len(f.id) == 0 || len(o.ID) == 0:
					n = 3
				case o.Class == wire.CKOCertificate:
					n = 1 // a certificate may have another ID than its key
				}
			case sameID && (o.Class != wire.CKOPrivateKey || !f.visible):
				n = 1
				if f.label == o.Label {
					n = 2
				}
			}
			if n > rank {
				best, rank = f, n
			}
		}
		return best
	}
	add := func(o wire.Object, keyType uint64, pub crypto.PublicKey) *found {
		var sum [sha256.Size]byte
		if pub != nil {
			sum = digest(pub)
		}
		f := find(o, keyType, pub, sum)
		if f == nil {
			f = &found{keyType: keyType}
			all = append(all, f)
		}
		if len(f.id) == 0 || o.Class == wire.CKOPrivateKey && len(o.ID) > 0 {
			f.id = o.ID
		}
		if f.public == nil && pub != nil {
			f.public, f.sum = pub, sum
		}
		if f.label == "" {
			f.label = o.Label
		}
		f.visible = f.visible || o.Class == wire.CKOPrivateKey
		f.note(o.Class, o.Label, o.ID)
		known.note(f)
		return f
	}

	objects = slices.DeleteFunc(slices.Clone(objects), func(o wire.Object) bool {
		long := max(len(o.ID), len(o.Label)) > maxObjectText
		if long {
			o.ID, o.Label = nil, ""
			skip(o, errLongText)
		}
		return long
	})

	// Public keys first: theirs is the best public half. Then private keys, which
	// find their pair by ID and, where they show it, by their own public half.
	// Certificates come last, those of authorities, which may have the ID of a key
	// that they vouch for, after the key's own.
	var own, issuers []wire.Object
	for _, o := range objects {
		if isAuthority(o) {
			issuers = append(issuers, o)
		} else {
			own = append(own, o)
		}
	}
	objects = append(own, issuers...)
	foreign := authorities(objects)
	for _, class := range []uint64{wire.CKOPublicKey, wire.CKOPrivateKey, wire.CKOCertificate} {
		for _, o := range objects {
			if o.Class != class {
				continue
			}
			switch class {
			case wire.CKOPublicKey:
				pub, err := publicKey(o)
				if err != nil {
					skip(o, err)
					continue
				}
				f := add(o, o.KeyType, pub)
				if o.Sign == wire.False {
					f.unfit = "its public key is not for verifying signatures"
				}
			case wire.CKOPrivateKey:
				if !slices.Contains([]uint64{wire.CKKRSA, wire.CKKEC, wire.CKKECEdwards}, o.KeyType) {
					skip(o, fmt.Errorf("its type (CKK %#x) cannot be used with SSH", o.KeyType))
					continue
				}
				// Many tokens do not give the public half with the private key:
				// that is no reason to skip it.
				pub, _ := publicKey(o)
				f := add(o, o.KeyType, pub)
				f.open = hidden || o.Private == wire.False
				f.label = cmp.Or(o.Label, f.label)
				f.private, f.params = &privateName{o.ID, o.Label}, o.ECParams
				f.always = o.AlwaysAuth == wire.True
				f.unfit = ""
				if o.Sign == wire.False {
					f.unfit = "it is not for signing"
				}
			case wire.CKOCertificate:
				cert, err := certificate(o)
				if err != nil {
					skip(o, err)
					continue
				}
				keyType, ok := keyTypeOf(cert.PublicKey)
				if !ok {
					skip(o, errors.New("the key in this certificate cannot be used with SSH"))
					continue
				}
				f := add(o, keyType, cert.PublicKey)
				if len(f.certs) < maxPairObjects {
					f.certs = append(f.certs, o.Value)
				}
				// An encryption certificate counts also when the private key says that it
				// signs: libykcs11 2.2 says so of each, once somebody is logged in.
				issued := foreign[sha256.Sum256(cert.Raw)]
				keyed := slices.ContainsFunc(f.classes, func(c uint64) bool { return c != wire.CKOCertificate })
				f.foreign = issued && !keyed
				if ownAuthority(cert) && (keyed || !issued) {
					continue // it says nothing against its key
				}
				if reason := unfitCertificate(cert); reason != "" && f.unfit == "" {
					f.unfit = reason
				}
			}
		}
	}

	var usable []*found
	for _, f := range adopt(all, hidden) {
		o := wire.Object{Class: wire.CKOPrivateKey, ID: f.id, Label: f.label, KeyType: f.keyType}
		switch {
		case f.public == nil:
			skip(o, errors.New("the token gives no public key or certificate for it"))
			continue
		case !f.visible && !hidden && !cut:
			skip(o, errors.New("there is no private key for it on the token"))
			continue
		}
		if err := usableKey(f.public); err != nil {
			skip(o, err)
			continue
		}
		f.modulus, f.point = halves(f.public)
		if isAttestation(f, token) {
			f.unfit = "it is an attestation key"
		}
		usable = append(usable, f)
	}
	return usable
}

// isAttestation tells whether a key only ever signs statements of the token
// about its other keys. Labels of certificates count where there is nothing else:
// what a YubiKey states of a key has the ID of that key in libykcs11, and a label
// that says attestation.
func isAttestation(f *found, token wire.TokenID) bool {
	isKey := func(class uint64) bool { return class != wire.CKOCertificate }
	keyed := slices.ContainsFunc(f.classes, isKey)
	for i, l := range f.labels {
		if (isKey(f.classes[i]) || !keyed) && strings.Contains(strings.ToLower(l), "attestation") {
			return true
		}
	}
	// Slot F9 of a YubiKey, as its own module numbers it.
	return strings.HasPrefix(token.Manufacturer, "Yubico") && bytes.Equal(f.id, []byte{0x19})
}

// unfitCertificate says why a certificate is not one to log in with, or nothing.
func unfitCertificate(c *x509.Certificate) string {
	switch {
	case c.IsCA:
		return "its certificate is that of a certificate authority"
	case c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageDigitalSignature|x509.KeyUsageContentCommitment) == 0:
		return "its certificate is not for signing"
	}
	return ""
}

func isAuthority(o wire.Object) bool {
	if o.Class != wire.CKOCertificate {
		return false
	}
	c, err := certificate(o)
	return err == nil && c.IsCA
}

func certificate(o wire.Object) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(o.Value)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	return c, nil
}

func keyTypeOf(pub crypto.PublicKey) (uint64, bool) {
	switch pub.(type) {
	case *rsa.PublicKey:
		return wire.CKKRSA, true
	case *ecdsa.PublicKey:
		return wire.CKKEC, true
	case ed25519.PublicKey:
		return wire.CKKECEdwards, true
	}
	return 0, false
}

func equalKeys(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// digest is the same for equal keys of one type, and for no others. To compare
// the keys themselves, each with each, would take minutes on a token full of
// long ones.
func digest(pub crypto.PublicKey) [sha256.Size]byte {
	modulus, point := halves(pub)
	b := append(modulus, point...)
	if k, ok := pub.(*rsa.PublicKey); ok {
		b = binary.BigEndian.AppendUint64(b, uint64(k.E))
	}
	return sha256.Sum256(b)
}

// usableKey says what is wrong with a key, or nil.
func usableKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fmt.Errorf("an RSA key of %d bits: only %d to %d are used", n, minRSABits, maxRSABits)
		}
		if k.E < 3 || k.E&1 == 0 {
			return errors.New("an RSA key with an exponent that cannot be")
		}
	case *ecdsa.PublicKey:
		if !slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, k.Curve) {
			return fmt.Errorf("curve %s has no use in SSH", k.Params().Name)
		}
	}
	return nil
}

// halves returns what the module process tells keys apart by.
func halves(pub crypto.PublicKey) (modulus, point []byte) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return k.N.Bytes(), nil
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return nil, nil // not on its curve: nothing was parsed into such a key
		}
		return nil, point
	case ed25519.PublicKey:
		return nil, k
	}
	return nil, nil
}

var (
	oidP256       = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidP384       = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
	oidP521       = asn1.ObjectIdentifier{1, 3, 132, 0, 35}
	oidPrimeField = asn1.ObjectIdentifier{1, 2, 840, 10045, 1, 1}

	oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}
	// What PKCS#11 v3.0 and some tokens use for CKA_EC_PARAMS of Edwards keys.
	curveNameEd25519 = "edwards25519"
	oidEdwards25519  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 15, 1}
)

// publicKey reads the public half out of the attributes of a key object: a
// public key, or a private key that shows it (PKCS#11 v2.40 sections 2.1.2 and
// 2.3.3, v3.0 section 2.3.5).
func publicKey(o wire.Object) (crypto.PublicKey, error) {
	switch o.KeyType {
	case wire.CKKRSA:
		if len(o.Modulus) == 0 || len(o.Exponent) == 0 {
			return nil, errors.New("an RSA key without its modulus or exponent")
		}
		e := new(big.Int).SetBytes(o.Exponent)
		if !e.IsInt64() || e.Int64() > 1<<31-1 {
			return nil, errors.New("an RSA key with an exponent too large")
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(o.Modulus), E: int(e.Int64())}, nil
	case wire.CKKEC:
		curve, err := namedCurve(o.ECParams)
		if err != nil {
			return nil, err
		}
		for _, point := range points(o.ECPoint) {
			if k, err := ecdsa.ParseUncompressedPublicKey(curve, point); err == nil {
				return k, nil
			}
		}
		return nil, errors.New("its point is not on its curve")
	case wire.CKKECEdwards:
		if err := ed25519Params(o.ECParams); err != nil {
			return nil, err
		}
		for _, point := range points(o.ECPoint) {
			if len(point) == ed25519.PublicKeySize {
				return ed25519.PublicKey(bytes.Clone(point)), nil
			}
		}
		return nil, errors.New("its Ed25519 point is not 32 bytes long")
	default:
		return nil, fmt.Errorf("its type (CKK %#x) cannot be used with SSH", o.KeyType)
	}
}

// points returns what may be meant by CKA_EC_POINT: the standard wants the DER
// of an OCTET STRING, some modules give the point itself, some a BIT STRING.
func points(b []byte) [][]byte {
	var all [][]byte
	var octets []byte
	if rest, err := asn1.Unmarshal(b, &octets); err == nil && len(rest) == 0 {
		all = append(all, octets)
	}
	var bits asn1.BitString
	if rest, err := asn1.Unmarshal(b, &bits); err == nil && len(rest) == 0 && bits.BitLength == 8*len(bits.Bytes) {
		all = append(all, bits.Bytes)
	}
	return append(all, b)
}

// namedCurve reads CKA_EC_PARAMS: the name of a curve, or all its numbers, as
// libykcs11 gives them for keys without a certificate (RFC 3279 section 2.3.5).
func namedCurve(params []byte) (elliptic.Curve, error) {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err != nil || len(rest) > 0 {
		return curveOf(params)
	}
	switch {
	case oid.Equal(oidP256):
		return elliptic.P256(), nil
	case oid.Equal(oidP384):
		return elliptic.P384(), nil
	case oid.Equal(oidP521):
		return elliptic.P521(), nil
	}
	return nil, fmt.Errorf("curve %v has no use in SSH", oid)
}

// curveOf returns the curve that has exactly these numbers. With any one of them
// different it is another curve, which may have been made to be weak.
func curveOf(params []byte) (elliptic.Curve, error) {
	var given struct {
		Version int
		Field   struct {
			Type  asn1.ObjectIdentifier
			Prime *big.Int
		}
		Curve struct {
			A, B []byte
			Seed asn1.BitString `asn1:"optional"`
		}
		Base     []byte
		Order    *big.Int
		Cofactor *big.Int `asn1:"optional"`
	}
	errUnnamed := errors.New("its curve is not given by name, and is none of those in SSH")
	if rest, err := asn1.Unmarshal(params, &given); err != nil || len(rest) > 0 || !given.Field.Type.Equal(oidPrimeField) {
		return nil, errUnnamed
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		c := curve.Params()
		size := (c.BitSize + 7) / 8
		base := slices.Concat([]byte{4}, c.Gx.FillBytes(make([]byte, size)), c.Gy.FillBytes(make([]byte, size)))
		minus3 := new(big.Int).Sub(c.P, big.NewInt(3))
		if given.Field.Prime.Cmp(c.P) == 0 && given.Order.Cmp(c.N) == 0 && bytes.Equal(given.Base, base) &&
			new(big.Int).SetBytes(given.Curve.A).Cmp(minus3) == 0 && new(big.Int).SetBytes(given.Curve.B).Cmp(c.B) == 0 &&
			(given.Cofactor == nil || given.Cofactor.Cmp(big.NewInt(1)) == 0) {
			return curve, nil
		}
	}
	return nil, errUnnamed
}

func ed25519Params(params []byte) error {
	var name string
	if rest, err := asn1.UnmarshalWithParams(params, &name, "printable"); err == nil && len(rest) == 0 {
		if strings.EqualFold(name, curveNameEd25519) || strings.EqualFold(name, "Ed25519") {
			return nil
		}
		return errors.New("its Edwards curve is not Ed25519")
	}
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err == nil && len(rest) == 0 {
		if oid.Equal(oidEd25519) || oid.Equal(oidEdwards25519) {
			return nil
		}
	}
	return errors.New("its Edwards curve is not Ed25519")
}
