// Package process runs one PKCS#11 module in a process of its own, and carries requests to it.
//
// [Start] starts the program of the module process and has it load the module. Any number of goroutines may then
// call it: [Process.Call] for most requests, and a [Turn] for each operation with a key. A process ends by [Process.Kill], by a
// request that takes too long, or by itself. [Process.Done] is closed then, and [Process.Err] gives the reason.
//
// The package promises that a module that crashes, hangs, or answers nonsense costs only its own requests, and each
// of them returns. A request whose context ends returns at once. What the module prints is bounded, and what it
// prints while it has a PIN, decrypts or derives is neither logged nor quoted.
//
// Package token/supervise decides when to start a process again. Package token decides what to ask the process, and
// what the answers mean.
package process

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"p11-agent/token/pace"
	"p11-agent/token/wire"
)

// A process that reports more events than this ends.
const eventBurst, eventEvery = 1000, 10 * time.Millisecond

var (
	// ErrGone is the error of a request whose process has ended. It wraps the reason.
	ErrGone = errors.New("the module process ended")
	// ErrOneAtATime ends a process that cannot answer while it waits for events.
	ErrOneAtATime = errors.New("it answers nothing while it waits for events")
	// ErrRenewed ends a process that a new one replaces, to find new tokens. The old process had no request.
	ErrRenewed = errors.New("the agent replaces the process to look for tokens")
	// ErrPulled ends a process that did not answer after a card was put in or taken out.
	ErrPulled = errors.New("no answer after a card was put in or taken out; the agent starts a new process")
)

// IsOneAtATime reports whether a process ended because its module does one thing at a time.
func IsOneAtATime(err error) bool {
	return errors.Is(err, ErrOneAtATime) || wire.IsReason(err, wire.ReasonOneAtATime)
}

// A HungError ends a process that did not answer in time.
type HungError struct{ Timeout time.Duration }

func (e *HungError) Error() string {
	return fmt.Sprintf("it did not answer within %v and was stopped", e.Timeout)
}

// A Process is a running module process. Its methods may be called from any goroutine.
type Process struct {
	name    string
	timeout time.Duration // of the configuration; 0: the timeouts of this package
	log     *slog.Logger

	cmd    *exec.Cmd
	conn   *wire.Conn
	lanes  *wire.Lanes // nil: signatures take conn
	info   wire.HelloReply
	output *output // nil in tests

	events chan struct{} // one element: slots or tokens have changed
	left   func([]wire.SlotID)
	used   atomic.Bool
	done   chan struct{}

	// sending counts the goroutines that send a cancellation. They start under mu while err is nil. The end of the
	// process waits for them.
	sending sync.WaitGroup

	mu  sync.Mutex
	err error // the reason for the end; set once

	next    uint32                  // the number of the last request
	waiting map[uint32]*pending     // by number
	queues  map[wire.TokenID]*queue // that of the zero ID is for requests about the module

	alarm   *time.Timer   // ends the process at alarmAt, the first deadline of waiting
	alarmAt time.Time     // zero: the alarm is off
	freed   time.Time     // the end of the last key generation: the module could not answer meanwhile
	gone    time.Time     // when a card has left last
	hurried time.Duration // the time to list the slots, since a card has come or gone; 0: ListTimeout
}

// A pending is a request under way. Its time goes on after the caller has left, because a module that hangs must
// end all the same. Each answer of the token gives it the whole time again: many requests to a slow card do not hang.
type pending struct {
	answer  chan wire.Frame // one element; nil: the answer comes on a lane
	queue   *queue          // of the token
	timeout time.Duration
	since   time.Time
	secret  bool                   // see confidential
	long    bool                   // the request makes a key, and no other request counts as hung meanwhile
	part    func(wire.Frame) error // takes a part of the answer; nil: the answer comes whole
	soon    time.Time              // the deadline since the card has left; zero: the card is there
}

// Info returns what the module process said of the module and of itself when it started.
func (p *Process) Info() wire.HelloReply { return p.info }

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Events returns a channel with one element, which is full after slots or tokens have changed.
func (p *Process) Events() <-chan struct{} { return p.events }

// Notify fills Events, as a change of a token would.
func (p *Process) Notify() {
	select {
	case p.events <- struct{}{}:
	default:
	}
}

// NoteUse records that the process has done what a client asked for.
func (p *Process) NoteUse() { p.used.Store(true) }

