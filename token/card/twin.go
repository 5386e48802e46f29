package card

import "slices"

// A Twin is a known token among tokens with the same texts.
type Twin struct {
	Number uint32 // wire.TokenID.Twin
	Shown  Shown
	Placed bool   // the token was in Slot at the last look
	Slot   uint64 // the slot's number
}

// Number gives numbers to tokens with the same texts, by their slots. shown is what the tokens show now; a slot is
// missing if its token could not be read. A token with the keys of a known token gets the number of that token. If
// the tokens show the same keys or none, the slots decide.
func Number(slots []uint64, shown map[uint64]Shown, known []Twin) map[uint64]uint32 {
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
