// Package supervise keeps the process of one PKCS#11 module running. It starts the process, starts it again when it has
// ended, and ends it while no request needs it. It decides when to look at the tokens of the module. It knows neither
// tokens nor PINs: a [Host] looks at the tokens.
//
// A module that crashes, hangs or lies costs its own tokens only, and only until its next process. The pauses between
// processes double up to half a minute. After a process that was of use, the pause is short. The pace of looks and of
// new processes is bounded. A request waits for a start that is near, and otherwise gets the reason of the failure.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"p11-agent/pinentry/plain"
	"p11-agent/token/pace"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/wire"
)

const (
	// restartMin and restartMax bound the pause before the module gets a new process. The pause doubles each time.
	restartMin = 100 * time.Millisecond
	restartMax = 30 * time.Second
	// After a process that lived this long, or was of use, the pause is the shortest.
	healthyAfter = time.Minute
	// A request waits for the next start if the start is this near. Otherwise the request fails with the reason.
	startPatience = 2 * time.Second
	// pokeInterval is how long a look at a module stays fresh.
	pokeInterval = 2 * time.Second

	// The pace of looks for the events of a module. Each look may change the list of keys for every client.
	lookBurst, lookEvery = 50, 500 * time.Millisecond
	// RenewBurst and RenewEvery are the pace of new processes in place of healthy ones.
	RenewBurst, RenewEvery = 50, 500 * time.Millisecond
)

// ErrClosed says that Run has ended.
var ErrClosed = errors.New("the agent is stopping")

// A ModuleError says what is wrong with a PKCS#11 module or its process.
type ModuleError struct {
	Module string // its name in the registry or the configuration
	Path   string // its file
	Err    error
	Retry  time.Time // when the agent starts its process again; zero: only on request
}

func (e *ModuleError) Error() string {
	return fmt.Sprintf("PKCS#11 module %q: %v", e.Module, e.Err)
}

func (e *ModuleError) Unwrap() error { return e.Err }

// A Host knows the tokens of the module. The Supervisor calls it from the goroutine of Run, except for SlotsLeft. It
// holds no lock then.
type Host interface {
	// Look asks a process for its tokens, and calls Supervisor.Looked when the Host has stored them. If again is set,
	// the module has to look for new tokens, even if that needs a new process.
	Look(ctx context.Context, p *process.Process, again bool) error
	// Ready says that the process serves requests now.
	Ready()
	// Stopped says that the process has ended, or did not start. If drop is set, the tokens of the module are no longer
	// present. The Host calls commit while it holds the lock of its tokens: then no client sees a module that runs with
	// the tokens of a process that has ended.
	Stopped(drop bool, commit func())
	// SlotsLeft says that slots have lost their token. No slots: each slot may have lost it.
	SlotsLeft(slots []wire.SlotID)
	// LoggedIn reports whether a process is logged in to a token.
	LoggedIn(p *process.Process) bool
	// LogOut ends the logins of a process that is about to end.
	LogOut(ctx context.Context, p *process.Process)
}

// Options say which module to run and how.
type Options struct {
	// Process starts a process of the module. The Supervisor sets Hello.Poll, SlotsLeft and Starting in addition.
	Process process.Options
	// Cause returns why the module may have just failed, when the caller knows more than the module says. It may wait
	// for a few seconds. It may be nil, and return "".
	Cause func(context.Context) string
	// Release is how long a process with a login may be unused before the Supervisor ends it, and Idle the same for a
	// process without a login. Release 0 means never, Idle 0 means ReleaseIdle, ReleaseNever means never.
	Release, Idle time.Duration
	Readers       *readers.Readers
	Log           *slog.Logger
}

// A Supervisor runs one PKCS#11 module. The goroutine in Run owns the process: it starts the process, looks at the
// tokens, and starts the process again after a pause. Other goroutines read the state under mu, and ask for a look
// through wanted. Methods other than Run may be called from any goroutine.
//
//	starting ─▶ looking ─▶ ready ─▶ (event, rescan) looking
//	  ▲   ▲        │          │ │
//	  │   └ pause ◀┴──────────┘ │ process ended
//	  └──── released ◀──────────┘ not used (release.go)
type Supervisor struct {
	host Host
	opts Options
	log  *slog.Logger

	tried chan struct{} // closed after the first look, or the first failure
	ended chan struct{} // closed after Run

	// Requests to Run.
	wanted chan *lookup  // requests for a look
	poked  chan struct{} // one element: a client lists the keys
	needed chan struct{} // one element: a request needs the released process
	moved  chan struct{} // one element: cards have come or gone

	// Run uses these alone.
	looks  pace.Limit // of the looks for events
	reason string     // the last logged reason why the module could not be used

	// mu guards the following. The locks of a Host may be held when mu is taken. Under mu, only the lock of the
	// Readers, and that of a Process, are taken.
	mu        sync.Mutex
	state     chan struct{}    // closed and replaced at every change below
	proc      *process.Process // nil while the module has no process
	current   *process.Process // proc, from before the module is loaded
	pid       int              // of the process, from before proc is set; 0 without a process
	info      wire.HelloReply
	starts    int
	err       error     // the reason why there is no process
	retry     time.Time // the next start; zero: when a client wants it
	released  bool      // the Supervisor ended the process because no request needed it
	silent    bool      // a card has left, and the module has not answered since
	users     int       // the requests that need the process
	lastUse   time.Time
	lastLook  time.Time // the last look, or its failure
	removable bool      // the module has removable slots
}

// A lookup is a request for a look.
type lookup struct {
	done chan error // one element
}

