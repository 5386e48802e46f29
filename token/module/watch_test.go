package module

import (
	"errors"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// If a module reports events, the process does not poll it.
func TestWait(t *testing.T) {
	b := startBad(t, "wait slots=2 present=2")
	if !b.hello(tokentest.BuildBadModule(t)).Waits {
		t.Error("it is not said that the module tells of changes")
	}
	// The calls report two cards that were there, then nothing more. The last call waits.
	b.waitForCall("C_WaitForSlotEvent", 4)
	b.slots(false)
	if len(b.events) > 0 {
		t.Error("what was there from the start is told of as new")
	}
	lists, infos := b.calls("C_GetSlotList"), b.calls("C_GetTokenInfo")
	for _, commands := range []string{
		"wait slots=2 present=1", "wait slots=2 present=0", "wait slots=2 present=1", "wait slots=2 present=2",
	} {
		b.command(commands)
		b.event()
	}
	// Each event costs two lists of two calls. One more look may come from pollBeside.
	if n := b.calls("C_GetSlotList") - lists; n > 5*4 {
		t.Errorf("%d calls of C_GetSlotList for four events", n)
	}
	if n := b.calls("C_GetTokenInfo") - infos; n > 0 {
		t.Errorf("%d calls of C_GetTokenInfo: the cards are disturbed", n)
	}
}

// If a card replaces another, no list of slots shows it.
func TestWaitReplaced(t *testing.T) {
	b := startBad(t, "wait")
	b.hello(tokentest.BuildBadModule(t))
	b.slots(false)
	b.command("wait=storm")
	b.event()
}

func TestWaitFlagless(t *testing.T) {
	t.Parallel() // it takes the 5 s after which a call counts as waiting
	b := startBad(t, "wait=flagless")
	if !b.hello(tokentest.BuildBadModule(t)).Waits {
		t.Error("it is not said that the module tells of changes")
	}
	b.slots(false)
	b.command("wait=flagless present=0")
	b.event()
}

// The process notices changes even if the module loses events.
func TestWaitDeaf(t *testing.T) {
	t.Parallel() // it takes the 20 s of pollBeside
	b := startBad(t, "wait=deaf")
	b.hello(tokentest.BuildBadModule(t))
	b.slots(false)
	b.command("wait=deaf present=0")
	b.event()
}

// The process notices a module that does one thing at a time, before any request. The
// next process does not wait in that module.
func TestWaitOneAtATime(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	b := startBad(t, "wait serial")
	err := b.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: module}, new(wire.HelloReply))
	wantReason(t, err, wire.ReasonOneAtATime)

	b = startBad(t, "wait serial")
	reply := new(wire.HelloReply)
	if err := b.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: module, Poll: true}, reply); err != nil || reply.Waits {
		t.Fatalf("%+v, %v", reply, err)
	}
	b.slots(false)
	b.command("wait serial present=0")
	b.event()
	if n := b.calls("C_WaitForSlotEvent"); n > 0 {
		t.Errorf("%d calls of C_WaitForSlotEvent", n)
	}
}

// A wait that fails at once does no harm. The process tries it again after a change.
func TestWaitFailsAtOnce(t *testing.T) {
	const fails = "wait rv=C_WaitForSlotEvent:0x5"
	b := startBad(t, fails+" slots=0")
	if b.hello(tokentest.BuildBadModule(t)).Waits {
		t.Error("the module is said to tell of changes")
	}
	b.slots(false)
	b.command(fails + " slots=1")
	b.event()
	waits := b.calls("C_WaitForSlotEvent")
	b.command("wait slots=2")
	b.event()
	b.waitForCall("C_WaitForSlotEvent", waits+3)
	b.command("wait slots=2 present=1")
	b.event()
	if len(b.lost) > 0 {
		t.Errorf("it gives up: %v", <-b.lost)
	}
}

