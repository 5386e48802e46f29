package pivcard

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"math/big"
	"time"
)

// A Ref names a key on the card: SP 800-73-4 part 1 section 5.1, table 4b.
type Ref byte

// The keys of a PIV card, by the names of OpenSC's objects: 01, 02, 03 and 04.
const (
	Authentication     Ref = 0x9A // PIN once
	Signature          Ref = 0x9C // PIN always
	KeyManagement      Ref = 0x9D // PIN once
	CardAuthentication Ref = 0x9E // PIN never
	Retired            Ref = 0x82 // the first of twenty; PIN once
	attestation        Ref = 0xF9 // Yubico's
)

const retiredKeys = 20

func (r Ref) retired() bool { return r >= Retired && r < Retired+retiredKeys }

// object returns the tag of the data object that holds the key's certificate:
// SP 800-73-4 part 1 section 4.3, table 3.
func (r Ref) object() uint32 {
	switch r {
	case Authentication:
		return 0x5FC105
	case Signature:
		return 0x5FC10A
	case KeyManagement:
		return 0x5FC10B
	case CardAuthentication:
		return 0x5FC101
	case attestation:
		return 0x5FFF01
	}
	return 0x5FC10D + uint32(r-Retired)
}

// An Algorithm is an identifier of SP 800-78-4 section 6.2, table 6-2.
type Algorithm byte

// Kinds of keys.
const (
	RSA2048 Algorithm = 0x07
	P256    Algorithm = 0x11
	P384    Algorithm = 0x14
)

// A Key says what a card has in a place. The zero value is a new key of the
// place's usual kind: P-384 in KeyManagement, else P-256.
type Key struct {
	Algorithm Algorithm
	// Private is the key itself, instead of a new one: to have it twice.
	Private crypto.Signer
	// Usage is that of the certificate, instead of the place's usual one.
	// Middleware goes by it; the card itself does not look.
	Usage x509.KeyUsage
	// NoCertificate leaves the certificate away: the card then cannot tell that
	// there is a key.
	NoCertificate bool
	// Imported has a YubiKey say that the key was made elsewhere: it then attests
	// nothing.
	Imported bool
}

// NewKey makes a key of the place's usual kind, which can be put on several cards.
func NewKey(r Ref) (Key, error) {
	made, err := Key{}.make(r)
	if err != nil {
		return Key{}, err
	}
	return Key{Private: made.private}, nil
}

// heldKey is a key on the card.
type heldKey struct {
	algorithm Algorithm
	private   crypto.Signer
	imported  bool
}

func (k Key) make(r Ref) (*heldKey, error) {
	if k.Algorithm == 0 {
		k.Algorithm = P256
		if r == KeyManagement {
			k.Algorithm = P384
		}
	}
	if k.Private == nil {
		var err error
		if k.Private, err = k.Algorithm.generate(); err != nil {
			return nil, err
		}
	}
	switch p := k.Private.(type) {
	case *rsa.PrivateKey:
		if p.N.BitLen() == 2048 && p.E == 65537 {
			p.Precompute()
			return &heldKey{RSA2048, p, k.Imported}, nil
		}
	case *ecdsa.PrivateKey:
		switch p.Curve {
		case elliptic.P256():
			return &heldKey{P256, p, k.Imported}, nil
		case elliptic.P384():
			return &heldKey{P384, p, k.Imported}, nil
		}
	}
	return nil, fmt.Errorf("a key of type %T, or of its size, cannot be on the card", k.Private)
}

func (a Algorithm) generate() (crypto.Signer, error) {
	switch a {
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	return nil, fmt.Errorf("algorithm %#02x is not one of the card's", byte(a))
}

// usage is what a certificate of a key usually says, FPKI's certificate profile
// for PIV.
func (r Ref) usage(k *heldKey) x509.KeyUsage {
	switch {
	case r == Signature:
		return x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment
	case (r == KeyManagement || r.retired()) && k.algorithm == RSA2048:
		return x509.KeyUsageKeyEncipherment
	case r == KeyManagement || r.retired():
		return x509.KeyUsageKeyAgreement
	case r == attestation:
		return x509.KeyUsageCertSign
	}
	return x509.KeyUsageDigitalSignature
}

// template is a certificate for a key. No test reads its dates.
func template(name string, usage x509.KeyUsage) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, KeyUsage: usage,
		NotBefore: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2049, 1, 1, 0, 0, 0, 0, time.UTC),
		BasicConstraintsValid: true, IsCA: usage&x509.KeyUsageCertSign != 0,
	}
}

// objects makes what GET DATA reads, by tag: SP 800-73-4 part 1 appendix A.
func (c *Card) makeObjects(o Options) error {
	retired := byte(0)
	for ref, k := range c.keys {
		if ref.retired() {
			retired++
		}
		from := o.Keys[ref]
		if from.NoCertificate {
			continue
		}
		usage := from.Usage
		if usage == 0 {
			usage = ref.usage(k)
		}
		t := template(o.Name, usage)
		der, err := x509.CreateCertificate(rand.Reader, t, t, k.private.Public(), k.private)
		if err != nil {
			return fmt.Errorf("make a certificate for key %02X: %w", byte(ref), err)
		}
		// 71: not compressed. FE: an error detection code, which is empty.
		c.objects[ref.object()] = tlv(0x53, tlv(0x70, der), tlv(0x71, []byte{0}), tlv(0xFE))
		if ref == attestation {
			c.attester = t
		}
	}

	// Section 3.1.2. The GUID's second half is the serial number that OpenSC shows.
	guid := binary.BigEndian.AppendUint64([]byte("PIVCARD\x01"), uint64(o.Serial))
	fascN := []byte{ // agency 9999, system 9999, credential 999999, and so on: no agency has them
		0xd4, 0xe7, 0x39, 0xda, 0x73, 0x9c, 0xed, 0x39, 0xce, 0x73, 0x9d, 0x83, 0x68,
		0x58, 0x21, 0x08, 0x42, 0x10, 0x84, 0x21, 0xc8, 0x42, 0x10, 0xc3, 0xeb,
	}
	c.objects[0x5FC102] = tlv(0x53, tlv(0x30, fascN), tlv(0x34, guid), tlv(0x35, []byte("20490101")), tlv(0x3E), tlv(0xFE))

	// Card Capability Container, section 3.1.1: mandatory, and of no use.
	id := append([]byte{0xa0, 0x00, 0x00, 0x01, 0x16, 0xff, 0x02}, guid[2:]...)
	c.objects[0x5FC107] = tlv(0x53, tlv(0xF0, id), tlv(0xF1, []byte{0x21}), tlv(0xF2, []byte{0x21}), tlv(0xF3),
		tlv(0xF4, []byte{0}), tlv(0xF5, []byte{0x10}), tlv(0xF6), tlv(0xF7), tlv(0xFA), tlv(0xFB), tlv(0xFC), tlv(0xFD), tlv(0xFE))

	// Discovery object, section 3.3.2: the PIN is the card application's own.
	c.objects[0x7E] = tlv(0x7E, tlv(0x4F, aidPIV), tlv(0x5F2F, []byte{0x40, 0x00}))

	// Key history object, section 3.3.3: how many retired keys have a certificate
	// on the card, and how many elsewhere.
	c.objects[0x5FC10C] = tlv(0x53, tlv(0xC1, []byte{retired}), tlv(0xC2, []byte{0}), tlv(0xFE))
	return nil
}
