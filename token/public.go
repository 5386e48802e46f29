package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A PublicKey is a public half that the configuration gives for a private key
// whose token shows none.
type PublicKey struct {
	// URI names the private key. It has to have an id or an object.
	URI *pkcs11uri.URI
	// Key is *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey.
	Key crypto.PublicKey
}

// CheckPublicKey tells what keeps a PublicKey from being used.
func CheckPublicKey(p PublicKey) error {
	if p.URI.ID == nil && p.URI.Object == nil {
		return errors.New("the URI must name one key by its id or object")
	}
	if _, ok := keyTypeOf(p.Key); !ok {
		return errors.New("no token has keys of this type that SSH can use")
	}
	return usableKey(p.Key)
}

// SetPublicKeys replaces Options.PublicKeys. They count from the next look at
// the tokens on.
func (s *Store) SetPublicKeys(list []PublicKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.public = slices.Clone(list)
}

// pair puts the objects of the token together to key pairs. The token's own
// public keys and certificates come before what the configuration gives. See pairOf.
func (t *Token) pair(objects []wire.Object, hidden, cut bool, skip func(o wire.Object, reason error)) []*found {
	s := t.module.store
	s.mu.Lock()
	public := s.public
	s.mu.Unlock()
	public = slices.DeleteFunc(slices.Clone(public), func(p PublicKey) bool {
		return CheckPublicKey(p) != nil || !t.matches(p.URI, true)
	})
	if len(public) > 0 {
		pairs := pair(objects, t.ID, hidden, func(wire.Object, error) {})
		for _, p := range public {
			names := func(f *found) bool {
				return (p.URI.ID == nil || f.hasID(p.URI.ID)) &&
					(p.URI.Object == nil || slices.Contains(f.labels, *p.URI.Object))
			}
			if slices.ContainsFunc(pairs, names) {
				continue
			}
			o := p.object()
			for _, private := range objects {
				// After a login it shows the ID that the URI does not give.
				if o.ID == nil && private.Class == wire.CKOPrivateKey && private.KeyType == o.KeyType && private.Label == o.Label {
					o.ID = private.ID
				}
			}
			objects = append(objects, o)
		}
	}
	return pairOf(objects, t.ID, hidden, cut, skip)
}

// object makes the public key object that the token does not have.
func (p PublicKey) object() wire.Object {
	o := wire.Object{Class: wire.CKOPublicKey, ID: p.URI.ID}
	if p.URI.Object != nil {
		o.Label = *p.URI.Object
	}
	o.KeyType, _ = keyTypeOf(p.Key)
	o.Modulus, o.ECPoint = halves(p.Key)
	switch k := p.Key.(type) {
	case *rsa.PublicKey:
		o.Exponent = big.NewInt(int64(k.E)).Bytes()
	case *ecdsa.PublicKey:
		o.ECParams = curveParams(map[elliptic.Curve]asn1.ObjectIdentifier{
			elliptic.P256(): oidP256, elliptic.P384(): oidP384, elliptic.P521(): oidP521,
		}[k.Curve])
	case ed25519.PublicKey:
		o.ECParams = curveParams(oidEd25519)
	}
	return o
}

func curveParams(oid asn1.ObjectIdentifier) []byte {
	b, _ := asn1.Marshal(oid) // of the constants above
	return b
}
