package login1_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer/proctest"
	"p11-agent/systemd/bus/bustest"
	"p11-agent/systemd/login1"
)

const me = 4711

// watched has a running Watch, the calls that the Watch makes, and its logind.
type watched struct {
	*login1.Watch
	bus    *bustest.Bus
	logind *bustest.Login1
	events chan string
	sleep  func(ctx context.Context) // nil: nothing is to be done

	log logtest.Buffer
}

func (w *watched) said(text string) bool { return strings.Contains(w.log.String(), text) }

func (w *watched) run(t *testing.T) {
	t.Helper()
	w.events = make(chan string, 100)
	w.Watch = login1.New(login1.Options{
		Bus: w.bus.Address(), UID: me,
		Sleep: func(ctx context.Context) {
			if w.sleep != nil {
				w.sleep(ctx)
			}
			w.events <- "sleep"
		},
		Wake: func(context.Context) { w.events <- "wake" },
		Lock: func(context.Context) { w.events <- "lock" },
		Log:  slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

func (w *watched) want(t *testing.T, events ...string) {
	t.Helper()
	for _, want := range events {
		select {
		case got := <-w.events:
			if got != want {
				t.Fatalf("%q happened, want %q", got, want)
			}
		case <-time.After(proctest.Patience):
			t.Fatalf("it did not happen: %q", want)
		}
	}
}

func newWatched(t *testing.T, delay bool) *watched {
	t.Helper()
	bustest.NoLeaks(t, proctest.Methods[login1.Watch]())
	w := &watched{bus: bustest.Start(t)}
	w.logind = w.bus.Login1()
	w.logind.AddSession("mine", me, false)
	w.logind.AddSession("other", me+1, false)
	w.run(t)
	w.Delay(delay)
	proctest.Until(t, "it listens", func() bool { return w.said("listening to logind") })
	if delay { // logind holds before the watch does, and a test that ends in between leaves a file
		proctest.Until(t, "sleep is delayed", func() bool { return w.said("sleep waits") })
	}
	return w
}

// Each sleep waits for Options.Sleep.
func TestSleep(t *testing.T) {
	w := newWatched(t, true)
	held := make(chan int, 2)
	w.sleep = func(context.Context) { held <- w.logind.Held() }
	for range 2 {
		proctest.Until(t, "sleep is delayed", func() bool { return w.logind.Held() == 1 })
		w.logind.Sleep(true)
		w.want(t, "sleep")
		if n := <-held; n != 1 {
			t.Errorf("it was called with %d delays", n)
		}
		proctest.Until(t, "sleep goes on", func() bool { return w.logind.Held() == 0 })
		w.logind.Sleep(false)
		w.want(t, "wake")
	}
	if got := w.logind.Asked()[0]; got != `["sleep" "p11-agent" "log out of tokens" "delay"]` {
		t.Errorf("it asked for %s", got)
	}
}

// If logind refuses to delay sleep, the Watch asks again. The second refusal causes a
// warning.
func TestDelayRefused(t *testing.T) {
	bustest.NoLeaks(t, proctest.Methods[login1.Watch]())
	w := &watched{bus: bustest.Start(t)}
	w.logind = w.bus.Login1()
	w.logind.Refuse(true)
	w.run(t)
	w.Delay(true)
	proctest.Until(t, "a warning is logged", func() bool { return w.said("level=WARN") })
	w.logind.Refuse(false)
	proctest.Until(t, "sleep is delayed", func() bool { return w.said("sleep waits") })
	if n := w.logind.Refused(); n < 2 {
		t.Errorf("the warning came with refusal %d", n)
	}
}

// If Options.Sleep takes too long, sleep does not wait for it, even if it ignores its
// context.
func TestSleepBound(t *testing.T) {
	for name, obeys := range map[string]bool{"that ends": true, "that does not end": false} {
		t.Run(name, func(t *testing.T) {
			w := newWatched(t, true)
			release := make(chan struct{})
			w.sleep = func(ctx context.Context) {
				if obeys {
					<-ctx.Done()
				} else {
					<-release
				}
			}
			w.logind.Sleep(true)
			proctest.Until(t, "sleep goes on", func() bool { return w.logind.Held() == 0 })
			close(release)
			w.want(t, "sleep")
		})
	}
}

// Without Delay, the Watch does not delay sleep.
func TestNoDelay(t *testing.T) {
	w := newWatched(t, false)
	w.logind.Sleep(true)
	w.want(t, "sleep")
	if n := len(w.logind.Asked()); n > 0 {
		t.Errorf("sleep was delayed %d times", n)
	}
	w.logind.Sleep(false)
	w.want(t, "wake")
	w.Delay(true)
	proctest.Until(t, "sleep is delayed", func() bool { return w.logind.Held() == 1 })
	w.Delay(false)
	proctest.Until(t, "sleep is not delayed any more", func() bool { return w.logind.Held() == 0 })
}

// If Delay comes after the beginning of sleep, it does not delay that sleep.
func TestDelayTooLate(t *testing.T) {
	w := newWatched(t, false)
	w.logind.Sleep(true)
	w.want(t, "sleep")
	w.Delay(true)
	w.logind.Lock("mine") // comes after that, or before: both are right
	w.want(t, "lock")
	w.Delay(true)
	w.logind.Lock("mine")
	w.want(t, "lock")
	if n := len(w.logind.Asked()); n > 0 {
		t.Errorf("sleep was delayed %d times", n)
	}
	w.logind.Sleep(false)
	w.want(t, "wake")
	proctest.Until(t, "the next sleep is delayed", func() bool { return w.logind.Held() == 1 })
}

func TestLock(t *testing.T) {
	w := newWatched(t, false)
	w.logind.Lock("mine")
	w.want(t, "lock")
	w.logind.SetLocked("mine", true)
	w.want(t, "lock")
	w.logind.SetLocked("mine", false)
	w.logind.Lock("other")
	w.logind.SetLocked("other", true)
	w.logind.Sleep(false) // comes after those
	w.want(t, "wake")
	w.logind.Lock("unknown") // logind does not name the user of this session
	w.want(t, "lock")
}

// The Watch believes only logind.
func TestLiar(t *testing.T) {
	w := newWatched(t, true)
	liar := w.bus.Connect()
	var names []string
	if err := liar.BusObject().Call("org.freedesktop.DBus.ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	for _, name := range names { // to each connection by its name, which needs no match
		if !strings.HasPrefix(name, ":") {
			continue
		}
		for path, signal := range map[string]struct {
			name string
			body []any
		}{
			"/org/freedesktop/login1":              {"org.freedesktop.login1.Manager.PrepareForSleep", []any{true}},
			"/org/freedesktop/login1/session/mine": {"org.freedesktop.login1.Session.Lock", nil},
			"/org/freedesktop/DBus":                {"org.freedesktop.DBus.NameOwnerChanged", []any{"org.freedesktop.login1", "", liar.Names()[0]}},
		} {
			bustest.SendTo(liar, name, path, signal.name, signal.body)
		}
	}
	// The call uses the same connection as the lies, so that it comes after them.
	if err := liar.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil {
		t.Fatal(err)
	}
	w.logind.Sleep(false)
	w.want(t, "wake")
}

// The Watch waits for the bus and for logind. When logind is back, the Watch finds a
// screen that was locked in the meantime.
func TestComesAndGoes(t *testing.T) {
	bustest.NoLeaks(t, proctest.Methods[login1.Watch]())
	w := &watched{bus: bustest.Start(t)}
	w.bus.Kill()
	w.run(t)
	w.Delay(true)
	proctest.Until(t, "it is said once", func() bool { return w.said("not heard of") })
	w.bus.Restart()
	proctest.Until(t, "logind is missed", func() bool { return w.said("logind is not there") })
	w.logind = w.bus.Login1()
	w.logind.AddSession("mine", me, false)
	w.logind.AddSession("other", me+1, true)
	proctest.Until(t, "sleep is delayed", func() bool { return w.logind.Held() == 1 })
	// The screen is locked while no logind runs.
	w.logind.Stop()
	w.logind.AddSession("mine", me, true)
	w.logind.Start()
	w.want(t, "lock")
	proctest.Until(t, "sleep is delayed again", func() bool { return len(w.logind.Asked()) == 2 && w.logind.Held() == 1 })
	w.bus.Kill()
	proctest.Until(t, "the delay ends with the bus", func() bool { return w.logind.Held() == 0 })
	w.bus.Restart()
	w.logind.Start()
	w.want(t, "lock")
	proctest.Until(t, "sleep is delayed again", func() bool { return w.logind.Held() == 1 })
	w.logind.Sleep(true)
	w.want(t, "sleep")
	if w.said("level=INFO") || w.said("level=WARN") {
		t.Errorf("it is not silent: %s", &w.log)
	}
}

// A child of the agent must not inherit the file that delays sleep.
func TestNotInherited(t *testing.T) {
	before := pipes()
	w := newWatched(t, true)
	found := 0
	for fd := range pipes() {
		if before[fd] {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("file %d is inherited (%v)", fd, err)
		}
		found++
	}
	if held := w.logind.Held(); found < 2 || held != 1 { // one end is ours, the other logind's
		t.Errorf("%d pipes, %d delays", found, held)
	}
}

// pipes returns the files of this process that are pipes.
func pipes() map[int]bool {
	all := make(map[int]bool)
	for fd := range 1000 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
			all[fd] = true
		}
	}
	return all
}
