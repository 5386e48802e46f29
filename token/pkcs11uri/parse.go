package pkcs11uri

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"p11-agent/pinentry/secret"
)

const (
	scheme        = "pkcs11:"
	pinValue      = "pin-value"
	filePrefix    = "file:"
	commandPrefix = "|"
	// credentialPrefix is p11-agent's own. Only the service knows where systemd puts its
	// credentials.
	credentialPrefix = "credential:"
)

// Parse reads a PKCS#11 URI, as ParseBytes does. If the text may hold a PIN, use
// ParseBytes: a string cannot be wiped.
func Parse(text string) (*URI, error) {
	b := []byte(text)
	defer secret.Wipe(b)
	return ParseBytes(b)
}

// ParseBytes reads a PKCS#11 URI (RFC 7512 section 2.3). It keeps nothing of text. The
// caller wipes text and the returned URI. ParseBytes decodes a pin-value straight into
// the URI's own Secret.
//
// If text is no such URI, the error is a *SyntaxError, and no PIN stays in memory. Any
// other error means that there is no memory to keep the PIN in.
func ParseBytes(text []byte) (*URI, error) {
	if len(text) > MaxLength {
		return nil, &SyntaxError{Offset: MaxLength, Reason: fmt.Sprintf("longer than %d bytes", MaxLength)}
	}
	if len(text) < len(scheme) || !bytes.EqualFold(text[:len(scheme)], []byte(scheme)) {
		return nil, &SyntaxError{Reason: `it has to start with "pkcs11:"`}
	}
	p := parser{u: new(URI), seen: make(map[string]bool)}
	if err := p.parse(text); err != nil {
		p.u.Wipe()
		return nil, err
	}
	return p.u, nil
}

// A parser reads one URI.
type parser struct {
	u     *URI
	count int
	seen  map[string]bool // the RFC's attributes, and the vendors' of the path
}

func (p *parser) parse(text []byte) error {
	path, query, _ := bytes.Cut(text[len(scheme):], []byte("?"))
	if err := p.component(path, ';', len(scheme), false); err != nil {
		return err
	}
	return p.component(query, '&', len(scheme)+len(path)+1, true)
}

// component reads the path or the query. text starts at offset and may be empty.
func (p *parser) component(text []byte, delimiter byte, offset int, query bool) error {
	for more := len(text) > 0; more; {
		var one []byte
		one, text, more = bytes.Cut(text, []byte{delimiter})
		if err := p.attribute(one, offset, query); err != nil {
			return err
		}
		offset += len(one) + 1
	}
	return nil
}

// attribute reads "name=value", which starts at offset.
func (p *parser) attribute(text []byte, offset int, query bool) error {
	if p.count++; p.count > MaxAttributes {
		return &SyntaxError{Offset: offset, Reason: fmt.Sprintf("more than %d attributes", MaxAttributes)}
	}
	rawName, raw, ok := bytes.Cut(text, []byte("="))
	switch {
	case len(text) == 0:
		return &SyntaxError{Offset: offset, Reason: "an empty attribute: one delimiter too many"}
	case !ok:
		return &SyntaxError{Offset: offset, Reason: `no "=" in this attribute`}
	case len(rawName) == 0:
		return &SyntaxError{Offset: offset, Reason: "an attribute without a name"}
	}
	for i, c := range rawName {
		if !isNameChar(c) {
			return &SyntaxError{Offset: offset + i, Reason: `the name of an attribute is made of letters, digits, "-" and "_"`}
		}
	}
	name := string(rawName)
	known := attributeNamed(name)

	var public string // name, if an error may quote it
	if known != nil {
		public = name
		if query && !known.query {
			return &SyntaxError{Offset: offset, Attribute: public, Reason: `it belongs in the path, before the "?"`}
		}
		if !query && known.query {
			return &SyntaxError{Offset: offset, Attribute: public, Reason: `it belongs in the query, after a "?"`}
		}
	}
	if known != nil || !query { // section 2.3: vendor attributes may repeat in the query
		if p.seen[name] {
			return &SyntaxError{Offset: offset, Attribute: public, Reason: "the same attribute a second time"}
		}
		p.seen[name] = true
	}
	if p.seen["pin-source"] && p.seen[pinValue] {
		return &SyntaxError{Offset: offset, Attribute: public, Reason: "pin-source and pin-value exclude each other: keep one"}
	}

	var err error
	switch {
	case known != nil:
		err = known.parse(p.u, raw)
	case query:
		p.u.queryVendor, err = appendVendor(p.u.queryVendor, name, raw, true)
	default:
		p.u.pathVendor, err = appendVendor(p.u.pathVendor, name, raw, false)
	}
	if se, ok := errors.AsType[*SyntaxError](err); ok {
		se.Offset += offset + len(rawName) + 1
		se.Attribute = public
	}
	return err
}

