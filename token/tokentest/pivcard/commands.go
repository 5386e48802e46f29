package pivcard

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"encoding/binary"
	"math/big"
)

// Application identifiers: PIV's with its version (SP 800-73-4 part 1 section
// 2.2), and that of the card's own manager, which is there to be selected
// instead of PIV.
var (
	aidPIV     = []byte{0xA0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00, 0x01, 0x00}
	aidManager = []byte{0xA0, 0x00, 0x00, 0x01, 0x51, 0x00, 0x00, 0x00}
)

// Key references of PINs, SP 800-73-4 part 2 section 3.2.
const (
	refPIN byte = 0x80
	refPUK byte = 0x81
)

func (c *Card) executeLocked(cmd command, corrupt bool) ([]byte, uint16) {
	if cmd.ins == Select {
		return c.selectLocked(cmd)
	}
	if c.openPGP {
		return c.openPGPLocked(cmd)
	}
	if !c.selected {
		return nil, swInstruction
	}
	switch cmd.ins {
	case GetData:
		return c.getData(cmd)
	case PutData:
		return nil, swSecurityStatus // no client has the administration key
	case Verify:
		return nil, c.verifyLocked(cmd)
	case ChangeReferenceData:
		return nil, c.changeLocked(cmd)
	case ResetRetryCounter:
		return nil, c.unblockLocked(cmd)
	case GeneralAuthenticate:
		return c.authenticateLocked(cmd, corrupt)
	}
	if c.yubiKey {
		return c.yubicoLocked(cmd)
	}
	return nil, swInstruction
}

// selectLocked is SELECT, section 3.1.1. A right-truncated identifier is as good
// as the whole. What is not on the card leaves all as it was, and so does PIV
// when it is selected already; any other application ends what was verified.
func (c *Card) selectLocked(cmd command) ([]byte, uint16) {
	c.counts.Selects++
	if cmd.p1 != 0x04 {
		return nil, swParameters
	}
	const least = 5 // the registered provider's part
	switch {
	case len(cmd.data) >= least && bytes.HasPrefix(aidPIV, cmd.data):
		if !c.selected {
			c.forgetLocked()
			c.selected = true
		}
		// Section 3.1.1, table 4: the application's identifier, and who gave it.
		return tlv(0x61, tlv(0x4F, aidPIV[5:]), tlv(0x79, tlv(0x4F, aidPIV[:5]))), swOK
	case len(cmd.data) >= least && bytes.HasPrefix(aidManager, cmd.data):
		if c.verified {
			c.eventLocked("another application is selected")
		}
		c.forgetLocked()
		return tlv(0x6F, tlv(0x84, aidManager), tlv(0xA5)), swOK
	case c.hasPGP && len(cmd.data) >= least && bytes.HasPrefix(cmd.data, aidOpenPGP):
		return c.selectOpenPGPLocked()
	}
	return nil, swNotFound
}

// getData is GET DATA, section 3.1.2. All objects may always be read by contact.
func (c *Card) getData(cmd command) ([]byte, uint16) {
	if cmd.p1 != 0x3F || cmd.p2 != 0xFF {
		return nil, swParameters
	}
	t, name, rest, err := parseTLV(cmd.data)
	if err != nil || t != 0x5C || len(rest) > 0 || len(name) == 0 || len(name) > 3 {
		return nil, swData
	}
	object, ok := c.objects[binary.BigEndian.Uint32(append(make([]byte, 4-len(name)), name...))]
	if !ok {
		return nil, swNotFound
	}
	return object, swOK
}

// try compares a PIN, and takes a try for a wrong one.
func (s *secretCode) try(value []byte) uint16 {
	if s.left == 0 {
		return swBlocked
	}
	if subtle.ConstantTimeCompare(s.value[:], value) == 0 {
		s.left--
		return swTries | uint16(s.left)
	}
	s.left = s.most
	return swOK
}

func (s *secretCode) status() uint16 {
	if s.left == 0 {
		return swBlocked
	}
	return swTries | uint16(s.left)
}

// verifyLocked is VERIFY, section 3.2.1: with a PIN, without one (asks), and with
// P1 FF (ends what was verified).
func (c *Card) verifyLocked(cmd command) uint16 {
	switch {
	case cmd.p2 != refPIN:
		return swReference
	case cmd.p1 == 0xFF && len(cmd.data) == 0:
		c.verified, c.fresh = false, false
		c.eventLocked("verification ended")
		return swOK
	case cmd.p1 != 0:
		return swParameters
	case len(cmd.data) == 0:
		c.counts.Queries++
		if c.verified {
			return swOK
		}
		return c.pin.status()
	case len(cmd.data) != 8:
		return swData // costs no try
	}
	sw := c.pin.try(cmd.data)
	c.verified = sw == swOK
	c.fresh = c.verified
	switch {
	case c.verified:
		c.counts.Right++
		c.eventLocked("PIN right")
	case sw == swBlocked:
		c.counts.Blocked++
		c.eventLocked("PIN blocked")
	default:
		c.counts.Wrong++
		c.eventLocked("PIN wrong, %d left", c.pin.left)
	}
	return sw
}

