package module

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/procstat"
	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

const (
	// pollEvery is how often the slots are looked at where nothing else tells of
	// changes. A card is seen within a second: pcscd takes up to 0.4 s for it.
	pollEvery = 400 * time.Millisecond
	// pollShare bounds what that costs: one part in so many of the time.
	pollShare = 50
	// pollBeside is how often they are looked at where a thread waits for events:
	// in case one is lost.
	pollBeside = 20 * time.Second
	// pollFixed is for modules whose slots nothing can be plugged into, when
	// nothing has changed for pollStill.
	pollFixed = 10 * time.Second
	pollStill = time.Minute
	pollMost  = 30 * time.Second

	// hungAfter is how long a module may take to list its slots while nobody else
	// has asked it for anything.
	hungAfter = 20 * time.Second
	// eventTimeout is how long it may take for that after one of its own events, while
	// somebody waits for an answer. Whoever sees cards by pcscd is not held to it: the
	// agent hears of their cards from pcscd, and knows whether there is a new one to read.
	eventTimeout = 2 * time.Second
	// probeTimeout is how long it may take beside a thread that waits for events.
	probeTimeout = 3 * time.Second
)

// watch tells the agent when slots or tokens have changed since it last asked
// for them. It does not disturb the cards.
//
//	waiting ──(not supported, or failed at once)──▶ polling ──(a change)──▶ waiting
//	   ├──(nothing else is answered beside it)──▶ lost: the next process polls only
//	   └──(fails although it worked)────────────▶ lost: the next process waits again
//
// It returns when it is known how it is done. poll: only by asking again and
// again.
func (s *server) watch(lib *library, poll bool) error {
	w := newWaiter()
	w.wait = lib.waitForSlotEvent
	w.changed = func() bool { return s.changedSoon(lib) }
	w.tell = s.tell
	w.lost = s.lose
	w.probe = func() {
		_, _ = lib.slots(true) // what counts is that it returns
	}
	s.waiter = w
	if !poll {
		w.start()
		if err := w.settle(); err != nil {
			return err
		}
	}
	go s.poll(lib, w, poll)
	return nil
}

// tell says that slots or tokens have changed, and forgets the tokens that have gone after
// that. When it fails the reader sees the end, too.
func (s *server) tell() {
	var gone []wire.SlotID
	s.mu.Lock()
	for _, slot := range s.gone {
		gone = append(gone, wire.SlotID{ID: uint64(slot)})
	}
	s.gone = nil
	s.mu.Unlock()
	_ = s.conn.WriteEvent(gone...)
	s.retireLeaving()
}

// lose tells the agent that this process is of no use any more.
func (s *server) lose(err error) {
	e, ok := err.(*wire.Error)
	if !ok {
		e = &wire.Error{Text: err.Error()}
	}
	s.lost.Store(true)
	_ = s.conn.WriteLost(e) // as tell
}

// busy tells whether the agent waits for an answer.
func (s *server) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.lanes {
		if l.underWay() {
			return true
		}
	}
	return len(s.requests) > 0
}

// changedSoon is changed after an event of the module. A module may hang when a token is
// taken out, and so may all that is asked of it: the agent is told.
func (s *server) changedSoon(lib *library) bool {
	done := make(chan bool, 1)
	go func() { done <- s.changed(lib) }()
	tick := time.NewTicker(eventTimeout)
	defer tick.Stop()
	for {
		select {
		case changed := <-done:
			return changed
		case <-tick.C:
			if !pcsc.Loaded() && s.busy() {
				s.lose(&wire.Error{Function: "C_GetSlotList", Reason: wire.ReasonPulled})
				return <-done
			}
		}
	}
}

// poll looks at the slots again and again.
func (s *server) poll(lib *library, w *eventWaiter, only bool) {
	r := newRhythm(time.Now())
	for {
		s.rest(w, r)
		begin := time.Now()
		done := make(chan bool, 1)
		go func() { done <- s.changed(lib) }()
		changed, waiting := false, true
		for waiting {
			select {
			case changed = <-done:
				waiting = false
			case <-time.After(hungAfter):
				// A slow card may be at work for somebody, who has a deadline.
				if !s.busy() {
					s.lose(&wire.Error{Function: "C_GetSlotList", Text: fmt.Sprintf("the module did not answer within %v", hungAfter)})
					return
				}
			}
		}
		r.polled(time.Now(), time.Since(begin), changed)
		if w.owes() || changed {
			s.tell()
		}
		if changed && !only && w.mayStart() {
			// The reader service may have come.
			w.start()
			if err := w.settle(); err != nil {
				s.lose(err)
				return
			}
		}
	}
}

