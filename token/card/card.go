// Package card tells which card is in a slot.
//
// A login, a kept PIN and refused PINs belong to the card in the slot, not to the texts that the card shows: all PIV
// cards without CHUID have one serial number. So a look notes a [Stay]: what distinguishes this card from the next
// one. [Stay.Next] compares two looks. If several tokens show the same texts, a [Numbering] tells them apart.
//
// The package errs on the safe side: it takes a card for another card if nothing proves that the card is the same.
// Package token reads the objects and asks pcscd, and forgets logins and PINs. Package card does no I/O. Its values
// do not change, so any goroutine may use them.
package card

import (
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/wire"
)

// A Stay identifies one stay of a card in a slot. The zero Stay is that of a token that no process has read.
type Stay struct {
	Process *process.Process // the process that has read the card
	Number  uint64           // wire.TokenInfo.Stay, of that process
	Shown   Shown
	place   place
}

// A place is what pcscd reports about the reader, the same for all processes of the module. The reader is empty if
// pcscd does not report it.
type place struct {
	reader string
	events uint32
}

func placeOf(readers []pcsc.Reader, slot wire.Slot) place {
	if r, ok := readerOf(readers, slot); ok {
		return place{r.Name, r.Events}
	}
	return place{}
}

// readerOf returns the reader of a slot, as pcscd sees it. ok means that there is exactly one such reader, with a
// card.
func readerOf(list []pcsc.Reader, slot wire.Slot) (r pcsc.Reader, ok bool) {
	for _, o := range list {
		if readers.Holds(slot, o) {
			if r.Name != "" {
				return r, false // names that differ after the 64 bytes of a slot
			}
			r = o
		}
	}
	return r, r.Name != "" && r.Card
}

// Placed returns the Stay with the reader of its slot. before is the list of pcscd from just before the look, and
// after gets the list from just after it. If they differ, the card may have changed during the look, and the reader
// counts as unknown.
func (s Stay) Placed(slot wire.Slot, before []pcsc.Reader, after func() []pcsc.Reader) Stay {
	if p := placeOf(before, slot); p.reader != "" && p == placeOf(after(), slot) {
		s.place = p
	}
	return s
}

// IsIn reports whether the card is in a reader of pcscd's list, and has not left it since the look.
func (s Stay) IsIn(readers []pcsc.Reader) bool {
	for _, r := range readers {
		if s.place.reader != "" && r.Card && (place{r.Name, r.Events}) == s.place {
			return true
		}
	}
	return false
}

// Lasts reports whether the stay lasts, by the number that a process reports now and by pcscd's list of readers.
func (s Stay) Lasts(p *process.Process, number uint64, slot wire.Slot, readers []pcsc.Reader) bool {
	now := placeOf(readers, slot)
	return s.Process == p && s.Number == number && (now.reader == "" || s.place.reader == "" || now == s.place)
}

// A Kind is what is known of a slot and its module.
type Kind struct {
	Removable bool // the slot is removable
	PCSC      bool // the module sees cards through pcscd
}

// A Change is the result of Next.
type Change int

// The Changes.
const (
	Same      Change = iota // the same card is in the slot
	MayBeNew                // another card may be in the slot
	Certainly               // another card is in the slot, or the card was put in again
)

// Next compares the stay of the last look with that of a new look. It returns the new stay, with what only the last
// look could tell of the same card.
func (s Stay) Next(now Stay, of Kind) (Stay, Change) {
	known := now.Shown.Comparable(s.Shown)
	other := known && !now.Shown.Overlaps(s.Shown)
	same := s.mayBe(now, of)
	if same && now.place.reader == "" && s.Process == now.Process && s.Number == now.Number {
		now.place = s.place
	}
	if same && now.Shown.empty() {
		now.Shown = s.Shown
	}
	switch {
	case same:
		return now, Same
	case other || s.place.reader != "" && now.place.reader != "":
		return now, Certainly
	}
	return now, MayBeNew
}

// mayBe reports whether the card from before may still be there.
func (s Stay) mayBe(now Stay, of Kind) bool {
	known := s.Shown.Comparable(now.Shown)
	switch {
	case known && !s.Shown.Overlaps(now.Shown):
		return false // all keys have changed
	case s.Process == nil:
		return true // the agent knows nothing of the old card
	case s.place.reader != "" && now.place.reader != "":
		return s.place == now.place
	case s.Process == now.Process && s.Number == now.Number:
		return true
	case of.PCSC:
		return false // pcscd would have shown the same stay
	}
	return known || !of.Removable
}
