package token

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"p11-agent/token/process"
)

// Retention is how long a login lasts after the use of a key. The zero value is
// for as long as the token keeps it: until it is removed.
type Retention struct {
	// Never ends the login after each signature.
	Never bool
	// Idle ends it so long after the last signature, Max so long after the first, or
	// after a login that was for none; 0: neither does.
	Idle, Max time.Duration
	// Sleep and ScreenLock end it at these Events.
	Sleep, ScreenLock bool
}

// An Event is something that logins may end at.
type Event int

// The Events.
const (
	Sleep      Event = iota + 1 // the machine is about to sleep
	ScreenLock                  // the person's screen is locked
)

// String says what happens.
func (e Event) String() string {
	switch e {
	case Sleep:
		return "the machine goes to sleep"
	case ScreenLock:
		return "the screen is locked"
	}
	return fmt.Sprintf("event %d", int(e))
}

// EndsAt tells whether logins end at an Event.
func (r Retention) EndsAt(e Event) bool {
	return e == Sleep && r.Sleep || e == ScreenLock && r.ScreenLock
}

// Stricter returns what keeps both rules.
func (r Retention) Stricter(o Retention) Retention {
	shorter := func(a, b time.Duration) time.Duration {
		if a == 0 || b != 0 && b < a {
			return b
		}
		return a
	}
	return Retention{
		Never: r.Never || o.Never, Idle: shorter(r.Idle, o.Idle), Max: shorter(r.Max, o.Max),
		Sleep: r.Sleep || o.Sleep, ScreenLock: r.ScreenLock || o.ScreenLock,
	}
}

// retained is what is to be kept of the logins of one token.
type retained struct {
	rule       Retention // the strictest of the keys that were used
	since      time.Time // the first signature of this login, or the login itself if that was not for one
	end        time.Time // when to log out; zero: not at all
	timer      *time.Timer
	session    *process.Process // with insertions, tells one login from the next
	insertions uint64
}

// used notes that a key has signed, and logs out when it is to do so at once.
// Keys of one token share a login, and so the strictest of their rules.
func (t *Token) used(ctx context.Context, k *Key) {
	s := t.module.store
	r := s.policyOf(k).Retention
	if r.Never {
		// The signature is made: whether its client still waits does not matter.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), process.LoginTimeout)
		defer cancel()
		t.end(ctx)
		return
	}
	t.retain(k)
}

// retain has the login end as the Retention of a key says, which is used now or for
// which somebody has logged in. One that is to end with each signature ends with the
// next.
func (t *Token) retain(k *Key) {
	s := t.module.store
	r := s.policyOf(k).Retention
	kept := t.pins.KeptSince()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.session == nil {
		return
	}
	now, was := time.Now(), &t.retained
	if was.session != t.session || was.insertions != t.insertions {
		if kept.IsZero() || was.since.IsZero() {
			was.forget()
			was.since = now
		} // else it is the same login still, made again with the PIN that is kept
		was.session, was.insertions = t.session, t.insertions
	}
	was.rule, was.end = was.rule.Stricter(r), time.Time{}
	if was.rule.Idle > 0 {
		was.end = now.Add(was.rule.Idle)
	}
	if last := was.since.Add(was.rule.Max); was.rule.Max > 0 && (was.end.IsZero() || last.Before(was.end)) {
		was.end = last
	}
	switch {
	case was.end.IsZero():
	case was.timer == nil:
		was.timer = time.AfterFunc(was.end.Sub(now), func() { _ = s.start(t.expire) })
	default:
		was.timer.Reset(was.end.Sub(now))
	}
}

// forget ends the timer. Its token's mu is held.
func (r *retained) forget() {
	if r.timer != nil {
		r.timer.Stop()
	}
	*r = retained{}
}

// expire logs out, unless a signature has put that off just now.
func (t *Token) expire() {
	kept := t.pins.KeptSince()
	t.mu.Lock()
	wait := time.Until(t.retained.end)
	if t.retained.timer == nil {
		t.mu.Unlock()
		return // logged out meanwhile
	}
	if kept.IsZero() && t.session != t.retained.session {
		t.retained.forget() // the login was lost, and this one is another
		t.mu.Unlock()
		return
	}
	if wait > 0 {
		t.retained.timer.Reset(wait)
		t.mu.Unlock()
		return
	}
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.module.store.ctx, process.LoginTimeout)
	defer cancel()
	if t.end(ctx) {
		t.module.log.Info("logged out: the login has lasted as long as configured", "token", t.ID.Label)
	}
}

// end logs out and forgets the PIN. A module that cannot be asked has lost the
// login, or is about to be killed with it. It reports whether that was done.
func (t *Token) end(ctx context.Context) bool {
	err := t.forget(ctx)
	if err != nil && t.module.store.ctx.Err() == nil {
		t.module.log.Warn("cannot log out", "token", t.ID.Label, "reason", err)
	}
	return err == nil
}

// Forget logs out of every token with a key whose Retention ends at the Event,
// used or not, and so makes the next signature ask for the PIN. It returns when
// that is done. A module that cannot do it before ctx ends, or fails to, is
// stopped: with its process its logins end. It delays no other.
func (s *Store) Forget(ctx context.Context, e Event) {
	var wg sync.WaitGroup
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			if t.endsAt(e) {
				wg.Go(func() { t.forgetAt(ctx, e) })
			}
		}
	}
	wg.Wait()
}

// Forgets tells whether Forget logs out of the token of a key.
func (s *Store) Forgets(k *Key, e Event) bool { return k.token.endsAt(e) }

// endsAt tells whether logins to the token end at an Event: those of one of its
// keys do.
func (t *Token) endsAt(e Event) bool {
	return slices.ContainsFunc(t.keyList(), func(k *Key) bool { return t.module.store.policyOf(k).EndsAt(e) })
}

func (t *Token) forgetAt(ctx context.Context, e Event) {
	t.pins.ForgetKept()
	t.mu.Lock()
	p, in := cmp.Or(t.session, t.attempted), t.session != nil
	t.mu.Unlock()
	if p == nil {
		return
	}
	log := t.module.log.With("token", t.ID.Label, "reason", e.String())
	if err := t.forget(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.New("it did not answer in time")
		}
		log.Warn("cannot log out, the module is stopped", "error", err)
		p.Kill(fmt.Errorf("it did not log out: %w", err))
		return
	}
	if in {
		log.Info("logged out")
	}
}
