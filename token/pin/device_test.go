package pin

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/wire"
)

// What is refused through one module is known through all, and each forgets its own.
func TestDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ds := NewDevices()
		id := wire.TokenID{Label: "card"}
		a, b := ds.Open(id, "a"), ds.Open(id, "b")
		a.refuse(secrettest.Of(t, "one"), TriesLow)
		b.refuse(secrettest.Of(t, "two"), TriesUnknown)
		known := func(what string, one, two bool) {
			t.Helper()
			for _, g := range []*State{a, b} {
				tries := map[*State]Tries{a: TriesLow, b: TriesUnknown}[g]
				if g.wasRefused(secrettest.Of(t, "one"), tries) != one || g.wasRefused(secrettest.Of(t, "two"), tries) != two {
					t.Errorf("%s, through %s: want %v, %v", what, g.module, one, two)
				}
			}
		}
		known("at first", true, true)
		b.forgetRefusals()
		known("after a right PIN through b", true, false)
		b.refuse(secrettest.Of(t, "two"), TriesLast)
		if !b.wasRefused(secrettest.Of(t, "one"), TriesUnknown) {
			t.Error("other tries through b make the agent forget what was refused through a")
		}
		known("after that", true, false)
		time.Sleep(refusalLasts)
		synctest.Wait()
		known("a minute later", false, false)

		a.refuse(secrettest.Of(t, "one"), TriesLow)
		ds.drop(id)
		known("with one user left", true, false)
		ds.drop(id)
		if ds.Len() != 0 || len(a.device.refused) != 0 {
			t.Error("it is there without users")
		}
		// One turn for both.
		if err := a.takeTurn(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if b.takeTurn(ctx, false) == nil {
			t.Error("two have the turn")
		}
		b.closed.Store(true)
		a.endTurn()
		if err := b.takeTurn(t.Context(), false); err != ErrForgotten { //nolint:errorlint // it is that one
			t.Errorf("a closed state: %v", err)
		}
	})
}
