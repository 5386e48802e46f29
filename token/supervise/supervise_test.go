package supervise

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/pcsc/pcsctest"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/wire"
)

// A look is a look at a module that has ended.
type look struct {
	p     *process.Process
	again bool
	err   error
}

// A host is a Host without tokens. Its channels have what the Supervisor has called.
type host struct {
	*Supervisor
	readers *readers.Readers
	looks   chan look
	stops   chan bool // drop
	during  func(*process.Process)
	torn    func(before, after Status)

	mu       sync.Mutex // that of the tokens
	loggedIn bool
	loggedOut,
	ready int
}

func (h *host) Look(ctx context.Context, p *process.Process, again bool) error {
	before, moves := h.readers.List(ctx), h.readers.Moves()
	var slots wire.SlotsReply
	err := p.Call(ctx, process.ListTimeout, wire.TypeSlots, &wire.Slots{Reinitialize: again}, &slots)
	if err == nil {
		h.Answered(p, moves)
		h.readers.SetUsed(slots.PCSC)
		if before == nil {
			before = h.readers.List(ctx)
		}
		h.readers.Looked(ctx, before)
		h.mu.Lock()
		h.Looked(false)
		h.mu.Unlock()
	}
	if h.during != nil {
		h.during(p)
	}
	h.looks <- look{p, again, err}
	return h.Wrap(err)
}

func (h *host) Ready() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ready++
}

func (h *host) Stopped(drop bool, commit func()) {
	h.mu.Lock()
	before := h.Status()
	commit()
	if after := h.Status(); after.Running || after.Err == nil || after.PID != 0 {
		h.torn(before, after)
	}
	h.mu.Unlock()
	h.stops <- drop
}

func (h *host) SlotsLeft([]wire.SlotID) {}

func (h *host) LoggedIn(*process.Process) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.loggedIn
}

func (h *host) LogOut(context.Context, *process.Process) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loggedOut++
}

// supervised makes a Supervisor of a fake module that behaves like how. It does not run yet.
func supervised(t *testing.T, how string, more ...string) *host {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	h := &host{looks: make(chan look, 1000), stops: make(chan bool, 1000)}
	h.torn = func(before, after Status) { t.Errorf("the end is not noted: %+v after %+v", after, before) }
	h.readers = readers.New(more, func() []int { return nil }, log)
	h.Supervisor = New(h, Options{
		Process: process.Options{
			Name: "fake", Command: []string{"/proc/self/exe"}, Env: append(os.Environ(), append(more, fakeModule+"="+how)...), Log: log,
			Hello: wire.Hello{Path: "/nowhere/fake.so"},
		},
		Readers: h.readers, Log: log,
	})
	return h
}

// runs runs a Supervisor until the test ends, or until end is called.
func (h *host) runs(t *testing.T) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { h.Run(ctx) })
	end = func() {
		cancel()
		all.Wait()
	}
	t.Cleanup(end)
	return end
}

