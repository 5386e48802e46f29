package notify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fakeDisplay records the notifications.
type fakeDisplay struct {
	mu        sync.Mutex
	shown     []string // in order; an empty text: the notification was hidden
	connects  int
	closes    int
	err       error
	slow      time.Duration
	dismiss   chan struct{}
	vanish    chan struct{}
	connected bool
}

func (d *fakeDisplay) show(ctx context.Context, title string, lines []string) error {
	select {
	case <-time.After(d.slow): // set before anything is shown
	case <-ctx.Done():
		return ctx.Err()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	d.shown = append(d.shown, strings.Join(append([]string{title}, lines...), "|"))
	return nil
}

func (d *fakeDisplay) hide(context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shown = append(d.shown, "")
}

func (d *fakeDisplay) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.connected, d.closes = false, d.closes+1
}

func (d *fakeDisplay) dismissed() <-chan struct{} { return d.dismiss }

func (d *fakeDisplay) gone() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.vanish
}

func (d *fakeDisplay) change(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *fakeDisplay) number() (n int) {
	d.change(func() { n = d.connects })
	return n
}

func (d *fakeDisplay) isConnected() (yes bool) {
	d.change(func() { yes = d.connected })
	return yes
}

// timeline has a Notifier with a fakeDisplay, in a synctest bubble.
type timeline struct {
	*testing.T
	*Notifier
	d *fakeDisplay
}

func inTime(t *testing.T, f func(t *timeline)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := New(Options{Title: "T", After: time.Second, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		d := &fakeDisplay{dismiss: make(chan struct{}), vanish: make(chan struct{})}
		n.connect = func(context.Context) (display, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.connects++
			d.connected = true
			return d, nil
		}
		f(&timeline{t, n, d})
		n.Close()
		if d.connected || d.closes != d.connects {
			t.Errorf("%d connections, %d closed", d.connects, d.closes)
		}
	})
}

// use begins to use a device.
func (t *timeline) use(device any, text string) (done func()) {
	return t.Begin(device, func() []string { return []string{text} })
}

func (t *timeline) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (t *timeline) want(when string, want ...string) {
	t.Helper()
	synctest.Wait()
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	if got := strings.Join(t.d.shown, " / "); got != strings.Join(want, " / ") {
		t.Errorf("%s: shown %q, want %q", when, got, strings.Join(want, " / "))
	}
}

// passed forgets the notifications between the first n and the last. The Notifier may show
// them in passing, while many uses end.
func (t *timeline) passed(n int) {
	synctest.Wait()
	t.d.change(func() {
		if last := len(t.d.shown) - 1; last > n {
			t.d.shown = append(t.d.shown[:n], t.d.shown[last])
		}
	})
}

func TestAfter(t *testing.T) {
	inTime(t, func(t *timeline) {
		done := t.use(1, "a")
		t.wait(time.Second - 1)
		t.want("just before")
		done()
		t.wait(time.Hour)
		t.want("after the end")
		if t.d.number() != 0 {
			t.Error("it connects for nothing")
		}
		done = t.use(1, "b")
		t.wait(time.Second)
		t.want("just then", "T|b")
		if !t.d.isConnected() {
			t.Error("it has no connection while something is shown")
		}
		t.wait(time.Hour)
		t.want("an hour later", "T|b")
		done()
		t.want("after the end", "T|b", "")
		if t.d.isConnected() {
			t.Error("it keeps its connection")
		}
		t.use(1, "c")()
		done = t.use(1, "d")
		t.wait(time.Second)
		t.want("the next time", "T|b", "", "T|d")
		done()
		t.want("the end of that", "T|b", "", "T|d", "")
	})
}

// Fifty uses wait for a device. They share a notification, which is about the use that has
// waited the longest.
func TestOneForAll(t *testing.T) {
	inTime(t, func(t *timeline) {
		var done []func()
		for i := range 50 {
			done = append(done, t.use(1, fmt.Sprint(i)))
		}
		t.wait(time.Second)
		t.want("at first", "T|0|50 signatures are waiting.")
		for _, end := range done[:48] {
			end()
		}
		t.passed(1)
		t.want("two are left", "T|0|50 signatures are waiting.", "T|48|2 signatures are waiting.")
		done[49]()
		t.want("one is left", "T|0|50 signatures are waiting.", "T|48|2 signatures are waiting.", "T|48")
		done[48]()
		t.want("none is left", "T|0|50 signatures are waiting.", "T|48|2 signatures are waiting.", "T|48", "")
		if c := t.d.number(); c != 1 {
			t.Errorf("%d connections", c)
		}
	})
}

