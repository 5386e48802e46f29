package supervise

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"p11-agent/pinentry/plain"
	"p11-agent/token/bounds"
	"p11-agent/token/pace"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/wire"
)

// Run keeps the module running until ctx ends. Call it once.
func (s *Supervisor) Run(ctx context.Context) {
	defer close(s.ended)
	first := sync.OnceFunc(func() { close(s.tried) })
	defer first()
	var due []*lookup // the requests for a look while there was no process
	defer func() { answer(due, ErrClosed) }()
	start := s.opts.Process
	start.SlotsLeft = s.slotsLeft
	start.Starting = func(p *process.Process) { s.change(func() { s.current, s.silent = p, false }) }
	poll := start.Hello.Poll
	renewed := false // the next process does not count as a restart
	var again backoff
	renewals := pace.Limit{Burst: RenewBurst, Every: RenewEvery}
	for ctx.Err() == nil {
		began, moves := time.Now(), s.opts.Readers.Moves()
		p, err := s.start(ctx, start)
		if err == nil {
			info := p.Info()
			bounds.TrimHello(&info)
			s.tellSandbox(info.Sandbox)
			s.change(func() {
				s.info, s.pid = info, p.PID()
				if !s.released && !renewed {
					s.starts++
				}
			})
			err = s.look(ctx, p, false)
			answer(due, err)
			due = nil
			if p.Err() == nil {
				s.change(func() {
					s.proc, s.err, s.retry, s.released, s.lastUse = p, nil, time.Time{}, false, time.Now()
				})
				s.host.Ready()
				first() // otherwise stopped comes before
				var watch *readers.Watch
				if watch, due = s.attend(ctx, p); watch != nil {
					<-p.Done()
					s.change(func() { s.pid = 0 })
					due, renewed, again = s.rest(ctx, watch), false, backoff{}
					continue
				}
			}
			<-p.Done()
			err = p.Err()
		}
		if ctx.Err() != nil {
			break
		}
		if renewed = errors.Is(err, process.ErrRenewed); renewed {
			first() // the start of the agent does not wait for modules that do this at once
			renewals.Wait(ctx)
			continue
		}
		moved := s.opts.Readers.Moves() != moves
		if errors.Is(err, process.ErrPulled) || process.IsOneAtATime(err) && moved {
			// The card is the cause. Other cards may work.
			s.log.Info("starting the module again", "reason", err)
			first()
			renewals.Wait(ctx)
			continue
		}
		if process.IsOneAtATime(err) && !poll {
			// The agent has noticed this before a request had to wait.
			s.log.Info("module does one thing at a time: its slots are looked at again and again")
			renewed, poll, start.Hello.Poll = p != nil, true, true
			continue
		}
		if s.opts.Cause != nil {
			if cause := s.opts.Cause(ctx); cause != "" {
				err = fmt.Errorf("%w; %s", err, cause)
			}
		}
		if p != nil && p.WasUsed() || s.opts.Readers.Moves() != moves {
			again = backoff{} // the process was of use, or lost a card
		}
		// A module may hang while it waits for events. Polling avoids that.
		_, hung := errors.AsType[*process.HungError](err)
		start.Hello.Poll = poll || hung
		wait := again.next(time.Since(began))
		if wire.IsReason(err, wire.ReasonLoad) || wait >= restartMax && !s.everRan() {
			// A restart repairs neither the file nor a missing device, such as a TPM.
			wait = 0
		}
		s.stopped(err, wait)
		first()
		answer(due, s.Failure())
		due = s.pause(ctx, wait)
	}
	s.change(func() { s.proc, s.err, s.retry = nil, ErrClosed, time.Time{} })
}

// start starts a process of the module.
func (s *Supervisor) start(ctx context.Context, opts process.Options) (*process.Process, error) {
	p, err := process.Start(ctx, opts)
	if err != nil && !opts.Hello.Unconfined && !fitsSandbox(opts.Hello.Path) && maybeSandbox(err) {
		err = fmt.Errorf("%w; %s", err, sandboxHint)
	}
	return p, err
}

// slotsLeft hands on what the process of this moment reports.
func (s *Supervisor) slotsLeft(p *process.Process, slots []wire.SlotID) {
	if s.running() == p {
		s.host.SlotsLeft(slots)
	}
}

