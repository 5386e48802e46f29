package pkcs11uri

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"p11-agent/token/wire"
)

// The most bytes of a token's or an object's own that ForKey takes into a URI,
// so that its text keeps below MaxLength with every byte percent-encoded. A
// token's texts have 32 bytes at most; labels and ids have no limit.
const (
	maxText = 256
	maxID   = 1024
)

// ForKey returns the URI that names a key for a person: token, serial, object
// and id, and the token's manufacturer and model when it has neither label nor
// serial. What is empty is left out.
//
// The texts come from a token, which may say anything: what could not be read
// back from the URI is left out, too. That is text that is not UTF-8, holds
// "pin-value=" or is longer than 256 bytes, and an id of more than 1024. So the
// URI matches the key it was made for, though it may match others, and Parse
// reads its text.
func ForKey(token wire.TokenID, label string, id []byte) *URI {
	u := &URI{
		Token:  addressable(token.Label),
		Serial: addressable(token.Serial),
		Object: addressable(label),
	}
	if u.Token == nil && u.Serial == nil {
		u.Manufacturer = addressable(token.Manufacturer)
		u.Model = addressable(token.Model)
	}
	if len(id) > 0 && len(id) <= maxID && !holdsPIN(id) {
		u.ID = bytes.Clone(id)
	}
	return u
}

// addressable returns text, or nil when it has no place in a URI.
func addressable(text string) *string {
	if text == "" || len(text) > maxText || !utf8.ValidString(text) || strings.Contains(text, pinValue+"=") {
		return nil
	}
	return &text
}
