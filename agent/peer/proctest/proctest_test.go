package proctest

import (
	"os"
	"strings"
	"testing"
)

type waiter struct{ c chan struct{} }

func (w *waiter) wait() { <-w.c }

func TestGoroutines(t *testing.T) {
	w := &waiter{make(chan struct{})}
	waiting := func(g Goroutine) bool { return g.State == "chan receive" && g.In((*waiter).wait) }
	if n := Count(waiting); n != 0 {
		t.Errorf("%d goroutines wait before", n)
	}
	NoLeaks(t, Methods[waiter]())
	t.Cleanup(func() { close(w.c) })
	go w.wait()
	Until(t, "a goroutine waits", func() bool { return Count(waiting) == 1 })
	if n := Count(func(g Goroutine) bool {
		return g.Runs((*waiter).wait) && strings.Contains(g.Stack, MethodsOf[waiter]()+"wait(")
	}); n != 1 {
		t.Errorf("%d goroutines run the method", n)
	}
}

func TestFiles(t *testing.T) {
	before := Files(t, os.Getpid(), "pipe:")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if n := Files(t, os.Getpid(), "pipe:"); n != before+2 {
		t.Errorf("%d pipes after %d", n, before)
	}
	if Files(t, os.Getpid()) < before+2 {
		t.Error("there are fewer files than pipes")
	}
}

// CountOf counts the goroutines of a test, and not those of another test.
func TestCountOf(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	t.Run(`one of "them"`, func(t *testing.T) {
		Mark(t)
		for range 3 {
			go wait(block)
		}
	})
	t.Run("other", func(t *testing.T) {
		Mark(t)
		for range 2 {
			go wait(block)
		}
		waits := func(g Goroutine) bool { return g.Runs(wait) }
		Until(t, "two goroutines wait", func() bool { return CountOf(t, waits) == 2 })
		if n := CountOf(t, func(g Goroutine) bool { return g.Runs(CountOf) }); n != 1 {
			t.Errorf("got %d goroutines that count, want 1", n)
		}
	})
}

func wait(c chan struct{}) { <-c }
