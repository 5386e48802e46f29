package process

import (
	"fmt"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// The time for one request, after which its process ends. A signature or another operation with a key may wait for a
// finger on the card, a login for a PIN on the reader's keypad. A list waits for no person. OpenSC 0.23 deadlocks when a card is pulled during a
// list, and its keys are of no use until the process ends. Options.Timeout replaces all of them, but only lengthens
// GenerateTimeout.
const (
	ListTimeout  = 20 * time.Second
	LoginTimeout = 2 * time.Minute
	SignTimeout  = 2 * time.Minute
	// GenerateTimeout is for generating a key. A card may search for the primes of a long RSA key for minutes.
	GenerateTimeout = 15 * time.Minute

	startTimeout = 30 * time.Second
)

const (
	// GoneTimeout is the time for a request about a card that has left, or about all slots. A module in good health
	// fails such a request within milliseconds. A request that meets a card being pulled has 5 s in all. A new
	// process starts in 0.2 s.
	GoneTimeout = time.Second
	// OthersTimeout comes on top of GoneTimeout while the module works for a card that is still there. OpenSC does one
	// thing at a time, and that card may wait for a touch.
	OthersTimeout = 2 * time.Second
)

// addLocked adds a request to those under way.
func (p *Process) addLocked(id uint32, w *pending) {
	switch {
	case w.queue.gone:
		w.soon = w.since.Add(GoneTimeout)
	case p.hurried > 0 && w.queue == p.queues[wire.TokenID{}]:
		w.soon = w.since.Add(p.hurried)
	}
	p.waiting[id] = w
	if p.alarmAt.IsZero() || p.deadlineLocked(w).Before(p.alarmAt) {
		p.setAlarmLocked(w.since)
	}
}

// deadlineLocked returns when a request has waited too long.
func (p *Process) deadlineLocked(w *pending) time.Time {
	from := w.since
	for _, later := range []time.Time{w.queue.heard, p.freed} {
		if later.After(from) {
			from = later
		}
	}
	by := from.Add(w.timeout)
	if soon := p.soonLocked(w); !soon.IsZero() && soon.Before(by) {
		by = soon
	}
	return by
}

// soonLocked returns when a request has waited too long for a card that has left, and zero if the card is there.
func (p *Process) soonLocked(w *pending) time.Time {
	if w.soon.IsZero() {
		return w.soon
	}
	for _, o := range p.waiting {
		// A request from before the card left may be work for a card that is there. A later request may wait for the
		// same answer as w.
		if o.soon.IsZero() && o.since.Before(p.gone.Add(-pcsc.NoticeTime)) {
			return w.soon.Add(OthersTimeout)
		}
	}
	return w.soon
}

// Hurry shortens the time for all requests about cards that have left, and about the module. listing is the time to
// list the slots from now on until Calm; 0 leaves it as it is.
func (p *Process) Hurry(gone []wire.TokenID, listing time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = now
	if listing > 0 {
		p.hurried = listing
	}
	if p.err != nil {
		return
	}
	for _, id := range gone {
		if q := p.queues[id]; q != nil {
			q.gone = true
		}
	}
	for _, w := range p.waiting {
		if (w.queue.gone || w.queue == p.queues[wire.TokenID{}]) && w.soon.IsZero() {
			w.soon = now.Add(GoneTimeout)
		}
	}
	p.setAlarmLocked(now)
}

// Expect bounds the time to list the slots from now on until Calm, unless a bound is set already.
func (p *Process) Expect(listing time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hurried == 0 {
		p.hurried = listing
	}
}

// Calm gives the process its normal time to list the slots again.
func (p *Process) Calm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hurried = 0
}

// setAlarmLocked sets the alarm to the first deadline. An answer does not put the alarm off: when the alarm rings,
// hung sets it again.
func (p *Process) setAlarmLocked(now time.Time) {
	p.alarmAt = time.Time{}
	generating := p.generatingLocked()
	for _, w := range p.waiting {
		if generating && !w.long {
			continue
		}
		if d := p.deadlineLocked(w); p.alarmAt.IsZero() || d.Before(p.alarmAt) {
			p.alarmAt = d
		}
	}
	switch {
	case p.alarmAt.IsZero():
	case p.alarm == nil:
		p.alarm = time.AfterFunc(p.alarmAt.Sub(now), p.hung)
	default:
		p.alarm.Reset(p.alarmAt.Sub(now))
	}
}

// generatingLocked reports whether the module makes a key. Some modules do nothing else meanwhile, and no token does.
func (p *Process) generatingLocked() bool {
	for _, w := range p.waiting {
		if w.long {
			return true
		}
	}
	return false
}

// hung ends the process if it has not answered a request in time.
func (p *Process) hung() {
	now := time.Now()
	p.mu.Lock()
	generating := p.generatingLocked()
	for _, w := range p.waiting {
		if (w.long || !generating) && !p.deadlineLocked(w).After(now) {
			why := error(&HungError{w.timeout})
			if soon := p.soonLocked(w); !soon.IsZero() && !soon.After(now) {
				why = ErrPulled
			}
			p.mu.Unlock()
			p.Kill(fmt.Errorf("%w: %w", ErrGone, why))
			return
		}
	}
	if p.err == nil {
		p.setAlarmLocked(now)
	}
	p.mu.Unlock()
}
