package process

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// TestHurry checks the time for requests about a card that has left, and about the module. Work for another card that
// began before makes the time longer. After an answer, requests have their normal time.
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
		{name: "about the card", ask: gone, listing: GoneTimeout, want: GoneTimeout},
		{name: "about the card, as the module tells", ask: gone, want: GoneTimeout},
		{name: "about the card, later", ask: gone, after: true, want: GoneTimeout},
		{name: "about the card, which is back", ask: gone, after: true, back: true, want: ListTimeout},
		{name: "about the slots", listing: GoneTimeout, want: GoneTimeout},
		{name: "about the slots, later", after: true, listing: GoneTimeout, want: GoneTimeout},
		{name: "about the slots, with a new card", after: true, listing: 2 * time.Second, want: 2 * time.Second},
		{name: "about the slots, later and calm", after: true, calm: true, listing: GoneTimeout, want: ListTimeout},
		{name: "about the card, and the other one works", ask: gone, other: true, listing: GoneTimeout, want: GoneTimeout + OthersTimeout},
		{name: "about the other card", ask: there, listing: GoneTimeout, want: ListTimeout - time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeProcess(t, func(*wire.ModuleConn, wire.Request) {})
				ask := func(id wire.TokenID) <-chan error {
					failed := make(chan error, 1)
					go func() {
						if id == (wire.TokenID{}) {
							failed <- p.Call(t.Context(), ListTimeout, wire.TypeSlots, &wire.Slots{}, new(wire.SlotsReply))
							return
						}
						failed <- p.Call(t.Context(), ListTimeout, wire.TypeToken, &wire.Token{Token: id}, new(wire.TokenReply))
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
				time.Sleep(pcsc.NoticeTime)
				if !tt.after {
					failed = ask(tt.ask)
				}
				time.Sleep(time.Second)
				began := time.Now()
				p.Hurry([]wire.TokenID{gone}, tt.listing)
				if tt.calm {
					p.Calm()
				}
				if tt.back {
					p.ForgetQueues(func(id wire.TokenID) bool { return id == gone })
				}
				if tt.after {
					failed = ask(tt.ask)
				}
				err := <-failed
				if took := time.Since(began); took != tt.want {
					t.Errorf("it was given %v, want %v", took, tt.want)
				}
				if hung, _ := errors.AsType[*HungError](err); errors.Is(err, ErrPulled) == (hung != nil) || (hung != nil) != (tt.want > 5*time.Second) {
					t.Errorf("the reason: %v", err)
				}
			})
		})
	}
}