// If a wait fails after it has worked, the process reports it without a request.
func TestWaitFailsLater(t *testing.T) {
	b := startBad(t, "wait")
	b.hello(tokentest.BuildBadModule(t))
	b.slots(false)
	b.command("wait rv=C_WaitForSlotEvent:0x5")
	if e := b.end(); e.Function != "C_WaitForSlotEvent" || e.RV != wire.CKRGeneralError {
		t.Errorf("got %v", e)
	}
	b.slots(false) // the process answers until its end
}

func TestWaitCrashes(t *testing.T) {
	b := startBad(t, "wait present=0")
	b.hello(tokentest.BuildBadModule(t))
	b.command("wait crash=C_WaitForSlotEvent")
	b.wait()
	if ws := b.cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGSEGV {
		t.Errorf("the process ended with %v", b.cmd.ProcessState)
	}
}

// Reinitialize starts the module again, unless a thread waits in it. If one waits, the
// agent has to replace the process, and no call reaches the module any more.
func TestReinitializeBesideWait(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	t.Run("no request waits", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		b.slots(true)
		if i, f := b.calls("C_Initialize"), b.calls("C_Finalize"); i != 2 || f != 1 {
			t.Errorf("%d calls of C_Initialize and %d of C_Finalize", i, f)
		}
	})
	t.Run("a thread waits", func(t *testing.T) {
		b := startBad(t, "wait")
		b.hello(module)
		b.slots(false)
		b.waitForCall("C_WaitForSlotEvent", 3)
		wantReason(t, b.do(wire.TypeSlots, &wire.Slots{Reinitialize: true}, new(wire.SlotsReply)), wire.ReasonRenew)
		if e := b.end(); e.Reason != wire.ReasonRenew {
			t.Errorf("got %v", e)
		}
		late := b.send(wire.TypeLogin, &wire.Login{Token: badToken(0), PIN: secrettest.Of(t, "1234")})
		b.conn.Close()
		b.wait()
		if err := late.result(new(wire.TokenReply)); !errors.Is(err, errEnded) {
			t.Errorf("got %v", err)
		}
		if n := b.calls("C_Login") + b.calls("C_Finalize"); n != 0 {
			t.Error("the module was called")
		}
	})
	t.Run("a login lasts", func(t *testing.T) {
		b := startBad(t, "wait")
		b.ready(module)
		b.slots(true)
		if _, err := b.sign(badSign()); err != nil || len(b.lost) > 0 {
			t.Errorf("the login is gone: %v", err)
		}
	})
}

// The process notices that the module hangs even if it has no request.
func TestHungPoll(t *testing.T) {
	t.Parallel() // it takes the 20 s of hungAfter
	b := startBad(t, "release="+filepath.Join(t.TempDir(), "go"))
	b.hello(tokentest.BuildBadModule(t))
	b.slots(false)
	b.command("hang=C_GetSlotList")
	if e := b.end(); e.Function != "C_GetSlotList" {
		t.Errorf("got %v", e)
	}
}