func appendVendor(list []vendor, name string, raw []byte, query bool) ([]vendor, error) {
	value, err := decodeValue(raw, query)
	if err != nil {
		return list, err
	}
	return append(list, vendor{name: &name, value: new(string(value))}), nil
}

// The readers of values below return a *SyntaxError. Its Offset counts from the start of
// the value, and its Attribute is empty.

// decode removes the percent-encoding of raw and writes the result to dst. dst has room
// for len(raw) bytes. decode returns the number of bytes in dst.
func decode(dst, raw []byte, query bool) (int, error) {
	n := 0
	for i := 0; i < len(raw); i++ {
		c := raw[i]
		switch {
		case c == '%':
			if i+2 >= len(raw) || !isHex(raw[i+1]) || !isHex(raw[i+2]) {
				return 0, &SyntaxError{Offset: i, Reason: `"%" without two hexadecimal digits after it: write "%" itself as "%25"`}
			}
			c = unhex(raw[i+1])<<4 | unhex(raw[i+2])
			i += 2
		case !isValueChar(c, query):
			return 0, &SyntaxError{Offset: i, Reason: "a character that has to be percent-encoded"}
		}
		dst[n] = c
		n++
	}
	return n, nil
}

// decodeValue decodes any value except a pin-value.
func decodeValue(raw []byte, query bool) ([]byte, error) {
	value := make([]byte, len(raw))
	n, err := decode(value, raw, query)
	if err == nil && holdsPIN(value[:n]) {
		err = &SyntaxError{Reason: `it holds "pin-value=": a pin-value is an attribute of its own, after "?" or "&" in the query`}
	}
	if err != nil {
		secret.Wipe(value)
		return nil, err
	}
	return value[:n], nil
}

// holdsPIN tells whether the value includes a pin-value, because of a wrong delimiter
// before the pin-value.
func holdsPIN(value []byte) bool { return bytes.Contains(value, []byte(pinValue+"=")) }

func decodeText(raw []byte, query bool) (*string, error) {
	value, err := decodeValue(raw, query)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(value) {
		return nil, &SyntaxError{Reason: "the text is not UTF-8"}
	}
	return new(string(value)), nil
}

func decodePath(raw []byte) (*string, error) {
	value, err := decodeValue(raw, true)
	if err != nil {
		return nil, err
	}
	if bytes.IndexByte(value, 0) >= 0 {
		return nil, errZeroByte()
	}
	return new(string(value)), nil
}

func errZeroByte() error { return &SyntaxError{Reason: "it holds a zero byte"} }

func parseClass(raw []byte) (Class, error) {
	switch c := Class(raw); c {
	case ClassPublic, ClassPrivate, ClassCert, ClassSecretKey, ClassData:
		return c, nil
	}
	return "", &SyntaxError{Reason: "it is one of public, private, cert, secret-key and data"}
}

func parseVersion(raw []byte) (*Version, error) {
	// The errors of strconv quote their input, so they are not returned.
	major, minor, ok := strings.Cut(string(raw), ".")
	if !ok {
		minor = "0" // section 2.3: "M" means M.0
	}
	m, err1 := strconv.ParseUint(major, 10, 8)
	n, err2 := strconv.ParseUint(minor, 10, 8)
	if err1 != nil || err2 != nil {
		return nil, &SyntaxError{Reason: "it is MAJOR or MAJOR.MINOR, each from 0 to 255"}
	}
	return &Version{Major: uint8(m), Minor: uint8(n)}, nil
}

func parseSlotID(raw []byte) (*uint64, error) {
	id, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil {
		return nil, &SyntaxError{Reason: "it is a decimal number of at most 64 bits"}
	}
	return &id, nil
}

