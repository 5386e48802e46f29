// Package pkcs11uri reads, writes and matches PKCS#11 URIs (RFC 7512), which is
// how tokens and keys are named in the configuration, by clients and in the
// comments of identities.
//
// It promises that
//
//   - what is read follows the grammar of RFC 7512 section 2.3, and an
//     attribute that is absent is told from one that is empty;
//   - matching follows section 2.5: absent matches everything, present matches
//     the same bytes and nothing else, and a URI with a path attribute nobody
//     knows matches nothing. Only the padding of PKCS#11's fixed-size texts does
//     not count;
//   - there is one text for one URI;
//   - a PIN goes from the caller's bytes straight into a secret.Secret and
//     comes out of it only through URI.PIN. No text, no error, no verb of fmt,
//     no logger and no encoder ever shows it, or the place that a pin-source names.
//
// It leaves to others whether a pin-value, a pin-source or a module-path counts
// at all (that depends on who says it), to run or read what a pin-source names,
// and to resolve links.
//
// # Where RFC 7512 leaves room
//
// Where the RFC is silent or lets the reader choose:
//
//   - Both pin-source and pin-value, or one query attribute of the RFC twice,
//     is refused. Vendor attributes may repeat in the query, not in the path.
//   - An attribute of the query in the path, or the reverse, is refused instead
//     of taken for a vendor's.
//   - Texts are UTF-8. The id, a PIN, paths, commands and vendor values are
//     bytes.
//   - No value but that of pin-value may hold "pin-value=", however it is
//     encoded: "token=a&pin-value=1234" is a legal token label, but more
//     probably a PIN that would be printed with it.
//
// # Differences from p11-kit
//
// p11-kit 0.24's p11_kit_uri_parse reads more and p11_kit_uri_match_* matches
// more. The tests run both and know each of these differences by name, but for
// numbers beyond 63 bits, which p11-kit overflows:
//
//   - p11-kit drops blanks and line breaks anywhere in the text, and lets
//     through characters that have to be percent-encoded; both are refused here.
//   - p11-kit takes empty attributes ("token=a;", "?a=b&") and reads what
//     follows ";;" as the query; refused here.
//   - p11-kit takes the last of two path attributes; refused here.
//   - p11-kit takes a vendor attribute's name to be anything in the path and
//     lower case in the query; here it is the RFC's letters, digits, "-" and "_".
//   - p11-kit knows the names of old drafts: objecttype and object-type for
//     type, secretkey for secret-key, pinfile and also pin-source and pin-value
//     in the path; here the names are unknown, the value is refused, and so is a
//     PIN attribute in the path.
//   - p11-kit takes an unknown type to match nothing; refused here.
//   - p11-kit takes an empty slot-id for 0, lets numbers wrap, and reads the
//     largest slot-id as none; it refuses a library version of 255. Here 255 is
//     a byte and a CK_ULONG has 64 bits.
//   - p11-kit takes texts that are not UTF-8, any text for a pin-source, and
//     broken escapes in values of unknown attributes; refused here.
//   - p11-kit has no limits of length and number, as MaxLength and MaxAttributes
//     are here.
//   - p11-kit matches zero bytes at the end of a value with nothing but zero
//     bytes; here they are padding, as blanks are. p11-kit matches a value that
//     starts with a zero byte with anything, and with a value too long for its
//     field it matches nothing, not even what that value is not about. Neither
//     happens here.
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
	// MaxAttributes is the most attributes that path and query may have
	// together.
	MaxAttributes = 64
)

// A URI is a PKCS#11 URI (RFC 7512). A nil field says that the attribute is
// absent, which is not the same as empty. The zero URI is "pkcs11:", which
// matches everything.
//
// Who makes a URI by hand gives its fields values that Parse could have given
// them, or else Parse refuses the text.
//
// A URI prints as String does, whatever prints it. It may be read by many
// goroutines at once; Wipe and changes of a field need it for themselves.
//
// A copy of a URI shares its PIN and its slices with the original: wiping one
// wipes the PIN of both. Who wants to keep the selection alone keeps the URI and
// wipes it; who wants to keep the PIN clones it (secret.Secret.Clone) first.
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

// What may be a secret, or tell where one is, lies behind a pointer to a string:
// fmt calls no method of a value in somebody's unexported field, but walks into
// structs, slices and pointers to them. It does not walk into that.

// A vendor is an attribute that the RFC does not define.
type vendor struct {
	name, value *string
}

// Version is the version of a module (CK_VERSION). It prints as "major.minor".
type Version struct {
	Major, Minor uint8
}

// String returns "major.minor".
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

// PINKind is where a pin-source has the PIN read from.
type PINKind int

// The kinds of a PINSource.
const (
	PINFile       PINKind = iota + 1 // the file that Path names
	PINCommand                       // the program that Command names prints it
	PINCredential                    // the credential of the service that Credential names
)

// A PINSource is the value of a pin-source attribute (RFC 7512 section 2.4). It
// is not a PIN, but tells where one lies: it prints its kind and nothing else.
type PINSource struct {
	Kind  PINKind
	value *string
}

// Path returns the path of a PINFile: absolute, without a zero byte. It was
// written as a path or as a file: URI of this machine (RFC 8089). It is empty for
// another kind.
func (s PINSource) Path() string { return s.of(PINFile) }

// Command returns the command of a PINCommand: the absolute path of a program
// and what follows it, as written; how to split it is for whoever runs it. It is
// empty for another kind.
func (s PINSource) Command() string { return s.of(PINCommand) }

// Credential returns the name of a PINCredential (systemd.exec(5),
// LoadCredential=): letters, digits, and ".", "-", "_". It is empty for another
// kind.
func (s PINSource) Credential() string { return s.of(PINCredential) }

func (s PINSource) of(kind PINKind) string {
	if s.Kind != kind || s.value == nil {
		return ""
	}
	return *s.value
}

// A SyntaxError says why a text is no PKCS#11 URI. It quotes no value and no
// name that the RFC does not define, since either may be a PIN gone astray.
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

// PIN returns the pin-value, or nil when there is none; an empty one is not
// nil. It stays the URI's own: Wipe wipes it.
func (u *URI) PIN() *secret.Secret { return u.pin }

// Wipe overwrites the pin-value and removes it from the URI. The rest stays. It
// may be called more than once.
func (u *URI) Wipe() {
	u.pin.Wipe()
	u.pin = nil
}

// Unrecognized returns the names of the path attributes that the RFC does not
// define, "x-" names included, in the order of the text. While there is one, the
// URI matches nothing (section 2.5), so a configuration with one is worth an
// error; Suggest may know what was meant.
func (u *URI) Unrecognized() []string { return names(u.pathVendor) }

// Ignored returns the names of the query attributes that the RFC does not
// define, in the order of the text, repetitions included. They have no effect
// (section 2.5), so a configuration with one is worth a warning. After a
// pin-value such a name may be a piece of a PIN whose "&" was not encoded: it is
// not for the log then.
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

// MarshalText gives encoders what String returns. There is no UnmarshalText: a
// URI that went through an encoder has lost its PIN and its pin-source.
func (u URI) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// String returns the kind: "file:", "|" or "credential:". None is a pin-source.
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
	// A fmt.State has nobody to report a failed write to but its own caller.
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
