package card

import (
	"strings"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// InReader reports whether a slot of a module is a reader. Modules name their slots after readers, within the 64
// bytes of PKCS#11 (v2.40 section 3.2, CK_SLOT_INFO).
func InReader(slot wire.Slot, r pcsc.Reader) bool {
	return slot.Description != "" && (slot.Description == r.Name || len(slot.Description) >= 63 && strings.HasPrefix(r.Name, slot.Description))
}