// changeLocked is CHANGE REFERENCE DATA, section 3.2.2: the old value and the new.
func (c *Card) changeLocked(cmd command) uint16 {
	code := &c.pin
	if cmd.p2 == refPUK {
		code = &c.puk
	}
	switch {
	case cmd.p1 != 0:
		return swParameters
	case cmd.p2 != refPIN && cmd.p2 != refPUK:
		return swReference
	case len(cmd.data) != 16:
		return swData
	}
	sw := code.try(cmd.data[:8])
	if sw == swOK {
		copy(code.value[:], cmd.data[8:])
		c.eventLocked("%02X changed", cmd.p2)
	}
	if cmd.p2 == refPIN {
		c.verified = sw == swOK
		c.fresh = false
	}
	return sw
}

// unblockLocked is RESET RETRY COUNTER, section 3.2.3: the PUK and the new PIN.
func (c *Card) unblockLocked(cmd command) uint16 {
	switch {
	case cmd.p1 != 0:
		return swParameters
	case cmd.p2 != refPIN:
		return swReference
	case len(cmd.data) != 16:
		return swData
	}
	sw := c.puk.try(cmd.data[:8])
	if sw == swOK {
		copy(c.pin.value[:], cmd.data[8:])
		c.pin.left = c.pin.most
		c.eventLocked("PIN unblocked")
	}
	return sw
}

// authenticateLocked is GENERAL AUTHENTICATE, section 3.2.4, as far as it uses
// an asymmetric key: 81 is what is to be signed (appendix A.1), 85 the other
// side's point for a key agreement (A.5); the empty 82 asks for the result.
func (c *Card) authenticateLocked(cmd command, corrupt bool) ([]byte, uint16) {
	ref := Ref(cmd.p2)
	key := c.keys[ref]
	if key == nil || ref == attestation || Algorithm(cmd.p1) != key.algorithm {
		return nil, swParameters
	}
	fresh := c.fresh
	c.fresh = false
	if ref != CardAuthentication && !c.verified || ref == Signature && !fresh {
		c.counts.Refused++
		c.eventLocked("%02X refused without a PIN", byte(ref))
		return nil, swSecurityStatus
	}
	t, template, rest, err := parseTLV(cmd.data)
	if err != nil || t != 0x7C || len(rest) > 0 {
		return nil, swData
	}
	var challenge, point []byte
	asked := false
	for len(template) > 0 {
		var value []byte
		if t, value, template, err = parseTLV(template); err != nil {
			return nil, swData
		}
		switch {
		case t == 0x82 && len(value) == 0:
			asked = true
		case t == 0x81:
			challenge = bytes.Clone(value)
		case t == 0x85:
			point = value
		default:
			return nil, swData
		}
	}
	if !asked || len(challenge) > 0 == (len(point) > 0) {
		return nil, swData
	}
	if corrupt && len(challenge) > 0 {
		challenge[len(challenge)-1] ^= 1 // a good signature, of something else
	}
	result := key.agree(point)
	if len(challenge) > 0 {
		result = key.sign(challenge)
	}
	if result == nil {
		return nil, swData
	}
	if corrupt && len(point) > 0 {
		result[0] ^= 1
	}
	if len(point) > 0 {
		c.counts.Agreements++
		c.eventLocked("%02X agreed", byte(ref))
	} else {
		c.counts.Signatures++
		c.eventLocked("%02X signed", byte(ref))
	}
	return tlv(0x7C, tlv(0x82, result)), swOK
}

// sign signs a digest with ECDSA, or raises a padded block to the private
// exponent; nil when it cannot.
func (k *heldKey) sign(challenge []byte) []byte {
	switch p := k.private.(type) {
	case *ecdsa.PrivateKey:
		if len(challenge) > (p.Curve.Params().BitSize+7)/8 {
			return nil
		}
		sig, err := ecdsa.SignASN1(rand.Reader, p, challenge)
		if err != nil {
			return nil
		}
		return sig
	case *rsa.PrivateKey:
		m := new(big.Int).SetBytes(challenge)
		if len(challenge) != p.Size() || m.Cmp(p.N) >= 0 {
			return nil
		}
		// By the Chinese remainder theorem, RFC 8017 section 5.1.2: four times as
		// fast. No time is secret here.
		v := p.Precomputed
		a := new(big.Int).Exp(m, v.Dp, p.Primes[0])
		b := new(big.Int).Exp(m, v.Dq, p.Primes[1])
		a.Mul(a.Sub(a, b), v.Qinv).Mod(a, p.Primes[0])
		return b.Add(b, a.Mul(a, p.Primes[1])).FillBytes(make([]byte, p.Size()))
	}
	return nil
}

// agree is the first half of a key agreement: the shared point's x; nil when
// there is none.
func (k *heldKey) agree(point []byte) []byte {
	p, ok := k.private.(*ecdsa.PrivateKey)
	if !ok {
		return nil
	}
	own, err := p.ECDH()
	if err != nil {
		return nil
	}
	other, err := own.Curve().NewPublicKey(point)
	if err != nil {
		return nil
	}
	shared, err := own.ECDH(other)
	if err != nil {
		return nil
	}
	return shared
}
