package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"

	"p11-agent/pinentry/secret"
)

// A Message is a pointer to one of the message structs of this package.
type Message interface {
	// fields walks the fields in the order of the encoding, in either direction. So one
	// side reads what the other side writes. Writing does not change the fields.
	fields(c *codec)
}

var (
	errShort    = errors.New("message ends too early")
	errTrailing = errors.New("message goes on after its end")
)

// A codec writes or reads fields in the encoding of RFC 4251 section 5 (boolean, byte,
// uint32, uint64, string). A list is a uint32 count and the elements. A nested struct is
// its fields. Each value has one encoding.
type codec struct {
	reading bool
	reuse   bool           // reading: use the memory of the last message; a PIN is an error
	b       []byte         // reading: the bytes that are left; writing: the bytes so far
	pin     *secret.Secret // writing: the PIN that follows b
	err     error          // reading: the first error
}

// Unmarshal reads a message that fills body. It copies what it keeps. If the message does
// not parse, Unmarshal returns an error that quotes nothing of the message, and msg is
// unusable.
func Unmarshal(body []byte, msg Message) error {
	c := codec{reading: true, b: body}
	msg.fields(&c)
	if c.err == nil && len(c.b) > 0 {
		c.err = errTrailing
	}
	if c.err != nil {
		if p, ok := msg.(interface{ pin() *secret.Secret }); ok {
			p.pin().Wipe()
		}
		return fmt.Errorf("%T: %w", msg, c.err)
	}
	return nil
}

// marshal appends msg to b, without its PIN. It returns the PIN uncopied.
func marshal(b []byte, msg Message) ([]byte, *secret.Secret) {
	c := codec{b: b}
	msg.fields(&c)
	return c.b, c.pin
}

// take returns the next n bytes to read, without a copy.
func (c *codec) take(n int) []byte {
	if c.err != nil {
		return nil
	}
	if n > len(c.b) {
		c.err = errShort
		return nil
	}
	b := c.b[:n:n]
	c.b = c.b[n:]
	return b
}

func (c *codec) byte(v *byte) {
	if !c.reading {
		c.b = append(c.b, *v)
	} else if b := c.take(1); b != nil {
		*v = b[0]
	}
}

func (c *codec) bool(v *bool) {
	var b byte
	if !c.reading {
		if *v {
			b = 1
		}
		c.byte(&b)
		return
	}
	c.byte(&b)
	if b > 1 {
		c.fail("boolean that is neither 0 nor 1")
	}
	*v = b == 1
}

func (c *codec) tri(v *Tri) {
	c.byte((*byte)(v))
	if *v > True {
		c.fail("attribute that is neither unknown, false nor true")
	}
}

func (c *codec) uint32(v *uint32) {
	if !c.reading {
		c.b = binary.BigEndian.AppendUint32(c.b, *v)
	} else if b := c.take(4); b != nil {
		*v = binary.BigEndian.Uint32(b)
	}
}

func (c *codec) uint64(v *uint64) {
	if !c.reading {
		c.b = binary.BigEndian.AppendUint64(c.b, *v)
	} else if b := c.take(8); b != nil {
		*v = binary.BigEndian.Uint64(b)
	}
}

// run reads a string of RFC 4251, without a copy.
func (c *codec) run() []byte {
	var n uint32
	c.uint32(&n)
	if uint64(n) > uint64(len(c.b)) { // also keeps n within an int
		c.fail(errShort.Error())
		return nil
	}
	return c.take(int(n))
}

func (c *codec) bytes(v *[]byte) {
	if !c.reading {
		c.b = binary.BigEndian.AppendUint32(c.b, uint32(len(*v)))
		c.b = append(c.b, *v...)
		return
	}
	b := c.run()
	switch {
	case c.reuse:
		*v = append((*v)[:0], b...)
	case len(b) == 0:
		*v = nil // always nil for empty, so that a message reads back the same
	default:
		*v = slices.Clone(b)
	}
}

// raw is a string of any bytes, because a file name may have any bytes.
func (c *codec) raw(v *string) {
	if !c.reading {
		c.b = binary.BigEndian.AppendUint32(c.b, uint32(len(*v)))
		c.b = append(c.b, *v...)
		return
	}
	if b := c.run(); !c.reuse || *v != string(b) {
		*v = string(b)
	}
}

// text is a string of UTF-8 of at most MaxText bytes.
func (c *codec) text(v *string) {
	c.raw(v)
	switch {
	case !c.reading:
	case len(*v) > MaxText:
		c.fail("text that is too long")
	case !utf8.ValidString(*v):
		c.fail("text that is not UTF-8")
	}
}

// secret is the rest of the message. Reading makes a new Secret from it, or nil if it is
// empty. Writing does not copy the Secret.
func (c *codec) secret(v **secret.Secret) {
	if !c.reading {
		c.pin = *v
		return
	}
	*v = nil
	if c.reuse && len(c.b) > 0 {
		c.fail("PIN where there is none to be")
	}
	if c.err != nil || len(c.b) == 0 {
		return
	}
	if len(c.b) > MaxPIN {
		c.fail("PIN that is too long")
		return
	}
	s, err := secret.New(len(c.b))
	if err != nil {
		c.err = err
		return
	}
	s.SetLen(copy(s.Buffer(), c.take(len(c.b))))
	*v = s
}

func (c *codec) fail(what string) {
	if c.err == nil {
		c.err = errors.New(what)
	}
}

// list is a count and the elements. Reading grows the list with each element, so a count
// alone takes no memory.
func list[T any](c *codec, v *[]T, element func(*T, *codec)) {
	n := uint32(len(*v))
	c.uint32(&n)
	if !c.reading {
		for i := range *v {
			element(&(*v)[i], c)
		}
		return
	}
	*v = nil
	if n > MaxList {
		c.fail("list that is too long")
	}
	for ; n > 0 && c.err == nil; n-- {
		var e T
		element(&e, c)
		*v = append(*v, e)
	}
}
