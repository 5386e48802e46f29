package pivcard

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"math/big"
)

// What Yubico's PIV application answers beyond the standard ("Yubico extensions"
// in the "PIV commands" page of its developers' site).

// version is one that has all the commands below.
var version = []byte{5, 4, 3}

// Policies of GET METADATA and of attestations: for the PIN, and for touch.
const (
	pinNever, pinOnce, pinAlways byte = 1, 2, 3
	touchNever                   byte = 1
)

func (r Ref) pinPolicy() byte {
	switch r {
	case CardAuthentication:
		return pinNever
	case Signature:
		return pinAlways
	}
	return pinOnce
}

func (c *Card) yubicoLocked(cmd command) ([]byte, uint16) {
	switch cmd.ins {
	case GetVersion:
		return version, swOK
	case GetSerial:
		return binary.BigEndian.AppendUint32(nil, c.serial), swOK
	case GetMetadata:
		return c.metadataLocked(cmd.p2)
	case Attest:
		return c.attest(Ref(cmd.p1))
	}
	return nil, swInstruction
}

// metadataLocked tells of a PIN (5: is it the default; 6: tries in all, and left)
// or of a key (1: algorithm; 2: policies; 3: made on the card or imported; 4: public
// key).
func (c *Card) metadataLocked(ref byte) ([]byte, uint16) {
	code, usual := &c.pin, PIN
	switch ref {
	case refPUK:
		code, usual = &c.puk, PUK
		fallthrough
	case refPIN:
		unchanged := byte(0)
		if value, err := pad(usual); err == nil && value == code.value {
			unchanged = 1
		}
		return append(tlv(0x05, []byte{unchanged}), tlv(0x06, []byte{byte(code.most), byte(code.left)})...), swOK
	}
	key := c.keys[Ref(ref)]
	if key == nil {
		return nil, swReference
	}
	b := tlv(0x01, []byte{byte(key.algorithm)})
	b = append(b, tlv(0x02, []byte{Ref(ref).pinPolicy(), touchNever})...)
	origin := byte(1)
	if key.imported {
		origin = 2
	}
	b = append(b, tlv(0x03, []byte{origin})...)
	return append(b, tlv(0x04, publicTLV(key.private.Public()))...), swOK
}

// publicTLV is a public key as in SP 800-73-4 part 2 section 3.3.2, table 11.
func publicTLV(public crypto.PublicKey) []byte {
	switch p := public.(type) {
	case *rsa.PublicKey:
		return append(tlv(0x81, p.N.Bytes()), tlv(0x82, big.NewInt(int64(p.E)).Bytes())...)
	case *ecdsa.PublicKey:
		if point, err := p.Bytes(); err == nil {
			return tlv(0x86, point)
		}
	}
	return nil
}

// attest makes a certificate that says that a key was made on the card.
func (c *Card) attest(ref Ref) ([]byte, uint16) {
	key := c.keys[ref]
	if key == nil || ref == attestation {
		return nil, swReference
	}
	if key.imported {
		return nil, swData
	}
	serial, err := asn1.Marshal(int64(c.serial))
	if err != nil {
		return nil, swNoDiagnosis
	}
	extension := func(n int, value []byte) pkix.Extension {
		return pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 41482, 3, n}, Value: value}
	}
	t := template("YubiKey PIV Attestation", 0)
	t.ExtraExtensions = []pkix.Extension{
		extension(3, version), extension(7, serial), extension(8, []byte{ref.pinPolicy(), touchNever}),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, c.attester, key.private.Public(), c.keys[attestation].private)
	if err != nil {
		return nil, swNoDiagnosis
	}
	return der, swOK
}
