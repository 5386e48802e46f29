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

// Retention is how long a login lasts after the use of a key. With the zero value, the login lasts
// until the token ends it, for example when it is removed.
type Retention struct {
	// Never ends the login after each signature.
	Never bool
	// Idle ends the login this long after the last signature. Max ends it this long after the
	// first signature, or after a login without a signature. 0: no limit.
	Idle, Max time.Duration
	// Sleep and ScreenLock end the login at these Events.
	Sleep, ScreenLock bool
}

// An Event is a change of the machine that may end logins.
type Event int

// The Events.
const (
	Sleep      Event = iota + 1 // the machine is about to sleep
	ScreenLock                  // the person's screen is locked
)

// String returns the Event as part of a sentence.
func (e Event) String() string {
	switch e {
	case Sleep:
		return "the machine goes to sleep"
	case ScreenLock:
		return "the screen is locked"
	}
	return fmt.Sprintf("event %d", int(e))
}

// EndsAt reports whether an Event ends the login.
func (r Retention) EndsAt(e Event) bool {
	return e == Sleep && r.Sleep || e == ScreenLock && r.ScreenLock
}

// Stricter returns a Retention that satisfies both rules.
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

// retained says how long the login of one token lasts. Token.mu guards it.
type retained struct {
	rule       Retention // the strictest rule of the keys that were used
	since      time.Time // the first signature of this login, or the login itself when it had none
	end        time.Time // when to log out; zero: never
	timer      *time.Timer
	session    *process.Process // with insertions, tells one login from the next
	insertions uint64
}

// used notes that a key has signed, and logs out when Retention.Never says so. The keys of a token
// share a login, and so the strictest of their rules.
func (t *Token) used(ctx context.Context, k *Key) {
	s := t.module.store
	r := s.policyOf(k).Retention
	if r.Never {
		// The logout goes on when the client of the signature has hung up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), process.LoginTimeout)
		defer cancel()
		t.end(ctx)
		return
	}
	t.retain(k)
}

// retain sets the end of the login by the Retention of a key, after a signature with the key or a
// login for it. With Retention.Never, the login ends after the next signature.
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
		} // else the kept PIN has renewed the same login
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

// forget stops the timer. The caller holds Token.mu.
func (r *retained) forget() {
	if r.timer != nil {
		r.timer.Stop()
	}
	*r = retained{}
}

// expire logs out, unless a signature has put off the end just now.
func (t *Token) expire() {
	kept := t.pins.KeptSince()
	t.mu.Lock()
	wait := time.Until(t.retained.end)
	if t.retained.timer == nil {
		t.mu.Unlock()
		return // the login has ended meanwhile
	}
	if kept.IsZero() && t.session != t.retained.session {
		t.retained.forget() // that login was lost; the current one has its own end
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

// end logs out and forgets the PIN. It reports whether it succeeded. When it fails, the module has
// lost the login, or loses it soon with its process.
func (t *Token) end(ctx context.Context) bool {
	err := t.forget(ctx)
	if err != nil && t.module.store.ctx.Err() == nil {
		t.module.log.Warn("cannot log out", "token", t.ID.Label, "reason", err)
	}
	return err == nil
}

// Forget logs out of every token with a key whose Retention ends at the Event, whether the key was
// used or not. So the next signature asks for the PIN. Forget returns when all tokens are logged
// out. When a module fails, or does not answer before ctx ends, Forget stops its process, which
// ends its logins. One module does not delay another.
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

// Forgets reports whether Forget logs out of the token of a key.
func (s *Store) Forgets(k *Key, e Event) bool { return k.token.endsAt(e) }

// endsAt reports whether an Event ends logins to the token, by the Retention of one of its keys.
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
			err = errors.New("the module did not answer in time")
		}
		log.Warn("cannot log out; stopping the module", "error", err)
		p.Kill(fmt.Errorf("the module did not log out: %w", err))
		return
	}
	if in {
		log.Info("logged out")
	}
}
