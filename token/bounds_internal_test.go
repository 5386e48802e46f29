package token

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A lockedBuffer is a buffer that a goroutine may read while a timer writes to it.
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

// If the agent logs the same warning of a module again and again, the log has a few lines and a
// count.
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
