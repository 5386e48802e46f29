package card

import (
	"maps"
	"slices"

	"p11-agent/token/wire"
)

// MaxTwins is the most tokens with the same texts that get numbers.
const MaxTwins = 256

// A Numbering numbers the tokens of one look (wire.TokenID.Twin). A number stays with the keys of the token, in all
// modules, for as long as the agent remembers the token.
type Numbering struct {
	slots []wire.Slot
	known func(texts wire.TokenID) []Twin
	peek  func(slot wire.Slot) (Shown, error)

	numbers map[uint64]uint32 // by slot
	done    map[wire.TokenID]bool
}

// NewNumbering makes a Numbering of the tokens in slots. known returns the remembered tokens with the same texts. peek
// returns what the token in a slot shows now.
func NewNumbering(slots []wire.Slot, known func(texts wire.TokenID) []Twin, peek func(wire.Slot) (Shown, error)) *Numbering {
	return &Numbering{slots: slots, known: known, peek: peek, numbers: make(map[uint64]uint32), done: make(map[wire.TokenID]bool)}
}

// Name returns the name of the token in a slot, with its number. It peeks only if several tokens have the same texts.
func (n *Numbering) Name(slot wire.Slot) wire.TokenID {
	if texts := slot.Token.Texts(); !n.done[texts] {
		n.done[texts] = true
		n.number(texts)
	}
	id := slot.Token
	id.Twin = n.numbers[slot.ID]
	return id
}

// number numbers all tokens with the same texts.
func (n *Numbering) number(texts wire.TokenID) {
	var here []wire.Slot
	for _, slot := range n.slots {
		if slot.HasToken && slot.Token.Texts() == texts && len(here) < MaxTwins {
			here = append(here, slot)
		}
	}
	known := n.known(texts)
	if len(here) == 1 && !slices.ContainsFunc(known, func(k Twin) bool { return k.Number != 0 }) {
		return // the usual case
	}
	shown := make(map[uint64]Shown)
	var ids []uint64
	for _, slot := range here {
		ids = append(ids, slot.ID)
		if s, err := n.peek(slot); err == nil {
			shown[slot.ID] = s
		} // otherwise the slot decides, and the look returns the reason
	}
	maps.Copy(n.numbers, number(ids, shown, known))
}

// A Twin is a known token among tokens with the same texts.
type Twin struct {
	Number uint32 // wire.TokenID.Twin
	Shown  Shown
	Placed bool   // the token was in Slot at the last look
	Slot   uint64 // the slot's number
}

// number gives numbers to tokens with the same texts, by their slots. shown is what the tokens show now; a slot is
// missing if its token could not be read. A token with the keys of a known token gets the number of that token. If
// the tokens show the same keys or none, the slots decide.
func number(slots []uint64, shown map[uint64]Shown, known []Twin) map[uint64]uint32 {
	numbers := make(map[uint64]uint32, len(slots))
	taken := make(map[uint32]bool)
	rest := slices.Clone(slots)
	give := func(fits func(Twin, uint64) bool) {
		rest = slices.DeleteFunc(rest, func(slot uint64) bool {
			i := slices.IndexFunc(known, func(k Twin) bool { return !taken[k.Number] && fits(k, slot) })
			if i >= 0 {
				numbers[slot], taken[known[i].Number] = known[i].Number, true
			}
			return i >= 0
		})
	}
	sameKeys := func(k Twin, slot uint64) bool { return k.Shown.Overlaps(shown[slot]) }
	sameSlot := func(k Twin, slot uint64) bool { return k.Placed && k.Slot == slot }
	give(func(k Twin, slot uint64) bool { return sameKeys(k, slot) && sameSlot(k, slot) })
	give(sameKeys)
	give(sameSlot) // the keys have changed, or the token shows none
	give(func(k Twin, slot uint64) bool { return !k.Shown.Comparable(shown[slot]) })
	for _, slot := range rest {
		free := uint32(0)
		for taken[free] || slices.ContainsFunc(known, func(k Twin) bool { return k.Number == free }) {
			free++
		}
		numbers[slot], taken[free] = free, true
	}
	return numbers
}