// If a device finishes some uses, it is slow, and does not wait for a touch.
func TestSlowDevice(t *testing.T) {
	inTime(t, func(t *timeline) {
		other := t.use(2, "touch")
		var done []func()
		for range 20 {
			done = append(done, t.use(1, "busy"))
		}
		for _, end := range done[:10] {
			t.wait(time.Second * 9 / 10)
			end()
		}
		t.want("another one is not busy", "T|touch")
		other()
		t.want("that is over", "T|touch", "")
		t.wait(time.Second)
		t.want("it is stuck now", "T|touch", "", "T|busy|10 signatures are waiting.")
		for _, end := range done[10:] {
			end()
		}
		t.passed(3)
		t.want("at last", "T|touch", "", "T|busy|10 signatures are waiting.", "")
	})
}

func TestDismissed(t *testing.T) {
	inTime(t, func(t *timeline) {
		one, two := t.use(1, "a"), t.use(1, "b")
		t.wait(time.Second)
		t.d.dismiss <- struct{}{}
		one()
		t.wait(time.Hour)
		t.want("while something waits", "T|a|2 signatures are waiting.")
		two()
		t.want("nothing waits", "T|a|2 signatures are waiting.", "")
		three := t.use(1, "c")
		t.wait(time.Second)
		t.want("the next time", "T|a|2 signatures are waiting.", "", "T|c")
		three()
	})
}

// If a use ends before its notification appears, the notification does not stay.
func TestSlowDisplay(t *testing.T) {
	inTime(t, func(t *timeline) {
		t.d.slow = time.Minute
		done := t.use(1, "a")
		t.wait(2 * time.Second)
		done() // does not wait
		t.want("it is not shown yet")
		t.wait(time.Minute)
		t.want("it is shown", "T|a", "")
	})
}

func TestNoDisplay(t *testing.T) {
	inTime(t, func(t *timeline) {
		t.d.change(func() { t.d.err = errors.New("broken") })
		one, two := t.use(1, "a"), t.use(1, "b")
		t.wait(time.Second)
		one()
		t.wait(time.Hour)
		if c := t.d.number(); c != 1 {
			t.Errorf("it was tried %d times", c)
		}
		two()
		t.d.change(func() { t.d.err = nil })
		three := t.use(1, "c")
		t.wait(time.Second)
		t.want("the next time", "T|c")
		// If the display has gone, the Notifier looks for it at the next use.
		t.d.change(func() {
			close(t.d.vanish)
			t.d.vanish = make(chan struct{})
		})
		four := t.use(1, "d")
		t.wait(time.Second)
		t.want("a new one", "T|c", "T|c|2 signatures are waiting.")
		if c := t.d.number(); c != 3 {
			t.Errorf("it was tried %d times", c)
		}
		three()
		four()
	})
}

func TestOff(t *testing.T) {
	inTime(t, func(t *timeline) {
		t.SetAfter(0)
		done := t.use(1, "a")
		t.wait(time.Hour)
		t.want("switched off")
		t.SetAfter(time.Minute)
		t.wait(time.Hour)
		t.want("what was going on")
		done()
		done = t.use(1, "b")
		t.SetAfter(0)
		t.wait(time.Minute)
		t.want("switched off in between", "T|b")
		done()
	})
}

// Close removes the notification. It waits closeGrace at most.
func TestClose(t *testing.T) {
	for name, slow := range map[string]time.Duration{"shown": 0, "stuck": time.Hour} {
		t.Run(name, func(t *testing.T) {
			inTime(t, func(t *timeline) {
				t.d.slow = slow
				done := t.use(1, "a")
				t.wait(2 * time.Second)
				start := time.Now()
				t.Close()
				if slow == 0 {
					t.want("closed", "T|a", "")
				} else {
					t.want("closed")
				}
				if d := time.Since(start); d > closeGrace {
					t.Errorf("it takes %v", d)
				}
				done()
				t.use(1, "b")()
				t.use(1, "c")
				t.wait(time.Hour)
			})
		})
	}
}

// After the end of a use, its memory may serve another purpose. about does not read it then.
func TestMemory(t *testing.T) {
	inTime(t, func(t *timeline) {
		memory := "mine"
		one := t.Begin(1, func() []string { return []string{memory} })
		two := t.Begin(1, func() []string { return []string{memory} })
		t.wait(time.Second)
		one()
		memory = "changed"
		two()
		memory = "of another test" // would be a race
		t.want("afterwards", "T|mine|2 signatures are waiting.", "")
	})
}

func TestLines(t *testing.T) {
	inTime(t, func(t *timeline) {
		done := t.Begin(1, func() []string {
			return []string{"a\x1b[1m\nb\x00\u202ec\xff", strings.Repeat("ü", 200), "3", "4", "5", "6", "7"}
		})
		t.wait(time.Second)
		t.want("", `T|a\x1b[1m b\x00\u202ec`+"\uFFFD|"+strings.Repeat("ü", 159)+"…|3|4|5|6")
		done()
	})
}
