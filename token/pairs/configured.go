package pairs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"math/big"

	"p11-agent/token/wire"
)

// A Configured is a public key that the configuration gives for a private key.
type Configured struct {
	// ID and Label name the private key. Nil means any ID, or any label.
	ID    []byte
	Label *string
	// Key is *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey.
	Key crypto.PublicKey
}

// names reports whether the key belongs to a pair.
func (c Configured) names(p *Pair) bool {
	return (c.ID == nil || p.HasID(c.ID)) && (c.Label == nil || p.HasLabel(*c.Label))
}

// object makes the public key object that the token lacks. If the configuration gives no ID, the object gets the ID
// of the private key with its label. A token may show that ID after a login only.
func (c Configured) object(objects []wire.Object) wire.Object {
	o := wire.Object{Class: wire.CKOPublicKey, ID: c.ID}
	if c.Label != nil {
		o.Label = *c.Label
	}
	o.KeyType, _ = KeyType(c.Key)
	o.Modulus, o.ECPoint = Attributes(c.Key)
	switch k := c.Key.(type) {
	case *rsa.PublicKey:
		o.Exponent = big.NewInt(int64(k.E)).Bytes()
	case *ecdsa.PublicKey:
		o.ECParams = encodeOID(map[elliptic.Curve]asn1.ObjectIdentifier{
			elliptic.P256(): OIDP256, elliptic.P384(): OIDP384, elliptic.P521(): OIDP521,
		}[k.Curve])
	case ed25519.PublicKey:
		o.ECParams = encodeOID(OIDEd25519)
	}
	for _, private := range objects {
		if o.ID == nil && private.Class == wire.CKOPrivateKey && private.KeyType == o.KeyType && private.Label == o.Label {
			o.ID = private.ID
		}
	}
	return o
}

func encodeOID(oid asn1.ObjectIdentifier) []byte {
	b, _ := asn1.Marshal(oid) // The identifiers of this package are valid.
	return b
}
