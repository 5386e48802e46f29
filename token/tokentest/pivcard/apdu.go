package pivcard

import (
	"encoding/binary"
	"errors"
	"slices"
)

// Limits of what is taken from the other side. A card answers with an error
// where more comes; nothing in PIV needs as much.
const (
	maxMessage = 0xffff // of vpcd: the length has two bytes
	maxChained = 1 << 14
)

// Status words, ISO/IEC 7816-4 section 5.6 and SP 800-73-4 part 2 section 2.4.
const (
	swOK                  = 0x9000
	swMore                = 0x6100 // and how much more
	swTries               = 0x63C0 // and how many are left
	swLength              = 0x6700
	swEndOfChain          = 0x6883
	swSecurityStatus      = 0x6982
	swBlocked             = 0x6983
	swConditions          = 0x6985
	swData                = 0x6A80
	swNotFound            = 0x6A82
	swParameters          = 0x6A86
	swReference           = 0x6A88
	swInstruction         = 0x6D00
	swClass               = 0x6E00
	swNoDiagnosis         = 0x6F00
	shortLe               = 256
	extendedLe            = 65536
	chained          byte = 0x10 // in CLA
)

// A command is a command APDU, ISO/IEC 7816-4 section 5.1.
type command struct {
	cla, ins, p1, p2 byte
	data             []byte
	le               int // the most that the answer may hold
}

// parseCommand reads the four cases, short and extended. An absent Le counts as
// the greatest: a card may offer the answer with 61xx then, and this one sends
// what fits.
func parseCommand(b []byte) (command, bool) {
	if len(b) < 4 || len(b) > maxMessage {
		return command{}, false
	}
	c := command{cla: b[0], ins: b[1], p1: b[2], p2: b[3], le: shortLe}
	b = b[4:]
	switch {
	case len(b) == 0: // case 1
		return c, true
	case len(b) == 1: // case 2
		c.le = orMost(int(b[0]), shortLe)
		return c, true
	case b[0] != 0: // cases 3 and 4
		n := int(b[0])
		if b = b[1:]; len(b) != n && len(b) != n+1 {
			return command{}, false
		}
		if len(b) > n {
			c.le = orMost(int(b[n]), shortLe)
		}
		c.data = b[:n]
		return c, true
	case len(b) < 3:
		return command{}, false
	}
	n := int(binary.BigEndian.Uint16(b[1:]))
	b = b[3:]
	c.le = extendedLe
	switch {
	case len(b) == 0: // case 2, extended
		c.le = orMost(n, extendedLe)
	case n == 0 || len(b) != n && len(b) != n+2:
		return command{}, false
	case len(b) == n+2:
		c.le = orMost(int(binary.BigEndian.Uint16(b[n:])), extendedLe)
		fallthrough
	default:
		c.data = b[:n]
	}
	return c, true
}

func orMost(n, most int) int {
	if n == 0 {
		return most
	}
	return n
}

// tlv makes a BER-TLV data object. The tag is given as its bytes read as a
// number.
func tlv(tag uint32, values ...[]byte) []byte {
	value := slices.Concat(values...)
	var b []byte
	for shift := 24; shift >= 0; shift -= 8 {
		if tag>>shift != 0 {
			b = append(b, byte(tag>>shift))
		}
	}
	switch n := len(value); {
	case n < 0x80:
		b = append(b, byte(n))
	case n < 0x100:
		b = append(b, 0x81, byte(n))
	default:
		b = append(b, 0x82, byte(n>>8), byte(n))
	}
	return append(b, value...)
}

var errTLV = errors.New("not a BER-TLV data object")

// parseTLV reads one data object with a tag of one byte, which is all that
// commands have.
func parseTLV(b []byte) (tag byte, value, rest []byte, err error) {
	if len(b) < 2 || b[0]&0x1f == 0x1f {
		return 0, nil, nil, errTLV
	}
	tag, n := b[0], int(b[1])
	switch b = b[2:]; {
	case n == 0x81 && len(b) >= 1:
		n, b = int(b[0]), b[1:]
	case n == 0x82 && len(b) >= 2:
		n, b = int(binary.BigEndian.Uint16(b)), b[2:]
	case n >= 0x80:
		return 0, nil, nil, errTLV
	}
	if n > len(b) {
		return 0, nil, nil, errTLV
	}
	return tag, b[:n], b[n:], nil
}