// tellSandbox warns once if parts of the sandbox are missing.
func (s *Supervisor) tellSandbox(box wire.Sandbox) {
	if !s.everRan() && !box.Off && !box.Whole() {
		s.log.Warn("module is not in a whole sandbox", "sandbox", plain.Output(box.String()))
	}
}

// everRan reports whether the module has ever started.
func (s *Supervisor) everRan() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.starts > 0
}

// backoff computes the pause before the next start of a process.
type backoff struct{ last time.Duration }

// next returns the pause after a process that has lived for some time.
func (b *backoff) next(lived time.Duration) time.Duration {
	if lived > healthyAfter {
		b.last = 0
	}
	b.last = min(max(2*b.last, restartMin), restartMax)
	return b.last
}

// answer sends the outcome of a look to all that wait for it.
func answer(due []*lookup, err error) {
	for _, l := range due {
		l.done <- err
	}
}

// stopped notes that there is no process, and until when. The list loses the keys of the module, except after a first
// failure: that process is back before a client lists the keys.
func (s *Supervisor) stopped(err error, wait time.Duration) {
	s.host.Stopped(!s.everRan() || wait == 0 || wait > restartMin, func() {
		s.change(func() {
			s.proc, s.err, s.retry, s.pid, s.released = nil, err, time.Time{}, 0, false
			s.lastLook = time.Now()
			if wait > 0 {
				s.retry = time.Now().Add(wait)
			}
		})
	})
	reason := err.Error()
	old := s.reason == process.WithoutOutput(err)
	s.reason = process.WithoutOutput(err)
	if old {
		reason = s.reason // the log has the output already
	}
	switch {
	case wait > 0:
		s.log.Warn("module stopped", "reason", reason, "starts again in", wait)
	case !old: // once, not for each list of the keys
		s.log.Warn("module cannot be used", "reason", reason)
	}
}

// pause waits for wait, or until a client wants the module if wait is 0. An explicit request for a look ends the pause
// in any case.
func (s *Supervisor) pause(ctx context.Context, wait time.Duration) (due []*lookup) {
	var timer <-chan time.Time
	var poked <-chan struct{}
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		timer = t.C
	} else {
		drain(s.poked) // from before this failure
		poked = s.poked
	}
	select {
	case <-ctx.Done():
	case <-timer:
	case <-poked:
	case l := <-s.wanted:
		due = append(due, l)
	}
	return due
}

// attend serves a running process until it ends. If it releases the process, it returns a watch of the readers. If a
// new process replaces it, it returns the requests for a look that the new process must answer.
func (s *Supervisor) attend(ctx context.Context, p *process.Process) (*readers.Watch, []*lookup) {
	idle := time.NewTimer(0)
	defer idle.Stop()
	var later <-chan time.Time // a look that the pace delays
	for {
		var err error
		var due []*lookup
		events := p.Events()
		if later != nil {
			events = nil
		}
		select {
		case <-ctx.Done():
			p.Kill(ErrClosed)
			return nil, nil
		case <-p.Done():
			return nil, nil
		case <-idle.C:
			watch, again := s.release(ctx, p)
			if watch != nil {
				return watch, nil
			}
			idle.Reset(again)
		case <-events:
			if wait := s.looks.Take(time.Now()); wait > 0 {
				later = time.After(wait)
				continue
			}
			err = s.look(ctx, p, false)
		case <-later:
			later = nil
			err = s.look(ctx, p, false)
		case <-s.moved:
			err = s.look(ctx, p, false)
		case <-s.poked:
			if s.mute() {
				err = s.look(ctx, p, true)
			}
		case l := <-s.wanted:
			err = s.look(ctx, p, true)
			due = append(due, l)
		}
		if errors.Is(err, process.ErrRenewed) || errors.Is(err, process.ErrPulled) {
			return nil, due
		}
		answer(due, err)
		if err != nil && ctx.Err() == nil && p.Err() == nil { // otherwise Run logs the reason
			s.log.Warn("module cannot be looked at", "reason", err)
		}
	}
}

// look has the Host look at the tokens. After a look, each reason for a failure is a new one.
func (s *Supervisor) look(ctx context.Context, p *process.Process, again bool) error {
	err := s.host.Look(ctx, p, again)
	if err == nil {
		s.reason = ""
	}
	return err
}

// mute reports whether the module has no removable slot. Then new tokens come from other programs, and the module may
// not notice them.
func (s *Supervisor) mute() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.removable && !s.info.Waits
}
