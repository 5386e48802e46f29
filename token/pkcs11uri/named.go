package pkcs11uri

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// maxTokenLabel is the most bytes that the label of a token has (CK_TOKEN_INFO of PKCS#11
// v2.40, section 3.2).
const maxTokenLabel = 32

// ParseNamed reads what a person types to name a token or a key. This is a PKCS#11 URI,
// as ParseBytes reads it, or the label of a token. The label "demo" means the same as
// "pkcs11:token=demo". Like ParseBytes, ParseNamed keeps nothing of text, and the caller
// wipes text.
//
// A text that looks like a mistyped URI is no label, because it may hold a PIN. For such
// a text the error is a *SyntaxError, which quotes nothing of the text.
func ParseNamed(text []byte) (*URI, error) {
	if IsURI(text) {
		return ParseBytes(text)
	}
	no := func(reason string) (*URI, error) { return nil, &SyntaxError{Reason: reason} }
	switch {
	case len(text) == 0:
		return no("it is empty")
	case looksLikeURI(text):
		return no(`it has to start with "pkcs11:", as in "pkcs11:token=LABEL"`)
	case len(text) > maxTokenLabel:
		return no(fmt.Sprintf(`it starts with no "pkcs11:", and the label of a token has %d bytes at the most`, maxTokenLabel))
	case !plain.Prints(text):
		return no(`it starts with no "pkcs11:", and cannot be typed as the label of a token: percent-encode the label in "pkcs11:token="`)
	}
	return &URI{Token: new(string(text))}, nil
}

// IsURI tells whether a text begins with the scheme "pkcs11:", in either case.
func IsURI(text []byte) bool {
	return len(text) >= len(scheme) && bytes.EqualFold(text[:len(scheme)], []byte(scheme))
}

// looksLikeURI tells whether a text has an attribute of a URI, spelt correctly or not, or
// words about a PIN.
func looksLikeURI(text []byte) bool {
	lower := bytes.ToLower(text)
	defer secret.Wipe(lower)
	if bytes.Contains(lower, []byte("pkcs11:")) || bytes.Contains(lower, []byte("pin-")) || bytes.Contains(lower, []byte("pin=")) {
		return true
	}
	for rest := lower; ; {
		before, after, found := bytes.Cut(rest, []byte("="))
		if !found {
			return false
		}
		name := before[bytes.LastIndexAny(before, ":;?& ")+1:]
		if attributeNamed(string(name)) != nil || Suggest(string(name)) != "" {
			return true
		}
		rest = after
	}
}

// An UnknownError says that a URI has path attributes that RFC 7512 does not define.
type UnknownError struct {
	Names []string // of the attributes
	Meant string   // the attribute that the author probably meant by the first name; empty: none is near
}

func (e *UnknownError) Error() string {
	text := fmt.Sprintf("the URI has the attribute %q, which is not known, so it matches nothing", e.Names[0])
	if len(e.Names) > 1 {
		text = fmt.Sprintf("the URI has the attributes %q, which are not known, so it matches nothing", e.Names)
	}
	if e.Meant != "" {
		text += fmt.Sprintf(": did you mean %q?", e.Meant)
	}
	return text
}

// CheckNames returns an *UnknownError when the URI has an unrecognised path attribute.
// Such a URI matches nothing (RFC 7512 section 2.5).
func (u *URI) CheckNames() error {
	unknown := u.Unrecognized()
	if len(unknown) == 0 {
		return nil
	}
	return &UnknownError{Names: unknown, Meant: Suggest(unknown[0])}
}

// MeantID returns the ID that a person probably meant, or nil. It corrects IDs whose
// hexadecimal digits lack their percent signs: "01" for "%01", and "%6deb" for "%6d%eb".
// Colons and blanks between the digits, and "0x" before them, do not count.
func MeantID(id []byte) []byte {
	if meant := unhexID(id); meant != nil {
		return meant
	}
	if len(id) < 3 {
		return nil
	}
	if rest := unhexID(id[1:]); len(rest) > 0 && len(id[1:])%2 == 0 {
		return append([]byte{id[0]}, rest...)
	}
	return nil
}

// unhexID decodes an ID that is made of hexadecimal digits.
func unhexID(id []byte) []byte {
	digits := slices.DeleteFunc(slices.Clone(id), func(c byte) bool { return c == ':' || c == ' ' })
	digits = bytes.TrimPrefix(digits, []byte("0x"))
	if len(digits) == 1 {
		digits = append([]byte{'0'}, digits...)
	}
	meant := make([]byte, hex.DecodedLen(len(digits)))
	if n, err := hex.Decode(meant, digits); err != nil || n == 0 {
		return nil
	}
	return meant
}

// FormatID returns an ID as a URI has it, with every byte percent-encoded: "%01".
func FormatID(id []byte) string { return escape(string(id), func(byte) bool { return false }) }

// SpellsID tells whether the text of a URI has its ID percent-encoded as a whole. An
// author who encodes the whole ID means exactly these bytes.
func SpellsID(text string, id []byte) bool {
	return strings.Contains(strings.ToUpper(text), "ID="+FormatID(id))
}
