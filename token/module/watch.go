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
	// pollEvery is the time between two looks at the slots if no event tells of changes.
	// A card shows within a second: pcscd takes up to 0.4 s for it.
	pollEvery = 400 * time.Millisecond
	// pollShare bounds the cost of looks: they take one part in pollShare of the time.
	pollShare = 50
	// pollBeside is the time between two looks if a thread waits for events. These looks
	// find lost events.
	pollBeside = 20 * time.Second
	// pollFixed is for modules whose slots take no other token. It counts after pollStill
	// without a change.
	pollFixed = 10 * time.Second
	pollStill = time.Minute
	pollMost  = 30 * time.Second

	// hungAfter is how long a module may take to list its slots while it has no other
	// request.
	hungAfter = 20 * time.Second
	// eventTimeout is the same limit after an event of the module, while the agent waits
	// for an answer. It does not count for modules that see cards through pcscd. For
	// them, pcscd tells the agent of cards, and the agent knows whether there is a new
	// card to read.
	eventTimeout = 2 * time.Second
	// probeTimeout is the same limit while a thread waits for events.
	probeTimeout = 3 * time.Second
)

// watch tells the agent when slots or tokens have changed since the agent last asked for
// them. It does not disturb the cards.
//
//	waiting ──(not supported, or failed at once)──▶ polling ──(a change)──▶ waiting
//	   ├──(nothing else is answered beside it)──▶ lost: the next process polls only
//	   └──(fails although it worked)────────────▶ lost: the next process waits again
//
// watch returns when it knows whether to wait or to poll. If poll is set, it only polls.
func (s *server) watch(lib *library, poll bool) error {
	w := newWaiter()
	w.wait = lib.waitForSlotEvent
	w.changed = func() bool { return s.changedSoon(lib) }
	w.tell = s.tell
	w.lost = s.lose
	w.probe = func() {
		_, _ = lib.slots(true) // only the return counts
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

// tell tells the agent that slots or tokens have changed, and then forgets the tokens
// that have gone. If tell fails, the reader sees the end of the connection, too.
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

// lose tells the agent that this process is of no further use.
func (s *server) lose(err error) {
	e, ok := err.(*wire.Error)
	if !ok {
		e = &wire.Error{Text: err.Error()}
	}
	s.lost.Store(true)
	_ = s.conn.WriteLost(e) // on failure, the reader sees the end, as in tell
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

// changedSoon calls changed after an event of the module. A module may hang when a token
// is taken out, and so may every call of it. Then changedSoon tells the agent.
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
				// A slow card may work on a request, and the request has a deadline.
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
			// The reader service may have started.
			w.start()
			if err := w.settle(); err != nil {
				s.lose(err)
				return
			}
		}
	}
}

// rest waits until the next look. The next look is sooner if the waiter gives up
// meanwhile.
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

// A rhythm decides how much time passes between two looks at the slots.
type rhythm struct {
	costs []time.Duration // of the last looks without a change, three at most
	still time.Time       // the time of the last change
}

func newRhythm(now time.Time) *rhythm { return &rhythm{still: now} }

// polled notes the cost of a look. A look with a change does not count: it may have been
// the module's first look at a card.
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

// pause returns how long to wait before the next look. waits tells that a thread waits
// for events. fixed tells that no token can be plugged into a slot.
func (r *rhythm) pause(now time.Time, waits, fixed bool) time.Duration {
	pause := pollEvery
	switch {
	case waits:
		pause = pollBeside
	case fixed && now.Sub(r.still) >= pollStill:
		pause = pollFixed
	}
	if len(r.costs) > 0 {
		// Use the least of several costs: the other looks may have waited for another
		// call.
		pause = max(pause, min(pollShare*slices.Min(r.costs), pollMost))
	}
	return pause
}

