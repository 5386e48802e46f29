package pkcs11uri

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"p11-agent/token/wire"
)

// ForKey takes at most this many bytes of a token's or an object's text into a URI. So
// the text of the URI stays below MaxLength even when every byte is percent-encoded. The
// texts of a token have 32 bytes at most. Labels and ids have no limit.
const (
	maxText = 256
	maxID   = 1024
)

// ForKey returns the URI that names a key for a person. The URI has token, serial, object
// and id. It has the token's manufacturer and model when the token has neither label nor
// serial. ForKey omits empty values.
//
// The texts come from a token, and a token may return anything. So ForKey also omits
// values that Parse would refuse or that are too long: text that is not UTF-8, holds
// "pin-value=" or has more than 256 bytes, and an id of more than 1024 bytes. So Parse
// can read the text of the URI, and the URI matches its key. The URI may match other
// keys, too.
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

// addressable returns text, or nil when the text has no place in a URI.
func addressable(text string) *string {
	if text == "" || len(text) > maxText || !utf8.ValidString(text) || strings.Contains(text, pinValue+"=") {
		return nil
	}
	return &text
}
