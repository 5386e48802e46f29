package token

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token/wire"
)

// A lockedBuffer is read while a timer may write to it.
type lockedBuffer struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.String()
}

// What a module has logged again and again is a few lines and a count.
func TestFolding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		f := newFolding(slog.NewTextHandler(&out, nil))
		log := slog.New(f).With("module", "m")
		for i := range 1000 {
			log.Warn("it lies", "n", i)
			log.With("token", "x").Warn("it lies", "n", i)
			log.Info("it works", "n", i)
		}
		log.Warn("something else")
		count := func(text string) int { return strings.Count(out.String(), text) }
		if n := count("it lies"); n != foldBurst {
			t.Errorf("%d lines of one kind, want %d", n, foldBurst)
		}
		if n := count("something else"); n != 1 {
			t.Errorf("%d lines of another kind, want 1", n)
		}
		if n := count("it works"); n != 1000 {
			t.Errorf("%d lines that are no warnings, want all", n)
		}
		time.Sleep(foldWindow)
		synctest.Wait()
		if !strings.Contains(out.String(), fmt.Sprintf(`msg="it lies" module=m token=x "more like this"=%d within=1m0s`, 2000-foldBurst)) {
			t.Errorf("no count: %s", out.String())
		}
		log.Warn("it lies", "n", "again")
		if count("n=again") != 1 {
			t.Error("after the window nothing is logged")
		}
		for range 10 {
			log.Warn("it lies")
		}
		f.close()
		if !strings.Contains(out.String(), `"more like this"=6`) {
			t.Error("the end does not tell what was folded")
		}
		log.Warn("it lies", "n", "late")
		if count("n=late") != 1 {
			t.Error("after the end it is folded")
		}
	})
}

// What is refused through one module is known through all, and each forgets its own.
func TestPhysical(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pin := func(text string) *secret.Secret {
			s, err := secret.From([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Wipe)
			return s
		}
		ps := &physicals{all: make(map[wire.TokenID]*physical)}
		id := wire.TokenID{Label: "card"}
		a, b := newGate(ps.take(id), "a"), newGate(ps.take(id), "b")
		a.refuse(pin("one"), TriesLow)
		b.refuse(pin("two"), TriesUnknown)
		known := func(what string, one, two bool) {
			t.Helper()
			for _, g := range []*gate{a, b} {
				tries := map[*gate]Tries{a: TriesLow, b: TriesUnknown}[g]
				if g.wasRefused(pin("one"), tries) != one || g.wasRefused(pin("two"), tries) != two {
					t.Errorf("%s, through %s: want %v, %v", what, g.module, one, two)
				}
			}
		}
		known("at first", true, true)
		b.forgive()
		known("after a right PIN through b", true, false)
		b.refuse(pin("two"), TriesLast)
		if !b.wasRefused(pin("one"), TriesUnknown) {
			t.Error("other tries through b make the agent forget what was refused through a")
		}
		known("after that", true, false)
		time.Sleep(refusalLasts)
		synctest.Wait()
		known("a minute later", false, false)

		a.refuse(pin("one"), TriesLow)
		ps.drop(id)
		known("with one user left", true, false)
		ps.drop(id)
		if len(ps.all) != 0 || len(a.physical.refused) != 0 {
			t.Error("it is there without users")
		}
		// One turn for both.
		if err := a.take(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if b.take(ctx) == nil {
			t.Error("two have the turn")
		}
		b.close()
		a.give()
		if err := b.take(t.Context()); err != ErrAbsent { //nolint:errorlint // it is that one
			t.Errorf("a closed gate: %v", err)
		}
	})
}