// New returns a Supervisor. Run starts the module.
func New(host Host, opts Options) *Supervisor {
	return &Supervisor{
		host: host, opts: opts, log: opts.Log,
		looks:  pace.Limit{Burst: lookBurst, Every: lookEvery},
		tried:  make(chan struct{}),
		ended:  make(chan struct{}),
		wanted: make(chan *lookup),
		poked:  make(chan struct{}, 1),
		needed: make(chan struct{}, 1),
		moved:  make(chan struct{}, 1),
		state:  make(chan struct{}),
	}
}

// change changes the state under mu, and wakes the goroutines that wait for a change.
func (s *Supervisor) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.state)
	s.state = make(chan struct{})
}

// Tried returns a channel that is closed after the first look at the module, or after its first failure.
func (s *Supervisor) Tried() <-chan struct{} { return s.tried }

// Process returns the process, and waits while it starts. If the next start is far away, Process fails with the reason.
// A caller that needs the process for longer than a moment calls Use before.
func (s *Supervisor) Process(ctx context.Context) (*process.Process, error) {
	for {
		s.mu.Lock()
		p, state, silent := s.proc, s.state, s.silent
		soon := s.err == nil || !s.retry.IsZero() && time.Until(s.retry) < startPatience
		failure := s.failureLocked() // of this moment
		if s.released {
			signal(s.needed)
		}
		s.mu.Unlock()
		switch {
		case p != nil && p.Err() == nil && !silent:
			return p, nil
		case p == nil && !soon:
			return nil, failure
		}
		// If the process has just ended, then Run changes the state soon.
		select {
		case <-state:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Use notes that a request needs the module, until the caller calls done. The process is not released in between, even
// while a prompt is open for long.
func (s *Supervisor) Use() (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users--
		s.lastUse = time.Now()
	}
}

// Failure returns the reason why there is no process.
func (s *Supervisor) Failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failureLocked()
}

func (s *Supervisor) failureLocked() error {
	if s.err == nil || errors.Is(s.err, ErrClosed) {
		return s.err
	}
	e := s.moduleError(s.err)
	e.Retry = s.retry
	return e
}

// Wrap adds the module to an error of its process.
func (s *Supervisor) Wrap(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return s.moduleError(err)
}

func (s *Supervisor) moduleError(err error) *ModuleError {
	return &ModuleError{Module: s.opts.Process.Name, Path: s.opts.Process.Hello.Path, Err: err}
}

// Rescan requests a look at the module, and waits for it. If the module has no process, it gets one now.
func (s *Supervisor) Rescan(ctx context.Context) error {
	l := &lookup{done: make(chan error, 1)}
	select {
	case s.wanted <- l:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ended:
		return ErrClosed
	}
	select {
	case err := <-l.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Poke requests a look in the background, unless the last look is fresh. A module that cannot be loaded is looked at
// less often.
func (s *Supervisor) Poke() {
	s.mu.Lock()
	interval := pokeInterval
	if s.proc == nil {
		interval = restartMax
	}
	fresh := time.Since(s.lastLook) < interval
	s.mu.Unlock()
	if !fresh {
		signal(s.poked)
	}
}

// signal fills a channel of one element.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// drain empties a channel of one element.
func drain(c <-chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// Looked notes that the Host has stored the tokens of a look. removable is set if the module has a removable slot.
func (s *Supervisor) Looked(removable bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastLook, s.removable = time.Now(), removable
}

// CardsMoved bounds the time for the module to list its slots, until it has done so, and requests a look.
func (s *Supervisor) CardsMoved(listing time.Duration) {
	if p := s.running(); p != nil {
		p.Expect(listing)
	}
	signal(s.moved)
}

// running returns the process, also while it loads the module.
func (s *Supervisor) running() *process.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// CardsLeft notes that cards have left. It returns the process, also while the process loads the module. If silence is
// set, Process returns no process before the module has listed its slots.
func (s *Supervisor) CardsLeft(silence bool) (p *process.Process) {
	s.change(func() {
		p = s.current
		s.silent = s.silent || silence && p != nil
	})
	return p
}

// Answered notes that the module has listed its slots. moves is the value of Readers.Moves before it was asked: if a
// card has moved since, the answer may be too old.
func (s *Supervisor) Answered(p *process.Process, moves uint64) {
	s.change(func() { // in one step: a card that leaves now makes the module silent again
		if s.current == p && s.opts.Readers.Moves() == moves {
			p.Calm()
			s.silent = false
		}
	})
}

// Kill ends the process, if there is one. Run starts another.
func (s *Supervisor) Kill(why error) {
	if p := s.running(); p != nil {
		p.Kill(why)
	}
}

// PID returns the number of the process, also while the process loads the module. It returns 0 without a process.
func (s *Supervisor) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

// Info returns what the last process has said of the module and of itself.
func (s *Supervisor) Info() wire.HelloReply {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.info
}

// A Status is the state of a module and its process.
type Status struct {
	Running  bool // a process serves requests
	Released bool // there is no process because no request needs one now
	PID      int  // of the process that serves requests
	Err      error
	Restarts int
	Waits    bool   // the process reports changes itself; otherwise it polls the slots
	Library  string // the description that the module gives
	Sandbox  string // the limits of the process, and those that are not in force; empty: no process
}

// Status returns the state. It never waits.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Running:  s.proc != nil,
		Released: s.released && s.pid == 0 && s.err == nil,
		Err:      s.err,
		Restarts: max(0, s.starts-1),
		Waits:    s.proc != nil && s.info.Waits,
		Library:  s.info.Description,
	}
	if s.proc != nil {
		st.PID = s.proc.PID()
		st.Sandbox = plain.Output(s.info.Sandbox.String())
	}
	return st
}
