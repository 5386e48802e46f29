package token

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// A request that meets a card being pulled has 5 s, of which pcscd takes noticeTime and a
// new process as much again.
func TestPulledBounds(t *testing.T) {
	if all := noticeTime + goneTimeout + othersTimeout + noticeTime; all > 5*time.Second {
		t.Errorf("the bounds add up to %v", all)
	}
	if all := noticeTime + newcomerTimeout + noticeTime; all > 5*time.Second {
		t.Errorf("the bounds with a new card add up to %v", all)
	}
	if all := noticeTime + backTimeout; all > 5*time.Second {
		t.Errorf("a request waits for %v for its card to be back", all)
	}
}

// What is under way with a card that has gone, and with the module, has little time left.
// Work for a card that is there makes that longer, when it began before. After an answer
// all is as before.
func TestHurry(t *testing.T) {
	gone, there := wire.TokenID{Label: "gone"}, wire.TokenID{Label: "there"}
	for _, tt := range []struct {
		name    string
		ask     wire.TokenID // zero: the module
		after   bool         // the request comes when the card has gone already
		other   bool         // there is work for the other card
		calm    bool         // the module has answered
		back    bool         // the card is back
		listing time.Duration
		want    time.Duration // from when pcscd tells that the card has gone
	}{
		{name: "about the card", ask: gone, listing: goneTimeout, want: goneTimeout},
		{name: "about the card, as the module tells", ask: gone, want: goneTimeout},
		{name: "about the card, later", ask: gone, after: true, want: goneTimeout},
		{name: "about the card, which is back", ask: gone, after: true, back: true, want: listTimeout},
		{name: "about the slots", listing: goneTimeout, want: goneTimeout},
		{name: "about the slots, later", after: true, listing: goneTimeout, want: goneTimeout},
		{name: "about the slots, with a new card", after: true, listing: newcomerTimeout, want: newcomerTimeout},
		{name: "about the slots, later and calm", after: true, calm: true, listing: goneTimeout, want: listTimeout},
		{name: "about the card, and the other one works", ask: gone, other: true, listing: goneTimeout, want: goneTimeout + othersTimeout},
		{name: "about the other card", ask: there, listing: goneTimeout, want: listTimeout - time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeProcess(t, func(*wire.ModuleConn, wire.Request) {})
				ask := func(id wire.TokenID) <-chan error {
					failed := make(chan error, 1)
					go func() {
						if id == (wire.TokenID{}) {
							failed <- p.call(t.Context(), listTimeout, wire.TypeSlots, &wire.Slots{}, new(wire.SlotsReply))
							return
						}
						failed <- p.call(t.Context(), listTimeout, wire.TypeToken, &wire.Token{Token: id}, new(wire.TokenReply))
					}()
					synctest.Wait()
					return failed
				}
				p.mu.Lock()
				p.queueLocked(gone)
				p.mu.Unlock()
				if tt.other {
					ask(there)
				}
				var failed <-chan error
				time.Sleep(noticeTime)
				if !tt.after {
					failed = ask(tt.ask)
				}
				time.Sleep(time.Second)
				began := time.Now()
				p.hurry([]wire.TokenID{gone}, tt.listing)
				if tt.calm {
					p.calm()
				}
				if tt.back {
					p.forgetQueues([]*Token{{ID: gone}})
				}
				if tt.after {
					failed = ask(tt.ask)
				}
				err := <-failed
				if took := time.Since(began); took != tt.want {
					t.Errorf("it was given %v, want %v", took, tt.want)
				}
				if hung, _ := errors.AsType[*hungError](err); pulled(err) == (hung != nil) || (hung != nil) != (tt.want > 5*time.Second) {
					t.Errorf("the reason: %v", err)
				}
			})
		})
	}
}

// Only what is known to have stayed in its reader keeps its PIN.
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
		{"somebody uses it", wire.Slot{Description: "one", Flags: wire.CKFRemovableDevice}, []pcsc.Reader{{Name: "one", Card: true, Events: 1, Users: 1}, two}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := []pcsc.Reader{one, two}
			if got := anyLeft(before, tt.now); got != tt.any {
				t.Errorf("a card has left: got %v", got)
			}
			if got := anyLeft(before, tt.now) && (&Token{slot: tt.slot}).mayHaveLeft(before, tt.now); got != tt.left {
				t.Errorf("this one may have left: got %v", got)
			}
		})
	}
}