// WasUsed reports whether NoteUse was called.
func (p *Process) WasUsed() bool { return p.used.Load() }

// Done returns a channel that is closed after the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns the reason why the process ends or has ended, or nil.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Kill ends the process, and Done is closed soon after. All requests under way fail with the reason why. Kill turns
// a module's answer to one request into text. Otherwise the other requests would take it for their own answer, and a
// login would try its PIN again.
func (p *Process) Kill(why error) {
	if _, ok := errors.AsType[*wire.Error](why); ok {
		why = errors.New(why.Error())
	}
	p.fail(why)
	_ = p.cmd.Process.Kill() // fails if the process has ended
}

// fail sets the reason of the end, unless there is one, and ends all requests.
func (p *Process) fail(why error) {
	p.mu.Lock()
	if p.err == nil {
		p.err = why
	}
	for id, w := range p.waiting {
		if w.answer != nil {
			close(w.answer)
		}
		delete(p.waiting, id)
	}
	if p.alarm != nil {
		p.alarm.Stop()
	}
	var lanes []*wire.Lane
	for _, q := range p.queues {
		for _, w := range q.waiting {
			close(w)
		}
		q.waiting = nil
		for _, t := range q.turns {
			if t.lane != nil {
				lanes = append(lanes, t.lane)
			}
		}
	}
	p.mu.Unlock()
	_ = p.conn.Close() // ends read
	if p.lanes != nil {
		_ = p.lanes.Close()
	}
	for _, l := range lanes {
		_ = l.Close() // ends the requests that wait for an answer
	}
}

// read delivers answers to the requests until the connection ends.
func (p *Process) read() {
	events := pace.Limit{Burst: eventBurst, Every: eventEvery}
	for {
		f, err := p.conn.ReadFrame()
		if err != nil {
			// The kernel resets the connection of a process that dies with unread requests.
			if err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				p.Kill(fmt.Errorf("its answer made no sense: %w", err))
			}
			// The process ends soon, and Wait returns how. A process that only closed its socket is of no use
			// either.
			_ = p.cmd.Process.Kill()
			return
		}
		if f.Type == wire.TypeEvent {
			if events.Take(time.Now()) > 0 {
				p.Kill(errors.New("it reports events without end"))
				return
			}
			if e, err := f.Event(); err == nil && len(e.Gone) > 0 && p.left != nil {
				p.left(e.Gone)
			}
			p.Notify()
			continue
		}
		if f.Type == wire.TypeLost {
			why := lost(f)
			if errors.Is(why, ErrPulled) && p.left != nil {
				p.left(nil)
			}
			p.Kill(why)
			return
		}
		p.mu.Lock()
		w := p.waiting[f.ID]
		if w == nil || w.answer == nil {
			p.mu.Unlock()
			p.Kill(errors.New("it answered a question that was not asked"))
			return
		}
		now := time.Now()
		w.queue.heard = now
		if f.Type == wire.TypePart {
			p.mu.Unlock()
			if err := w.addPart(f); err != nil {
				p.Kill(fmt.Errorf("its answer made no sense: %w", err))
				return
			}
			continue
		}
		delete(p.waiting, f.ID)
		if w.long {
			p.freed = now
			p.setAlarmLocked(now)
		}
		p.mu.Unlock()
		if w.secret {
			p.output.endSecret()
		}
		w.answer <- f
	}
}

// addPart delivers a part of an answer.
func (w *pending) addPart(f wire.Frame) error {
	if w.part == nil {
		return errors.New("it came in parts")
	}
	return w.part(f)
}

// lost returns the reason that a process gives for its own end.
func lost(f wire.Frame) error {
	err := f.Decode(nil)
	switch e, ok := errors.AsType[*wire.Error](err); {
	case !ok:
		return fmt.Errorf("its answer made no sense: %w", err)
	case e.Reason == wire.ReasonOneAtATime:
		return ErrOneAtATime
	case e.Reason == wire.ReasonRenew:
		return ErrRenewed
	case e.Reason == wire.ReasonPulled:
		return ErrPulled
	case e.Function == "C_WaitForSlotEvent":
		return fmt.Errorf("it lost its readers; the agent starts a new process: %v", err)
	default:
		return fmt.Errorf("the agent starts a new process: %v", err)
	}
}
