package pivcard

import (
	"bytes"
	"encoding/binary"
)

// aidOpenPGP is the OpenPGP application's, OpenPGP card specification 3.4.1
// section 4.2.1, without version, manufacturer and serial number.
var aidOpenPGP = []byte{0xD2, 0x76, 0x00, 0x01, 0x24, 0x01}

// selectOpenPGPLocked selects the OpenPGP application, which ends what was
// verified with PIV.
func (c *Card) selectOpenPGPLocked() ([]byte, uint16) {
	if c.verified {
		c.eventLocked("OpenPGP is selected")
	}
	c.forgetLocked()
	c.openPGP = true
	return nil, swOK
}

// openPGPLocked answers what gpg --card-status asks for. There are no keys, and
// nothing can be changed.
func (c *Card) openPGPLocked(cmd command) ([]byte, uint16) {
	if cmd.ins != 0xCA { // GET DATA with the tag in P1 and P2, section 7.2.6
		return nil, swInstruction
	}
	c.counts.OpenPGP++
	aid := append(bytes.Clone(aidOpenPGP), 0x03, 0x04, 0xFF, 0xFE) // 3.4, of no manufacturer
	aid = append(binary.BigEndian.AppendUint32(aid, c.serial), 0, 0)
	history := []byte{0x00, 0x73, 0x00, 0x00, 0x80, 0x05, 0x90, 0x00}
	attributes := []byte{0x01, 0x08, 0x00, 0x00, 0x20, 0x00} // RSA of 2048 bits
	status := []byte{0x00, 0x7F, 0x7F, 0x7F, 0x03, 0x00, 0x03}
	switch uint16(cmd.p1)<<8 | uint16(cmd.p2) {
	case 0x004F:
		return aid, swOK
	case 0x5F52:
		return history, swOK
	case 0x00C4:
		return status, swOK
	case 0x0065:
		return tlv(0x65, tlv(0x5B), tlv(0x5F2D), tlv(0x5F35, []byte("9"))), swOK
	case 0x007A:
		return tlv(0x7A, tlv(0x93, []byte{0, 0, 0})), swOK
	case 0x006E:
		return tlv(0x6E, tlv(0x4F, aid), tlv(0x5F52, history), tlv(0x73,
			tlv(0xC0, []byte{0x74, 0x00, 0x00, 0x00, 0x08, 0x00, 0x00, 0xFF, 0x01, 0x00}),
			tlv(0xC1, attributes), tlv(0xC2, attributes), tlv(0xC3, attributes), tlv(0xC4, status),
			tlv(0xC5, make([]byte, 60)), tlv(0xC6, make([]byte, 60)), tlv(0xCD, make([]byte, 12)))), swOK
	}
	return nil, swNotFound
}
