// Package bounds limits what the agent keeps of what a PKCS#11 module shows.
//
// A module can lie: it can show other tokens at each look, with endless names and keys. Each lie may cost the keys of
// that module only. So the agent remembers a bounded number of tokens, keys and bytes of one module. A [Look] says
// which tokens of a module the agent uses. [Surplus] says which absent tokens the agent forgets.
//
// Package objects bounds the objects of one token, within what this package leaves. How often the agent looks at a
// module is the business of package token. A Look belongs to one goroutine.
package bounds

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"

	"p11-agent/pinentry/plain"
	"p11-agent/token/operation"
	"p11-agent/token/wire"
)

const (
	// MaxTokens is how many tokens of one module the agent remembers, present and absent. An HSM has some hundred
	// partitions at most.
	MaxTokens = 256
	// MaxKeys and MaxKeyBytes bound the keys of all tokens of one module together, with the certificates of the keys.
	MaxKeys     = wire.MaxList
	MaxKeyBytes = 16 << 20
	// MaxOtherBytes bounds the objects of no key: certificates of authorities, and public keys without a private
	// key. They never take the room of keys.
	MaxOtherBytes = 8 << 20
	// maxLook is the most bytes of objects that a look at one module reads. Tokens beyond that keep their old
	// objects.
	maxLook = 4 * wire.MaxReply
	// maxName is the most bytes of a token's label, manufacturer, model or serial number. PKCS#11 has 32 bytes
	// (v2.40 section 3.3, CK_TOKEN_INFO), and a byte that is not UTF-8 becomes three.
	maxName = 3 * 32
	// maxDescription is the same for slots and modules, which have 64 bytes (CK_SLOT_INFO, CK_INFO).
	maxDescription = 3 * 64
	// maxMissing is the most paths in a report of a module process that the sandbox lacks.
	maxMissing = 64
	// maxPath is the most bytes of such a path.
	maxPath = 4 << 10
)

// A Size says how much the agent keeps of tokens.
type Size struct {
	Keys       int
	KeyBytes   int // of the keys and their certificates
	OtherBytes int // of the objects of no key
}

// Plus returns the sum of two sizes.
func (s Size) Plus(o Size) Size {
	return Size{s.Keys + o.Keys, s.KeyBytes + o.KeyBytes, s.OtherBytes + o.OtherBytes}
}

// Room returns what one module may have besides tokens of this size.
func (s Size) Room() Size {
	return Size{MaxKeys - s.Keys, MaxKeyBytes - s.KeyBytes, MaxOtherBytes - s.OtherBytes}
}

// A Look bounds one look at a module.
type Look struct {
	log    *slog.Logger
	slots  int // that the module shows
	tokens int // that the agent uses
	bytes  int // of objects

	// What the look leaves out.
	unused int // tokens
	unread int // tokens whose objects are not read
}

// NewLook makes a Look at a module with a number of slots. log gets a warning about each bound.
func NewLook(slots int, log *slog.Logger) *Look { return &Look{slots: slots, log: log} }

// Admit reports whether the agent uses the token in a slot. It removes from the slot what the agent does not use.
func (l *Look) Admit(slot *wire.Slot) bool {
	id := slot.Token
	if max(len(id.Label), len(id.Manufacturer), len(id.Model), len(id.Serial)) > maxName {
		l.log.Warn("token has a longer name than PKCS#11 allows, and is not used", "slot", slot.ID)
		return false
	}
	if l.tokens == MaxTokens {
		if l.unused++; l.unused == 1 {
			l.log.Warn("module shows more tokens than are used", "slots", l.slots, "used", MaxTokens)
		}
		return false
	}
	l.tokens++
	slot.Description, slot.Manufacturer = plain.Cut(slot.Description, maxDescription), plain.Cut(slot.Manufacturer, maxDescription)
	slot.Mechanisms = trimMechanisms(slot.Mechanisms)
	return true
}

// trimMechanisms returns the mechanisms that the agent uses, each once.
func trimMechanisms(all []wire.Mechanism) []wire.Mechanism {
	all = slices.DeleteFunc(slices.Clone(all), func(m wire.Mechanism) bool { return !operation.Uses(m.Type) })
	slices.SortStableFunc(all, func(a, b wire.Mechanism) int { return cmp.Compare(a.Type, b.Type) })
	return slices.Clip(slices.CompactFunc(all, func(a, b wire.Mechanism) bool { return a.Type == b.Type }))
}

// MayRead reports whether the look may read the objects of a further token.
func (l *Look) MayRead(id wire.TokenID) bool {
	if l.bytes <= maxLook {
		return true
	}
	l.log.Warn("module shows more objects than are read", "token", id.Label, "serial", id.Serial)
	l.unread++
	return false
}

// Read notes that the look has read objects of so many bytes.
func (l *Look) Read(bytes int) { l.bytes += bytes }

// LeftOut says for a person what the look leaves out, and which bound is the reason.
func (l *Look) LeftOut() (all []string) {
	if l.unused > 0 {
		all = append(all, fmt.Sprintf("%s: %d tokens of one module are used at the most", Count(l.unused, "token"), MaxTokens))
	}
	if l.unread > 0 {
		all = append(all, fmt.Sprintf("the objects of %s: %d MiB of one module are read at the most", Count(l.unread, "token"), maxLook>>20))
	}
	return all
}

// Count prints a number of things.
func Count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// TrimHello shortens what a module process says of the module and of itself.
func TrimHello(h *wire.HelloReply) {
	h.Manufacturer, h.Description = plain.Cut(h.Manufacturer, maxDescription), plain.Cut(h.Description, maxDescription)
	missing := h.Sandbox.Missing[:min(len(h.Sandbox.Missing), maxMissing)]
	h.Sandbox.Missing = nil
	for _, path := range missing {
		h.Sandbox.Missing = append(h.Sandbox.Missing, plain.Cut(path, maxPath))
	}
}