// rest waits until it is time for the next look, which is sooner when the waiter
// gives up meanwhile.
func (s *server) rest(w *eventWaiter, r *rhythm) {
	for begin := time.Now(); ; {
		s.mu.Lock()
		fixed := s.fixed
		s.mu.Unlock()
		waits, moved := w.waits()
		left := r.pause(time.Now(), waits, fixed) - time.Since(begin)
		if left <= 0 {
			return
		}
		select {
		case <-moved:
		case <-time.After(left):
		}
	}
}

// A rhythm decides how long the slots are left alone between two looks at them.
type rhythm struct {
	costs []time.Duration // of the last looks that found nothing new, three at most
	still time.Time       // when something was new last
}

func newRhythm(now time.Time) *rhythm { return &rhythm{still: now} }

// polled notes what a look took. One that found something new does not count: it
// may have been the module's first look at a card.
func (r *rhythm) polled(now time.Time, cost time.Duration, changed bool) {
	if changed {
		r.still = now
		return
	}
	if len(r.costs) == 3 {
		r.costs = slices.Delete(r.costs, 0, 1)
	}
	r.costs = append(r.costs, cost)
}

// pause returns how long to wait before the next look. waits tells that events
// are waited for, fixed that nothing can be plugged into a slot.
func (r *rhythm) pause(now time.Time, waits, fixed bool) time.Duration {
	pause := pollEvery
	switch {
	case waits:
		pause = pollBeside
	case fixed && now.Sub(r.still) >= pollStill:
		pause = pollFixed
	}
	if len(r.costs) > 0 {
		// The least of several: the others may have waited for something else.
		pause = max(pause, min(pollShare*slices.Min(r.costs), pollMost))
	}
	return pause
}

const (
	// drainMost bounds how often a module is asked for events of before.
	drainMost = 256
	// drainTimeout is after which a call that was not to wait counts as one that
	// does: some modules do not know the flag.
	drainTimeout = 5 * time.Second
	// asleepAfter is after which a thread counts as one that waits, if that cannot
	// be seen.
	asleepAfter = 50 * time.Millisecond
	// failMost is how often in a row a wait may fail after it worked. The pauses in
	// between double.
	failMost  = 3
	failPause = 100 * time.Millisecond
	// stormy is how many events make a module one that need not be seen to wait.
	stormy = 3
	// Events that change nothing are waited for with a pause in between, and told
	// of seldom.
	vainMin, vainMost = 10 * time.Millisecond, time.Second
	tellMin, tellMost = time.Second, time.Minute
)

// An eventWaiter has a thread of its own that waits in C_WaitForSlotEvent.
//
// The thread is run's, which ends when the module does not support the call, or
// when it fails. Whoever shuts the module down has it stay out meanwhile.
type eventWaiter struct {
	wait    func(block bool) error // C_WaitForSlotEvent
	changed func() bool            // looks at the slots, and tells whether they have changed
	tell    func()
	lost    func(error)
	probe   func() // any other call, which returns if the module answers

	mu       sync.Mutex
	moved    chan struct{} // closed and replaced at each change of what follows
	running  bool
	never    bool // it is not supported
	paused   bool
	lives    int // how often the module was started again
	inside   bool
	blocking bool      // the call under way is to wait
	since    time.Time // when the call under way began
	calls    int
	events   int // calls that were to wait, and returned one
	thread   int
	trusted  bool // it was seen to wait, with the module answering beside it
	owed     bool // an event was not told of yet
}

func newWaiter() *eventWaiter { return &eventWaiter{moved: make(chan struct{})} }

// move changes the state under mu and wakes those who wait for it.
func (w *eventWaiter) move(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.moved)
	w.moved = make(chan struct{})
}

// start starts the thread.
func (w *eventWaiter) start() {
	w.move(func() { w.running, w.trusted, w.events = true, false, 0 })
	go func() {
		err := w.run()
		w.move(func() { w.running, w.never = false, code(err) == wire.CKRFunctionNotSupported })
	}()
}

// waits tells whether events are waited for, as far as is known, and returns what
// is closed when that may have changed.
func (w *eventWaiter) waits() (bool, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running && w.trusted, w.moved
}

// mayStart tells whether it does not run, and might.
func (w *eventWaiter) mayStart() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.running && !w.never
}

// owes tells whether an event was not told of yet, which the caller is to do.
func (w *eventWaiter) owes() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	owed := w.owed
	w.owed = false
	return owed
}

