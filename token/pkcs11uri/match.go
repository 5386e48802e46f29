package pkcs11uri

import (
	"bytes"
	"path/filepath"
	"regexp"
	"strings"

	"p11-agent/token/wire"
)

// ModuleInfo is what the library-... attributes are matched against: CK_INFO as
// C_GetInfo gives it, without padding.
type ModuleInfo struct {
	Manufacturer string
	Description  string
	Version      Version
}

// SlotInfo is what the slot-... attributes are matched against: CK_SLOT_INFO as
// C_GetSlotInfo gives it, without padding.
type SlotInfo struct {
	ID           uint64
	Manufacturer string
	Description  string
}

// ObjectInfo is what object, type and id are matched against. What the object
// does not have is empty.
type ObjectInfo struct {
	Class Class
	ID    []byte // CKA_ID
	Label string // CKA_LABEL
}

// The Match methods follow RFC 7512 section 2.5: each looks at its own
// attributes, those that are absent match everything, the others match the same
// bytes. In the texts of fixed width, which are those of tokens, slots and modules, blanks
// and zero bytes at the end are padding and count on neither side: p11tool prints them. All are false when there is an unrecognised path attribute. A key is
// selected when MatchModule, MatchModuleName, MatchSlot, MatchToken and
// MatchObject all say so.

// MatchModule matches library-manufacturer, library-version and
// library-description.
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

// MatchObject matches object, type and id. A type matches its own class only:
// whether type=public or type=cert names the key pair that the object belongs
// to is for the caller, who knows the pair.
func (u *URI) MatchObject(o ObjectInfo) bool {
	return len(u.pathVendor) == 0 &&
		same(u.Object, o.Label) &&
		(u.Type == "" || u.Type == o.Class) &&
		(u.ID == nil || bytes.Equal(u.ID, o.ID))
}

// MatchModuleName matches module-name against a module of the registry: the
// name it is registered under (the name of its configuration file, with or
// without ".module") and the file it is in, as the registry names it. The name
// has to be the whole of either; of the file name's, "lib" at the start and ".so"
// with or without numbers at the end may be missing. Case does not count (RFC
// 7512 section 2.3). An empty registered or file matches no name, and an empty
// module-name matches no module.
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

// Padding is what fills the fixed width of a text of CK_INFO, CK_SLOT_INFO or
// CK_TOKEN_INFO. The standard has blanks; tpm2-pkcs11 1.9 has zero bytes.
const Padding = " \x00"

// padded is same for a text of fixed width.
func padded(want *string, have string) bool {
	return want == nil || strings.TrimRight(*want, Padding) == strings.TrimRight(have, Padding)
}

func same[T comparable](want *T, have T) bool { return want == nil || *want == have }
