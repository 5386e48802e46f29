package pkcs11uri

import (
	"bytes"
	"path/filepath"
	"regexp"
	"strings"

	"p11-agent/token/wire"
)

// ModuleInfo holds what MatchModule compares with the library-... attributes: CK_INFO as
// C_GetInfo returns it, without padding.
type ModuleInfo struct {
	Manufacturer string
	Description  string
	Version      Version
}

// SlotInfo holds what MatchSlot compares with the slot-... attributes: CK_SLOT_INFO as
// C_GetSlotInfo returns it, without padding.
type SlotInfo struct {
	ID           uint64
	Manufacturer string
	Description  string
}

// ObjectInfo holds what MatchObject compares with object, type and id. A field is empty
// when the object lacks the attribute.
type ObjectInfo struct {
	Class Class
	ID    []byte // CKA_ID
	Label string // CKA_LABEL
}

// The Match methods follow RFC 7512 section 2.5. Each method compares its own attributes.
// An absent attribute matches everything, and a present attribute matches the same bytes.
//
// The texts of tokens, slots and modules have a fixed width. In them, blanks and zero
// bytes at the end are padding and count on neither side: p11tool prints them.
//
// Every method returns false when the URI has an unrecognised path attribute. The URI
// selects a key when MatchModule, MatchModuleName, MatchSlot, MatchToken and MatchObject
// all return true.

// MatchModule matches library-manufacturer, library-version and library-description.
func (u *URI) MatchModule(m ModuleInfo) bool {
	return len(u.pathVendor) == 0 &&
		padded(u.LibraryManufacturer, m.Manufacturer) &&
		padded(u.LibraryDescription, m.Description) &&
		same(u.LibraryVersion, m.Version)
}

// MatchSlot matches slot-id, slot-manufacturer and slot-description.
func (u *URI) MatchSlot(s SlotInfo) bool {
	return len(u.pathVendor) == 0 &&
		same(u.SlotID, s.ID) &&
		padded(u.SlotManufacturer, s.Manufacturer) &&
		padded(u.SlotDescription, s.Description)
}

// MatchToken matches token, manufacturer, serial and model.
func (u *URI) MatchToken(t wire.TokenID) bool {
	return len(u.pathVendor) == 0 &&
		padded(u.Token, t.Label) &&
		padded(u.Manufacturer, t.Manufacturer) &&
		padded(u.Serial, t.Serial) &&
		padded(u.Model, t.Model)
}

// MatchObject matches object, type and id. A type matches its own class only. The caller
// knows the key pair of the object. So the caller decides whether type=public or
// type=cert names the pair.
func (u *URI) MatchObject(o ObjectInfo) bool {
	return len(u.pathVendor) == 0 &&
		same(u.Object, o.Label) &&
		(u.Type == "" || u.Type == o.Class) &&
		(u.ID == nil || bytes.Equal(u.ID, o.ID))
}

// MatchModuleName matches module-name against a module of the registry. registered is the
// name of the module's configuration file, with or without ".module". file is the
// module's library file, as the registry names it.
//
// module-name has to be the whole of one of the two names. In the name of the library
// file, "lib" at the start and ".so" at the end, with or without numbers, may be missing.
// Case does not count (RFC 7512 section 2.3). An empty registered or file matches no
// name, and an empty module-name matches no module.
func (u *URI) MatchModuleName(registered, file string) bool {
	if len(u.pathVendor) > 0 {
		return false
	}
	if u.ModuleName == nil {
		return true
	}
	name := strings.ToLower(*u.ModuleName)
	registered, file = strings.ToLower(registered), strings.ToLower(file)
	if name == "" {
		return false
	}
	const suffix = ".module"
	if registered != "" && strings.TrimSuffix(name, suffix) == strings.TrimSuffix(registered, suffix) {
		return true
	}
	if file == "" {
		return false
	}
	base := filepath.Base(file)
	stem := base[:len(base)-len(soSuffix.FindString(base))]
	for _, n := range []string{base, stem, strings.TrimPrefix(base, "lib"), strings.TrimPrefix(stem, "lib")} {
		if name == n {
			return true
		}
	}
	return false
}

// soSuffix is the end of a shared library's file name, its version included.
var soSuffix = regexp.MustCompile(`\.so(\.[0-9]+)*$`)

// Padding holds the bytes that fill the fixed width of a text in CK_INFO, CK_SLOT_INFO or
// CK_TOKEN_INFO. The standard uses blanks; tpm2-pkcs11 1.9 uses zero bytes.
const Padding = " \x00"

// padded compares as same does, but without the padding of a text of fixed width.
func padded(want *string, have string) bool {
	return want == nil || strings.TrimRight(*want, Padding) == strings.TrimRight(have, Padding)
}

func same[T comparable](want *T, have T) bool { return want == nil || *want == have }

// NamesToken reports whether the URI names one token, by label or serial number.
func (u *URI) NamesToken() bool {
	given := func(s *string) bool { return s != nil && strings.Trim(*s, Padding) != "" }
	return given(u.Token) || given(u.Serial)
}