// run waits for events until that fails, and returns why.
func (w *eventWaiter) run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	w.move(func() { w.thread = unix.Gettid() })
	block := false // at first the module tells of cards that were there before
	life, drained, failures := 0, 0, 0
	var vain, gap time.Duration
	var next time.Time // when an event that changes nothing may be told of
	for {
		if n := w.enter(block, life); n != life { // cards are told of once more
			life, block, drained = n, false, 0
		}
		began := time.Now()
		err := w.wait(block)
		w.leave()
		took := time.Since(began)
		if took > gap {
			vain, gap, next = 0, 0, time.Time{}
		}
		if took > tellMost {
			failures = 0
		}
		switch c := code(err); {
		case !block && c == wire.CKRNoEvent:
			block = true
			continue
		case !block && err == nil && took < drainTimeout: // else it has waited in any case
			drained++
			block = drained == drainMost
			continue
		case c == wire.CKRFunctionNotSupported, c == wire.CKRNoEvent, err != nil && !w.beside():
			return err
		case err != nil:
			if failures++; failures > failMost {
				w.lost(err)
				return err
			}
			time.Sleep(failPause << (failures - 1))
			continue
		}
		failures = 0
		w.move(func() { w.events++ })
		switch {
		case w.changed():
			vain, gap, next = 0, 0, time.Time{}
			w.owes()
			w.tell()
		default:
			// Another card in place of one, or nothing at all.
			if now := time.Now(); now.Before(next) {
				w.move(func() { w.owed = true })
			} else {
				w.owes()
				w.tell()
				gap = min(max(2*gap, tellMin), tellMost)
				next = now.Add(gap)
			}
			vain = min(max(2*vain, vainMin), vainMost)
			time.Sleep(vain)
		}
	}
}

// beside tells whether the module was seen to answer while a thread waits.
func (w *eventWaiter) beside() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trusted
}

// enter is called before the module is, and waits until that may be. It returns
// how often the module was started again: if that is not life, the call is not to
// wait.
func (w *eventWaiter) enter(block bool, life int) int {
	for {
		w.mu.Lock()
		paused, moved, lives := w.paused, w.moved, w.lives
		if !paused {
			w.inside, w.blocking, w.since = true, block && lives == life, time.Now()
			w.calls++
		}
		w.mu.Unlock()
		if !paused {
			return lives
		}
		<-moved
	}
}

// leave is called after the module has returned.
func (w *eventWaiter) leave() { w.move(func() { w.inside = false }) }

// stayOut keeps the thread out of the module until resume, and tells whether it
// is out. When it is not, nothing is changed.
func (w *eventWaiter) stayOut() (out bool) {
	w.move(func() {
		out = !w.inside
		w.paused = out
	})
	return out
}

// resume ends what stayOut began. The module may be another by now.
func (w *eventWaiter) resume() { w.move(func() { w.paused = false; w.lives++ }) }

// settle finds out whether the module answers while the thread waits in it. Some
// serve one call after the other: p11-kit-client.so of p11-kit 0.24 does. It
// returns when that is known, or the thread does not wait.
func (w *eventWaiter) settle() error {
	for !w.asleep() {
		w.mu.Lock()
		running, events := w.running, w.events
		w.mu.Unlock()
		if !running {
			return nil
		}
		if events >= stormy {
			break
		}
		time.Sleep(time.Millisecond)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		w.probe()
	}()
	over := time.After(probeTimeout)
	select {
	case <-answered:
		w.move(func() { w.trusted = true })
		return nil
	case <-over:
		return &wire.Error{
			Function: "C_GetSlotList", Reason: wire.ReasonOneAtATime,
			Text: "the module answers nothing while a thread waits for its events",
		}
	}
}

// asleep tells whether the thread waits in the module.
func (w *eventWaiter) asleep() bool {
	w.mu.Lock()
	inside, blocking, thread, calls, took := w.inside, w.blocking, w.thread, w.calls, time.Since(w.since)
	w.mu.Unlock()
	switch {
	case !inside:
		return false
	case !blocking:
		return took > drainTimeout
	case took > asleepAfter:
		return true
	case !sleeps(thread):
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inside && w.calls == calls
}

// sleeps tells whether a thread of this process is off the processor (proc(5),
// stat). Where there is no /proc, no thread is.
func sleeps(thread int) bool {
	s, ok := procstat.OfThread(thread)
	return ok && (s.State == 'S' || s.State == 'D')
}
