// Package pkcs11uri reads, writes and matches PKCS#11 URIs (RFC 7512). The configuration,
// clients and the comments of identities name tokens and keys with such URIs.
//
// The package promises:
//
//   - Reading follows the grammar of RFC 7512 section 2.3. An absent attribute differs
//     from an empty one.
//   - Matching follows section 2.5. An absent attribute matches everything, and a present
//     attribute matches only the same bytes. A URI with an unrecognised path attribute
//     matches nothing. Only the padding of PKCS#11's fixed-size texts does not count.
//   - One URI has one text.
//   - A PIN goes from the caller's bytes straight into a secret.Secret. Only URI.PIN
//     returns it. No text, no error, no verb of fmt, no logger and no encoder ever shows
//     the PIN, or the place that a pin-source names.
//
// The package leaves to others:
//
//   - whether a pin-value, a pin-source or a module-path counts (this depends on the
//     author of the URI);
//   - to run or read what a pin-source names;
//   - to resolve links.
//
// # Where RFC 7512 leaves room
//
// Where the RFC is silent or lets the reader choose, the package decides:
//
//   - Parse refuses a URI with both pin-source and pin-value, or with one query attribute
//     of the RFC twice. Vendor attributes may repeat in the query, not in the path.
//   - Parse refuses a query attribute in the path, and a path attribute in the query. It
//     does not take them for vendor attributes.
//   - Texts are UTF-8. The id, a PIN, paths, commands and vendor values are bytes.
//   - Only the value of pin-value may hold "pin-value=", in any encoding.
//     "token=a&pin-value=1234" is a legal token label. More probably it holds a PIN,
//     which would be printed with the label.
//
// # Differences from p11-kit
//
// In version 0.24 of p11-kit, p11_kit_uri_parse reads more and p11_kit_uri_match_*
// matches more. The tests run both and know each of these differences by name. Numbers
// beyond 63 bits are the exception, because p11-kit overflows on them.
//
//   - p11-kit drops blanks and line breaks anywhere in the text. It accepts characters
//     that have to be percent-encoded. This package refuses both.
//   - p11-kit takes empty attributes ("token=a;", "?a=b&") and reads the text after ";;"
//     as the query. This package refuses them.
//   - p11-kit takes the last of two equal path attributes. This package refuses them.
//   - In p11-kit, the name of a vendor attribute has any characters in the path, and is
//     lower case in the query. Here it has the RFC's letters, digits, "-" and "_".
//   - p11-kit knows the names of old drafts: objecttype and object-type for type,
//     secretkey for secret-key, pinfile, and also pin-source and pin-value in the path.
//     Here the names are unknown. Parse refuses the value secretkey, and a PIN attribute
//     in the path.
//   - In p11-kit, an unknown type matches nothing. This package refuses it.
//   - p11-kit takes an empty slot-id for 0, lets numbers wrap, and reads the largest
//     slot-id as absent. It refuses a library version of 255. Here 255 is a byte and a
//     CK_ULONG has 64 bits.
//   - p11-kit takes texts that are not UTF-8, any text for a pin-source, and broken
//     escapes in values of unknown attributes. This package refuses them.
//   - p11-kit has no limits of length and number. Here MaxLength and MaxAttributes are
//     the limits.
//   - p11-kit matches zero bytes at the end of a value with zero bytes only. Here zero
//     bytes are padding, as blanks are.
//   - p11-kit matches a value that starts with a zero byte with anything. If a value is
//     too long for its field, p11-kit matches nothing, not even what the value is not
//     about. Neither happens here.
package pkcs11uri

import (
	"encoding"
	"fmt"
	"io"
	"log/slog"
	"strconv"

	"p11-agent/pinentry/secret"
)

const (
	// MaxLength is the most bytes that a URI may have, scheme included.
	MaxLength = 8 << 10
	// MaxAttributes is the most attributes that path and query may have together.
	MaxAttributes = 64
)

// A URI is a PKCS#11 URI (RFC 7512). A nil field means that the attribute is absent. An
// absent attribute is not the same as an empty one. The zero URI is "pkcs11:", which
// matches everything.
//
// If you fill the fields by hand, use values that Parse can return. Parse refuses the
// text of a URI with other values.
//
// Every printer shows a URI as String does. Many goroutines may read a URI at once. A
// call of Wipe or a change of a field must not overlap with any other use.
//
// A copy of a URI shares its PIN and its slices with the original: Wipe on one wipes the
// PIN of both. To keep the selection alone, keep the URI and wipe it. To keep the PIN,
// clone it (secret.Secret.Clone) first.
type URI struct {
	// Of the token (CK_TOKEN_INFO).
	Token        *string // label
	Manufacturer *string // manufacturerID
	Serial       *string // serialNumber
	Model        *string // model

	// Of the module (CK_INFO).
	LibraryManufacturer *string  // manufacturerID
	LibraryVersion      *Version // libraryVersion
	LibraryDescription  *string  // libraryDescription

	// Of the object.
	Object *string // CKA_LABEL
	Type   Class   // CKA_CLASS; empty when absent
	ID     []byte  // CKA_ID; nil when absent

	// Of the slot (CK_SLOT_INFO).
	SlotID           *uint64 // CK_SLOT_ID
	SlotManufacturer *string // manufacturerID
	SlotDescription  *string // slotDescription

	// Of the query.
	PINSource  *PINSource
	ModuleName *string
	ModulePath *string // a file or a directory; not checked to be absolute

	pathVendor  []vendor
	queryVendor []vendor
	pin         *secret.Secret
}

// Texts that may be secret, or may tell where a secret is, lie behind a pointer to a
// string. For a value in another package's unexported field, fmt calls no method. It
// walks into structs, slices and pointers to them, but not into a pointer to a string.

