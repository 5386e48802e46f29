package pairs

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"p11-agent/token/wire"
)

// Package pairs does not use RSA keys outside these bounds. Every current OpenSSH refuses shorter keys. Longer keys
// only cost time.
const (
	minRSABits = 2048
	maxRSABits = 16384
)

// KeyType returns the PKCS#11 type (CKK) of a public key, and false if SSH has no keys of that type.
func KeyType(pub crypto.PublicKey) (uint64, bool) {
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

// Equal reports whether two public keys are the same.
func Equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// Digest returns a hash of a public key. Equal keys of one type have the same digest, and different keys have
// different ones. Comparing digests is fast even if a token holds thousands of long keys.
func Digest(pub crypto.PublicKey) [sha256.Size]byte {
	modulus, point := Attributes(pub)
	b := append(modulus, point...)
	if k, ok := pub.(*rsa.PublicKey); ok {
		b = binary.BigEndian.AppendUint64(b, uint64(k.E))
	}
	return sha256.Sum256(b)
}

// Usable returns nil if SSH can use the public key, and else the reason.
func Usable(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fmt.Errorf("an RSA key of %d bits: only %d to %d are used", n, minRSABits, maxRSABits)
		}
		if k.E < 3 || k.E&1 == 0 {
			return errors.New("the RSA key has an invalid exponent")
		}
	case *ecdsa.PublicKey:
		if !slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, k.Curve) {
			return fmt.Errorf("curve %s has no use in SSH", k.Params().Name)
		}
	}
	return nil
}

// Attributes returns CKA_MODULUS of an RSA key, and the point of another key without the DER around it. The module
// process tells keys apart by them.
func Attributes(pub crypto.PublicKey) (modulus, point []byte) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return k.N.Bytes(), nil
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return nil, nil // The point is not on the curve. PublicKey returns no such key.
		}
		return nil, point
	case ed25519.PublicKey:
		return nil, k
	}
	return nil, nil
}

// The names of curves in CKA_EC_PARAMS (RFC 5480 section 2.1.1.1, RFC 8410 section 3).
var (
	OIDP256    = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	OIDP384    = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
	OIDP521    = asn1.ObjectIdentifier{1, 3, 132, 0, 35}
	OIDEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}

	// Some tokens use these names for Ed25519 (PKCS#11 v3.0 section 2.3.5).
	NameEd25519     = "edwards25519"
	OIDEdwards25519 = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 15, 1}

	oidPrimeField = asn1.ObjectIdentifier{1, 2, 840, 10045, 1, 1}
)

// PublicKey reads the public key from the attributes of a key object: a public key, or a private key that shows its
// public key (PKCS#11 v2.40 sections 2.1.2 and 2.3.3, v3.0 section 2.3.5). The result shares no memory with o.
func PublicKey(o wire.Object) (crypto.PublicKey, error) {
	switch o.KeyType {
	case wire.CKKRSA:
		if len(o.Modulus) == 0 || len(o.Exponent) == 0 {
			return nil, errors.New("the RSA key has no modulus or no exponent")
		}
		e := new(big.Int).SetBytes(o.Exponent)
		if !e.IsInt64() || e.Int64() > 1<<31-1 {
			return nil, errors.New("the exponent of the RSA key is too large")
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(o.Modulus), E: int(e.Int64())}, nil
	case wire.CKKEC:
		curve, err := namedCurve(o.ECParams)
		if err != nil {
			return nil, err
		}
		for _, point := range Points(o.ECPoint) {
			if k, err := ecdsa.ParseUncompressedPublicKey(curve, point); err == nil {
				return k, nil
			}
		}
		return nil, errors.New("its point is not on its curve")
	case wire.CKKECEdwards:
		if err := ed25519Params(o.ECParams); err != nil {
			return nil, err
		}
		for _, point := range Points(o.ECPoint) {
			if len(point) == ed25519.PublicKeySize {
				return ed25519.PublicKey(bytes.Clone(point)), nil
			}
		}
		return nil, errors.New("its Ed25519 point is not 32 bytes long")
	default:
		return nil, fmt.Errorf("its type (CKK %#x) cannot be used with SSH", o.KeyType)
	}
}

// Points returns the possible meanings of CKA_EC_POINT, best first. The standard wants the DER of an OCTET STRING.
// Some modules return the point itself, some a BIT STRING.
func Points(b []byte) [][]byte {
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

// namedCurve reads CKA_EC_PARAMS: the name of a curve, or all its parameters. libykcs11 returns the parameters for
// keys without a certificate (RFC 3279 section 2.3.5).
func namedCurve(params []byte) (elliptic.Curve, error) {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err != nil || len(rest) > 0 {
		return curveOf(params)
	}
	switch {
	case oid.Equal(OIDP256):
		return elliptic.P256(), nil
	case oid.Equal(OIDP384):
		return elliptic.P384(), nil
	case oid.Equal(OIDP521):
		return elliptic.P521(), nil
	}
	return nil, fmt.Errorf("curve %v has no use in SSH", oid)
}

// curveOf returns the curve that has exactly these parameters. If one parameter differs, then the curve is another
// one, which an attacker may have made weak.
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
	errUnnamed := errors.New("its curve has no name, and SSH does not have it")
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

// ed25519Params returns nil if CKA_EC_PARAMS means Ed25519.
func ed25519Params(params []byte) error {
	var name string
	if rest, err := asn1.UnmarshalWithParams(params, &name, "printable"); err == nil && len(rest) == 0 {
		if strings.EqualFold(name, NameEd25519) || strings.EqualFold(name, "Ed25519") {
			return nil
		}
		return errors.New("its Edwards curve is not Ed25519")
	}
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err == nil && len(rest) == 0 {
		if oid.Equal(OIDEd25519) || oid.Equal(OIDEdwards25519) {
			return nil
		}
	}
	return errors.New("its Edwards curve is not Ed25519")
}
