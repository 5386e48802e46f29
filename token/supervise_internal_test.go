package token

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoff(t *testing.T) {
	var b backoff
	var all []time.Duration
	for range 12 {
		all = append(all, b.next(time.Second))
	}
	if all[0] != restartMin || all[1] != 2*restartMin || all[11] != restartMax {
		t.Errorf("pauses %v", all)
	}
	if got := b.next(healthyAfter + 1); got != restartMin {
		t.Errorf("after a long life: %v", got)
	}
}

// The pause ends when it is over, or when a caller asks for a look.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &module{wanted: make(chan *lookup), poked: make(chan struct{}, 1)}
		start := time.Now()
		m.poked <- struct{}{} // a list of keys does not end the pause
		if due := m.pause(t.Context(), restartMax); len(due) != 0 || time.Since(start) != restartMax {
			t.Errorf("%d looks after %v", len(due), time.Since(start))
		}
		l := &lookup{done: make(chan error, 1)}
		go func() {
			time.Sleep(time.Second)
			m.wanted <- l
		}()
		start = time.Now()
		if due := m.pause(t.Context(), restartMax); len(due) != 1 || due[0] != l || time.Since(start) != time.Second {
			t.Errorf("%d looks after %v", len(due), time.Since(start))
		}
	})
}