// A vendor is an attribute that the RFC does not define.
type vendor struct {
	name, value *string
}

// Version is the version of a module (CK_VERSION). It prints as "major.minor".
type Version struct {
	Major, Minor uint8
}

// String returns the major and the minor number, with a dot between them.
func (v Version) String() string {
	return strconv.Itoa(int(v.Major)) + "." + strconv.Itoa(int(v.Minor))
}

// Class is the class of an object, as the type attribute names it.
type Class string

// The classes of RFC 7512 section 2.3.
const (
	ClassPublic    Class = "public"     // CKO_PUBLIC_KEY
	ClassPrivate   Class = "private"    // CKO_PRIVATE_KEY
	ClassCert      Class = "cert"       // CKO_CERTIFICATE
	ClassSecretKey Class = "secret-key" // CKO_SECRET_KEY
	ClassData      Class = "data"       // CKO_DATA
)

// PINKind tells from where a pin-source has the PIN read.
type PINKind int

// The kinds of a PINSource.
const (
	PINFile       PINKind = iota + 1 // the file that Path names
	PINCommand                       // the program that Command names prints it
	PINCredential                    // the credential of the service that Credential names
)

// A PINSource is the value of a pin-source attribute (RFC 7512 section 2.4). It is not a
// PIN, but tells where the PIN lies. So it prints only its kind.
type PINSource struct {
	Kind  PINKind
	value *string
}

// Path returns the path of a PINFile: absolute, without a zero byte. The URI has it as a
// path or as a file: URI of this machine (RFC 8089). Path is empty for another kind.
func (s PINSource) Path() string { return s.of(PINFile) }

// Command returns the command of a PINCommand: the absolute path of a program and the
// rest of the line, as the URI has it. The program that runs the command splits it.
// Command is empty for another kind.
func (s PINSource) Command() string { return s.of(PINCommand) }

// Credential returns the name of a PINCredential (systemd.exec(5), LoadCredential=). The
// name has letters, digits, ".", "-" and "_". Credential is empty for another kind.
func (s PINSource) Credential() string { return s.of(PINCredential) }

func (s PINSource) of(kind PINKind) string {
	if s.Kind != kind || s.value == nil {
		return ""
	}
	return *s.value
}

// A SyntaxError says why a text is no PKCS#11 URI. It quotes no value, and no name that
// the RFC does not define: either may be a misplaced PIN.
type SyntaxError struct {
	Offset    int    // in bytes from the start of the text
	Attribute string // name of the attribute; empty when it is not one of RFC 7512
	Reason    string // what is wrong and what to do
}

func (e *SyntaxError) Error() string {
	if e.Attribute == "" {
		return fmt.Sprintf("pkcs11 URI, byte %d: %s", e.Offset, e.Reason)
	}
	return fmt.Sprintf("pkcs11 URI, byte %d, attribute %s: %s", e.Offset, e.Attribute, e.Reason)
}

// PIN returns the pin-value, or nil when the URI has none. An empty pin-value is not nil.
// The URI owns the PIN: Wipe wipes it.
func (u *URI) PIN() *secret.Secret { return u.pin }

// Wipe overwrites the pin-value and removes it from the URI. The rest stays. The caller
// may call Wipe more than once.
func (u *URI) Wipe() {
	u.pin.Wipe()
	u.pin = nil
}

// Unrecognized returns the names of the path attributes that the RFC does not define, in
// the order of the text. It includes "x-" names. A URI with such an attribute matches
// nothing (section 2.5), so report an error for it in a configuration. Suggest may know
// which attribute the author meant.
func (u *URI) Unrecognized() []string { return names(u.pathVendor) }

// Ignored returns the names of the query attributes that the RFC does not define, in the
// order of the text. It includes repetitions. These attributes have no effect (section
// 2.5), so warn about them in a configuration.
//
// If the URI has a pin-value, do not log the names. A name after a pin-value may be a
// piece of a PIN whose "&" was not encoded.
func (u *URI) Ignored() []string { return names(u.queryVendor) }

func names(vendors []vendor) []string {
	var all []string
	for _, v := range vendors {
		all = append(all, *v.name)
	}
	return all
}

// Format prints String for every verb; %q quotes it.
func (u URI) Format(w fmt.State, verb rune) { format(w, verb, u.String()) }

// LogValue gives log/slog what String returns.
func (u URI) LogValue() slog.Value { return slog.StringValue(u.String()) }

// MarshalText gives encoders what String returns. There is no UnmarshalText, because a
// URI loses its PIN and its pin-source in an encoder.
func (u URI) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// String returns the kind: "file:", "|" or "credential:". No kind is a valid pin-source.
func (s PINSource) String() string {
	switch s.Kind {
	case PINFile:
		return filePrefix
	case PINCommand:
		return commandPrefix
	case PINCredential:
		return credentialPrefix
	}
	return "unknown"
}

// Format prints String for every verb; %q quotes it.
func (s PINSource) Format(w fmt.State, verb rune) { format(w, verb, s.String()) }

// LogValue gives log/slog what String returns.
func (s PINSource) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText gives encoders what String returns.
func (s PINSource) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func format(w fmt.State, verb rune, text string) {
	if verb == 'q' {
		text = strconv.Quote(text)
	}
	// Only the caller that owns the fmt.State can report a failed write.
	_, _ = io.WriteString(w, text)
}

var (
	_ fmt.Formatter          = URI{}
	_ slog.LogValuer         = URI{}
	_ encoding.TextMarshaler = URI{}
	_ fmt.Formatter          = PINSource{}
	_ slog.LogValuer         = PINSource{}
	_ encoding.TextMarshaler = PINSource{}
)
