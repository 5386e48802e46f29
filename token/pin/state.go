package pin

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

// A State is the login state of a token through one module. One login at a time runs; every
// other request that wants to log in shares its outcome. So fifty signatures on a token that is
// not logged in are one prompt.
//
// The State has the kept PIN. So no module gets a PIN that a person gave for the same token
// through another module. Methods may be called from any goroutine.
type State struct {
	devices *Devices
	device  *device // shared with the States of other modules that show the token
	token   wire.TokenID
	module  string

	// mu is held while a login starts, which takes the locks of a token.Store: see there for
	// the order.
	mu       sync.Mutex
	attempt  *attempt // the login under way; nil: none
	kept     keptPIN
	removals uint64 // see Removals

	logins  atomic.Int32 // logins that are under way
	trying  atomic.Int32 // 1 while a PIN is asked for or tried through this module
	prompts atomic.Int32 // dialogues that are open
	closed  atomic.Bool  // the agent has forgotten the token, and may have another State for it
}

// An attempt is one login under way. It goes on while a request waits for it, and is called
// off when the last request has left.
type attempt struct {
	done    chan struct{} // closed when err and the fields of the PIN are set
	cancel  context.CancelFunc
	waiting waiting.List // the requests that wait: one of them is asked for the PIN

	// State.mu guards the following until done is closed.
	waiters   int
	abandoned bool // the last request has left
	err       error
	// pin is what a person gave for a key that wants the PIN for each signature, too. giver is
	// the request whose person gave it: the signature of that request takes the PIN.
	pin   *secret.Secret
	giver context.Context
}

// A Run logs in. When the key wants its PIN again for the signature, Run returns what the
// person typed. The request that the person was asked for wipes that PIN. list has the requests
// that wait for the login.
type Run func(ctx context.Context, list *waiting.List) (typed *secret.Secret, err error)

// Share logs in by run, or waits for a login that another request has started. start runs a
// function in a goroutine, or fails. The context of run ends when the last request has left.
//
// A person who was asked once for a signature is not asked twice: see Run.
func (s *State) Share(ctx context.Context, start func(func()) error, run Run) (*secret.Secret, error) {
	// Two callers may have one context. Each has its own here, so that only one is the giver.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		a, err := s.join(ctx, start, run)
		if err != nil {
			return nil, err
		}
		select {
		case <-a.done:
		case <-ctx.Done():
			s.leave(ctx, a)
			a.waiting.Leave(ctx)
			return nil, ctx.Err()
		}
		switch {
		case a.giver == ctx:
			return a.pin, a.err
		case !a.abandoned: // else the attempt was called off just before this request joined
			return nil, a.err
		}
	}
}

// join joins the login under way, or starts one.
func (s *State) join(ctx context.Context, start func(func()) error, run Run) (*attempt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attempt != nil {
		s.attempt.waiters++
		s.attempt.waiting.Add(ctx)
		return s.attempt, nil
	}
	a := &attempt{done: make(chan struct{}), waiters: 1}
	a.waiting.Add(ctx)
	starter := ctx
	// The login outlives the request that started it when other requests wait, too.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.cancel = cancel
	s.logins.Add(1)
	err := start(func() {
		defer s.logins.Add(-1)
		defer cancel()
		typed, err := run(ctx, &a.waiting)
		s.mu.Lock()
		a.err, a.pin = err, typed
		if a.giver = a.waiting.Asked(); a.giver == nil {
			a.giver = starter // the PIN was kept
		}
		if a.giver.Err() != nil {
			a.pin.Wipe() // the request has left and does not take the PIN
		}
		s.attempt = nil
		s.mu.Unlock()
		close(a.done)
	})
	if err != nil {
		s.logins.Add(-1)
		cancel()
		return nil, err
	}
	s.attempt = a
	return a, nil
}

// leave is for a request that no longer waits.
func (s *State) leave(ctx context.Context, a *attempt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.giver == ctx {
		a.pin.Wipe()
	}
	a.waiters--
	if a.waiters == 0 {
		a.abandoned = true
		a.cancel()
	}
}

// Alone logs in by run with a PIN that was supplied with the request. Other requests share
// only the turn: the PIN concerns this request alone. So no other person is asked whether to
// use the last try for the PIN, and the PIN is not tried once the request has ended.
func (s *State) Alone(ctx context.Context, run Run) (*secret.Secret, error) {
	s.logins.Add(1)
	defer s.logins.Add(-1)
	return run(ctx, waiting.One(ctx))
}

// InTurn calls do when it is the caller's turn to ask for a PIN and have it tried. There is one
// turn for all modules that show the token. When the prompt of do has moved to a request that
// waits for its own turn, InTurn calls do again after that request. It fails with ErrForgotten
// after Close. list has the requests that do asks a person for. supplied tells that the request has
// its PIN already: no person is asked for another one while it waits.
func (s *State) InTurn(ctx context.Context, list *waiting.List, supplied bool, do func(context.Context) error) error {
	for {
		if err := s.takeTurn(ctx, supplied); err != nil {
			return err
		}
		err := s.during(ctx, list, do)
		if !errors.Is(err, waiting.ErrMoved) {
			return err
		}
	}
}

// during calls do, and ends the turn.
func (s *State) during(ctx context.Context, list *waiting.List, do func(context.Context) error) error {
	defer s.endTurn()
	s.device.setAsked(list)
	defer s.device.setAsked(nil)
	return do(ctx)
}

func (s *State) takeTurn(ctx context.Context, supplied bool) error {
	d := s.device
	select {
	case d.turn <- struct{}{}:
	default:
		d.changeQueue(func() { d.queue = append(d.queue, waiting.Other{Context: ctx, Answered: supplied}) })
		defer d.changeQueue(func() {
			d.queue = slices.DeleteFunc(d.queue, func(o waiting.Other) bool { return o.Context == ctx })
		})
		select {
		case d.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.closed.Load() {
		<-d.turn
		return ErrForgotten
	}
	s.trying.Store(1)
	return nil
}

func (s *State) endTurn() {
	s.trying.Store(0)
	<-s.device.turn
}

// Removals counts how often the card of the token has left.
func (s *State) Removals() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removals
}

// Trying tells whether a PIN is asked for or tried through this module.
func (s *State) Trying() bool { return s.trying.Load() > 0 }

// InUse tells whether a login is under way.
func (s *State) InUse() bool { return s.logins.Load() > 0 || s.Trying() }

// Asks tells whether a login that begins now would ask a person: no PIN is kept, and no login
// is under way.
func (s *State) Asks() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.attempt == nil && s.kept.pin == nil
}

// A Status is what a State tells without asking the token.
type Status struct {
	Kept     bool // a PIN is kept
	UnderWay bool // a PIN is asked for or tried
	Prompt   bool // a person is being asked
	Waiters  int  // the requests that wait for the login under way
}

// Status returns the Status of this moment.
func (s *State) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Kept:     s.kept.pin != nil,
		UnderWay: s.attempt != nil || s.Trying(),
		Prompt:   s.prompts.Load() > 0,
	}
	if s.attempt != nil {
		st.Waiters = s.attempt.waiters
	}
	return st
}

// Close wipes the PINs for good: the agent forgets the token. A login that has just begun
// fails with ErrForgotten.
func (s *State) Close() {
	s.closed.Store(true)
	s.Wipe()
	s.devices.drop(s.token)
}