const (
	// drainMost bounds the calls that ask a module for earlier events.
	drainMost = 256
	// drainTimeout is the time after which a call that should not wait counts as one that
	// waits. Some modules do not know the flag.
	drainTimeout = 5 * time.Second
	// asleepAfter is the time after which a thread counts as waiting, if the system does
	// not show it.
	asleepAfter = 50 * time.Millisecond
	// failMost is how often in a row a wait may fail after it has worked. The pauses
	// between the tries double.
	failMost  = 3
	failPause = 100 * time.Millisecond
	// After stormy events, the thread need not be seen waiting.
	stormy = 3
	// After an event that changes nothing, the waiter pauses (vainMin to vainMost). It
	// tells the agent of such events seldom (tellMin to tellMost).
	vainMin, vainMost = 10 * time.Millisecond, time.Second
	tellMin, tellMost = time.Second, time.Minute
)

// An eventWaiter has its own thread, which waits in C_WaitForSlotEvent.
//
// The thread belongs to run. It ends when the module does not support the call, or when
// the call fails. A caller that shuts the module down keeps the thread out meanwhile,
// with stayOut.
type eventWaiter struct {
	wait    func(block bool) error // C_WaitForSlotEvent
	changed func() bool            // looks at the slots, and tells whether they have changed
	tell    func()
	lost    func(error)
	probe   func() // any other call; it returns if the module answers

	mu       sync.Mutex
	moved    chan struct{} // closed and replaced at each change of the fields below
	running  bool
	never    bool // the module does not support the call
	paused   bool
	lives    int // how often the module was started again
	inside   bool
	blocking bool      // the call under way should wait
	since    time.Time // when the call under way began
	calls    int
	events   int // waiting calls that returned an event
	thread   int
	trusted  bool // the thread was seen waiting while the module answered another call
	owed     bool // the agent was not told of an event yet
}

func newWaiter() *eventWaiter { return &eventWaiter{moved: make(chan struct{})} }

// move changes the state under mu and wakes the goroutines that wait for a change.
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

// waits tells whether a thread waits for events, as far as is known. It also returns a
// channel that is closed when this may have changed.
func (w *eventWaiter) waits() (bool, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running && w.trusted, w.moved
}

// mayStart tells whether the thread does not run, and can be started.
func (w *eventWaiter) mayStart() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.running && !w.never
}

// owes tells whether the agent was not told of an event yet. If so, the caller tells the
// agent.
func (w *eventWaiter) owes() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	owed := w.owed
	w.owed = false
	return owed
}

// run waits for events until a wait fails, and returns the error.
func (w *eventWaiter) run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	w.move(func() { w.thread = unix.Gettid() })
	block := false // at first the module reports cards that were there before
	life, drained, failures := 0, 0, 0
	var vain, gap time.Duration
	var next time.Time // when the agent may be told of an event that changes nothing
	for {
		if n := w.enter(block, life); n != life { // the module reports the cards again
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
		case !block && err == nil && took < drainTimeout: // otherwise the call has waited
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
			// One card has replaced another, or nothing has changed.
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

// beside tells whether the module was seen to answer another call while a thread waits.
func (w *eventWaiter) beside() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trusted
}

// enter waits until the thread may call the module. Call it before each call. It returns
// how often the module was started again. If that number is not life, the call must not
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

// leave notes that the call of the module has returned.
func (w *eventWaiter) leave() { w.move(func() { w.inside = false }) }

// stayOut keeps the thread out of the module until resume. It returns false, and changes
// nothing, if the thread is in the module.
func (w *eventWaiter) stayOut() (out bool) {
	w.move(func() {
		out = !w.inside
		w.paused = out
	})
	return out
}

// resume ends stayOut. The module may have been started again meanwhile.
func (w *eventWaiter) resume() { w.move(func() { w.paused = false; w.lives++ }) }

// settle finds out whether the module answers while the thread waits in it. Some modules
// serve one call after the other: p11-kit-client.so of p11-kit 0.24 does. settle returns
// when it knows the answer, or when the thread does not run.
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

// sleeps tells whether a thread of this process is off the processor (proc(5), stat).
// Without /proc, it returns false.
func sleeps(thread int) bool {
	s, ok := procstat.OfThread(thread)
	return ok && (s.State == 'S' || s.State == 'D')
}