// parsePIN makes the only copy of a PIN, in locked memory.
func parsePIN(raw []byte) (*secret.Secret, error) {
	pin, err := secret.New(len(raw))
	if err != nil {
		return nil, fmt.Errorf("keep the PIN of a pkcs11 URI: %w", err)
	}
	n, err := decode(pin.Buffer(), raw, true)
	if err != nil {
		pin.Wipe()
		return nil, err
	}
	pin.SetLen(n)
	return pin, nil
}

// parsePINSource reads the forms of RFC 7512 section 2.4, and the plain path that
// p11-kit's users write.
func parsePINSource(raw []byte) (*PINSource, error) {
	path, err := decodePath(raw)
	if err != nil {
		return nil, err
	}
	value := *path
	if command, ok := strings.CutPrefix(value, commandPrefix); ok {
		if !strings.HasPrefix(command, "/") {
			return nil, &SyntaxError{Reason: `after "|" comes the absolute path of a program`}
		}
		return &PINSource{Kind: PINCommand, value: &command}, nil
	}
	if name, ok := strings.CutPrefix(value, credentialPrefix); ok {
		plain := func(r rune) bool { return r < 0x80 && isNameChar(byte(r)) || r == '.' }
		if name == "" || name[0] == '.' || strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }) {
			return nil, &SyntaxError{Reason: `after "credential:" comes its name, of letters, digits, "-", "_" and "."`}
		}
		return &PINSource{Kind: PINCredential, value: &name}, nil
	}
	if len(value) >= len(filePrefix) && strings.EqualFold(value[:len(filePrefix)], filePrefix) {
		if value, err = parseFileURI(value[len(filePrefix):]); err != nil {
			return nil, err
		}
	}
	if !strings.HasPrefix(value, "/") {
		return nil, &SyntaxError{Reason: `it is "file:" and an absolute path, an absolute path, "|" and a command, or "credential:" and a name`}
	}
	return &PINSource{Kind: PINFile, value: &value}, nil
}

// parseFileURI returns the path of a file: URI (RFC 8089 section 2). rest is the URI
// without its scheme. The path is percent-encoded a second time, within the attribute.
// parseFileURI accepts characters that should be encoded but are not, except for those
// that end the path.
func parseFileURI(rest string) (string, error) {
	if host, ok := strings.CutPrefix(rest, "//"); ok {
		slash := strings.IndexByte(host, '/')
		if slash < 0 {
			return "", &SyntaxError{Reason: "a file: URI without a path"}
		}
		if name := host[:slash]; name != "" && !strings.EqualFold(name, "localhost") {
			return "", &SyntaxError{Reason: "a file: URI of another host: only files of this one are read"}
		}
		rest = host[slash:]
	}
	if strings.ContainsAny(rest, "?#") {
		return "", &SyntaxError{Reason: `a file: URI with "?" or "#" in it, which have to be percent-encoded twice: "%253F", "%2523"`}
	}
	path := make([]byte, 0, len(rest))
	for i := 0; i < len(rest); i++ {
		c := rest[i]
		if c == '%' {
			if i+2 >= len(rest) || !isHex(rest[i+1]) || !isHex(rest[i+2]) {
				return "", &SyntaxError{Reason: `the path of a file: URI is percent-encoded itself: write "%" as "%2525"`}
			}
			c = unhex(rest[i+1])<<4 | unhex(rest[i+2])
			i += 2
		}
		if c == 0 {
			return "", errZeroByte()
		}
		path = append(path, c)
	}
	// The second decoding may show a pin-value that the first did not show.
	if holdsPIN(path) {
		return "", &SyntaxError{Reason: `the path holds "pin-value=": name the file otherwise`}
	}
	return string(path), nil
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// isNameChar is pk11-v-attr-nm-char of RFC 7512 section 2.3. The names that the RFC
// defines have only these characters, too.
func isNameChar(c byte) bool { return isAlnum(c) || c == '-' || c == '_' }

// isValueChar is pk11-pchar or pk11-qchar of RFC 7512 section 2.3, without
// pct-encoded.
func isValueChar(c byte, query bool) bool {
	switch {
	case isAlnum(c), strings.IndexByte("-._~"+":[]@!$'()*+,=", c) >= 0:
		return true
	case query:
		return c == '/' || c == '?' || c == '|'
	default:
		return c == '&'
	}
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	default:
		return c - 'a' + 10
	}
}