func (h *host) process(t *testing.T) *process.Process {
	t.Helper()
	p, err := h.Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRun(t *testing.T) {
	h := supervised(t, "")
	end := h.runs(t)
	<-h.Tried()
	first := h.process(t)
	if got := <-h.looks; got.p != first || got.again || got.err != nil {
		t.Errorf("the first look: %+v", got)
	}
	if got := h.Status(); !got.Running || got.PID != first.PID() || got.Restarts != 0 || len(got.Library) >= longText || !strings.HasPrefix(got.Library, "xxx") {
		t.Errorf("it runs: %+v", got)
	}
	if err := h.Rescan(t.Context()); err != nil || !(<-h.looks).again {
		t.Errorf("a look on request: %v", err)
	}
	first.Notify()
	if got := <-h.looks; got.again || got.err != nil {
		t.Errorf("a look for an event: %+v", got)
	}

	// The process ends by itself. A first failure drops no token.
	h.Kill(errors.New("the test ends it"))
	if <-h.stops {
		t.Error("the tokens are dropped at once")
	}
	second := h.process(t)
	if got := h.Status(); second == first || got.Restarts != 1 || !got.Running || got.Err != nil {
		t.Errorf("it runs again: %+v", got)
	}
	<-h.looks

	end()
	if _, err := h.Process(t.Context()); !errors.Is(err, ErrClosed) || !errors.Is(h.Rescan(t.Context()), ErrClosed) || !errors.Is(h.Failure(), ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	if second.Err() == nil {
		t.Error("the process lives on")
	}
}

// A module that cannot be loaded waits for a request, and each request fails with the reason.
func TestBroken(t *testing.T) {
	h := supervised(t, "broken")
	h.runs(t)
	<-h.Tried()
	if !<-h.stops {
		t.Error("the tokens of a module that never ran are kept")
	}
	for range 2 {
		_, err := h.Process(t.Context())
		e, ok := errors.AsType[*ModuleError](err)
		if !ok || e.Module != "fake" || e.Path != "/nowhere/fake.so" || !e.Retry.IsZero() || !strings.Contains(err.Error(), "not this file") {
			t.Errorf("no process: %v", err)
		}
		if got := h.Status(); got.Running || got.Err == nil || got.Restarts != 0 {
			t.Errorf("no process: %+v", got)
		}
		if err := h.Rescan(t.Context()); err == nil {
			t.Error("a look without a process")
		}
		<-h.stops
	}
	h.Poke() // the failure is fresh
	if len(h.poked) != 0 {
		t.Error("a list of keys starts the module at once")
	}
}

// A module that is replaced to find new tokens has not failed, and the new process answers the request.
func TestRenewed(t *testing.T) {
	h := supervised(t, "renews")
	h.runs(t)
	first := h.process(t)
	<-h.looks
	if err := h.Rescan(t.Context()); err != nil {
		t.Error(err)
	}
	if got := <-h.looks; !got.again || !errors.Is(got.err, process.ErrRenewed) {
		t.Errorf("the old process: %+v", got)
	}
	if got := <-h.looks; got.again || got.err != nil || got.p == first {
		t.Errorf("the new process: %+v", got)
	}
	if got := h.Status(); got.Restarts != 0 || len(h.stops) != 0 {
		t.Errorf("it counts as a failure: %+v", got)
	}
}

// A module that does one thing at a time polls.
func TestOneAtATime(t *testing.T) {
	h := supervised(t, "one-at-a-time")
	h.runs(t)
	h.process(t)
	if got := h.Status(); got.Restarts != 0 || len(h.stops) != 0 {
		t.Errorf("it counts as a failure: %+v", got)
	}
}

// A module that has lost a card gets no request before it has listed its slots. A card that leaves during the list does
// not count as listed.
func TestSilent(t *testing.T) {
	service := pcsctest.Start(t, pcsc.Reader{Name: "one", Card: true, Events: 2})
	h := supervised(t, "pcsc", service.Env()...)
	h.runs(t)
	p := h.process(t)
	<-h.looks
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if got := h.CardsLeft(true); got != p {
		t.Error("another process")
	}
	if _, err := h.Process(late); err == nil {
		t.Error("a request to a silent module")
	}
	h.Answered(p, h.readers.Moves()+1)
	if _, err := h.Process(late); err == nil {
		t.Error("an old answer ends the silence")
	}
	h.CardsMoved(time.Minute)
	if got := <-h.looks; got.err != nil {
		t.Error(got.err)
	}
	if got := h.process(t); got != p {
		t.Error("another process after the look")
	}
}

// A process that no request needs ends, and comes back for a request.
func TestRelease(t *testing.T) {
	service := pcsctest.Start(t, pcsc.Reader{Name: "one", Card: true, Events: 2})
	h := supervised(t, "pcsc", service.Env()...)
	h.opts.Idle = time.Millisecond
	h.runs(t)
	for n := range 3 {
		p := h.process(t)
		<-h.looks
		<-p.Done()
		if !errors.Is(p.Err(), errReleased) {
			t.Fatalf("it ended otherwise: %v", p.Err())
		}
		h.mu.Lock()
		if h.loggedOut != n+1 || h.ready != n+1 {
			t.Errorf("%d times ready, %d times logged out, want %d", h.ready, h.loggedOut, n+1)
		}
		h.mu.Unlock()
	}
	if got := h.Status(); got.Restarts != 0 || len(h.stops) != 0 {
		t.Errorf("a release counts as a failure: %+v", got)
	}
	service.Set(pcsc.Reader{Name: "one", Events: 3})
	<-h.looks // for the card
}

// A process in use is not released, and a request from before a release does not end the next one.
func TestPark(t *testing.T) {
	h := supervised(t, "")
	done := h.Use()
	if h.park() {
		t.Error("a process in use is released")
	}
	done()
	for range 2 {
		if !h.park() || len(h.needed) != 0 {
			t.Errorf("%d requests before a release", len(h.needed))
		}
		late, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := h.Process(late); err == nil || len(h.needed) != 1 {
			t.Errorf("%d requests after a release", len(h.needed))
		}
	}
}

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
		s := &Supervisor{wanted: make(chan *lookup), poked: make(chan struct{}, 1)}
		start := time.Now()
		s.poked <- struct{}{} // a list of keys does not end the pause
		if due := s.pause(t.Context(), restartMax); len(due) != 0 || time.Since(start) != restartMax {
			t.Errorf("%d looks after %v", len(due), time.Since(start))
		}
		l := &lookup{done: make(chan error, 1)}
		go func() {
			time.Sleep(time.Second)
			s.wanted <- l
		}()
		start = time.Now()
		if due := s.pause(t.Context(), restartMax); len(due) != 1 || due[0] != l || time.Since(start) != time.Second {
			t.Errorf("%d looks after %v", len(due), time.Since(start))
		}
	})
}
