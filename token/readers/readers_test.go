package readers

import (
	"testing"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// The agent keeps a PIN only if it knows that the card has stayed in its reader.
func TestMayHaveLeft(t *testing.T) {
	one, two := pcsc.Reader{Name: "one", Card: true, Events: 1}, pcsc.Reader{Name: "two", Card: true, Events: 1}
	with := func(r pcsc.Reader, card bool, events uint32) pcsc.Reader {
		r.Card, r.Events = card, events
		return r
	}
	for _, tt := range []struct {
		name      string
		slot      wire.Slot
		now       []pcsc.Reader
		any, left bool
	}{
		{"nothing has changed", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{one, two}, false, false},
		{"it was pulled", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{with(one, false, 2), two}, true, true},
		{"it was pulled and another one is in", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{with(one, true, 3), two}, true, true},
		{"its reader has gone", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{two}, true, true},
		{"another one was pulled", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{one, with(two, false, 2)}, true, false},
		{"another one was pulled, and its reader is not known", wire.Slot{Description: "?", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{one, with(two, false, 2)}, true, true},
		{"another one was pulled, and it cannot be", wire.Slot{Description: "?"}, []pcsc.Reader{one, with(two, false, 2)}, true, false},
		{"a program uses it", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{{Name: "one", Card: true, Events: 1, Users: 1}, two}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := []pcsc.Reader{one, two}
			if got := AnyLeft(before, tt.now); got != tt.any {
				t.Errorf("a card has left: got %v", got)
			}
			if got := MayHaveLeft(tt.slot, before, tt.now); got != tt.left {
				t.Errorf("this one may have left: got %v", got)
			}
		})
	}
}