func TestRhythm(t *testing.T) {
	start := time.Now()
	long := start.Add(time.Hour)
	ms := func(all ...int) (d []time.Duration) {
		for _, n := range all {
			d = append(d, time.Duration(n)*time.Millisecond)
		}
		return d
	}
	for _, tt := range []struct {
		name         string
		costs        []time.Duration
		now          time.Time
		waits, fixed bool
		want         time.Duration
	}{
		{"at first", nil, start, false, false, pollEvery},
		{"cheap", ms(1, 1, 1), long, false, false, pollEvery},
		{"slow", ms(100, 100, 100), long, false, false, 5 * time.Second},
		{"very slow", ms(5000, 5000, 5000), long, false, false, pollMost},
		{"slow but for once", ms(1, 3000, 3000), long, false, false, pollEvery},
		{"slow before", ms(3000, 3000, 1, 1, 1), long, false, false, pollEvery},
		{"nothing can be plugged in", ms(1), long, false, true, pollFixed},
		{"something just was", ms(1), start.Add(pollStill - 1), false, true, pollEvery},
		{"events are waited for", ms(1), long, true, false, pollBeside},
		{"events are waited for, slow", ms(500), long, true, false, 25 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRhythm(start)
			for _, c := range tt.costs {
				r.polled(start, c, false)
			}
			if got := r.pause(tt.now, tt.waits, tt.fixed); got != tt.want {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
	r := newRhythm(start)
	r.polled(long, time.Hour, true)
	if got := r.pause(long, false, true); got != pollEvery {
		t.Errorf("after a change: %v, want %v", got, pollEvery)
	}
}

// inBubble runs a waiter with its own clock. do stands for C_WaitForSlotEvent. call is
// the number of earlier calls.
func inBubble(t *testing.T, do func(w *eventWaiter, call int, block bool) error, changed func() bool, test func(w *eventWaiter, calls, told *atomic.Int64, lost *error)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWaiter()
		var calls, told atomic.Int64
		var lost error
		end := make(chan struct{})
		w.wait = func(block bool) error {
			select {
			case <-end:
				return &wire.Error{RV: wire.CKRFunctionNotSupported}
			default:
			}
			return do(w, int(calls.Add(1))-1, block)
		}
		w.changed, w.tell, w.lost, w.probe = changed, func() { told.Add(1) }, func(err error) { lost = err }, func() {}
		w.start()
		if err := w.settle(); err != nil {
			t.Error(err)
		}
		test(w, &calls, &told, &lost)
		close(end)
		time.Sleep(time.Hour)
		synctest.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.running {
			t.Error("the thread is left")
		}
	})
}

// If a module reports events without end that change nothing, the waiter calls it seldom,
// and seldom tells the agent.
func TestWaitStorm(t *testing.T) {
	inBubble(t, func(*eventWaiter, int, bool) error { return nil }, func() bool { return false },
		func(w *eventWaiter, calls, told *atomic.Int64, _ *error) {
			time.Sleep(time.Minute)
			before, toldBefore := calls.Load(), told.Load()
			time.Sleep(time.Hour)
			if n := calls.Load() - before; n < 3500 || n > 3700 {
				t.Errorf("%d calls in an hour", n)
			}
			if n := told.Load() - toldBefore; n < 50 || n > 70 {
				t.Errorf("told %d times in an hour", n)
			}
			if !w.owes() || w.owes() {
				t.Error("the last event is not told of once")
			}
		})
}

// The waiter tells the agent at once of each event that changes something.
func TestWaitQuickChanges(t *testing.T) {
	const n = 1000
	inBubble(t, func(_ *eventWaiter, call int, block bool) error {
		switch {
		case !block:
			return &wire.Error{RV: wire.CKRNoEvent}
		case call > n:
			time.Sleep(time.Minute)
		}
		return nil
	}, func() bool { return true }, func(_ *eventWaiter, calls, told *atomic.Int64, _ *error) {
		synctest.Wait()
		if calls.Load() != n+2 || told.Load() != n {
			t.Errorf("%d calls, told %d times", calls.Load(), told.Load())
		}
	})
}

// A wait may fail a few times in a row.
func TestWaitRecovers(t *testing.T) {
	general := &wire.Error{Function: "C_WaitForSlotEvent", RV: wire.CKRGeneralError}
	for _, tt := range []struct {
		name string
		bad  int // of ten calls
		lost bool
	}{
		{"three times", failMost, false},
		{"for good", 10, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(_ *eventWaiter, call int, block bool) error {
				switch {
				case !block:
					return &wire.Error{RV: wire.CKRNoEvent}
				case call > 1 && call%10 < tt.bad:
					return general
				}
				time.Sleep(time.Second)
				return nil
			}, func() bool { return true }, func(_ *eventWaiter, _, _ *atomic.Int64, lost *error) {
				time.Sleep(time.Hour)
				synctest.Wait()
				if got := *lost != nil; got != tt.lost {
					t.Errorf("lost: %v", *lost)
				}
			})
		})
	}
}
