package token

import (
	"context"
	"time"
)

// Retention is how long a login lasts after the use of a key. The zero value is
// for as long as the token keeps it: until it is removed.
type Retention struct {
	// Never ends the login after each signature.
	Never bool
	// Idle ends it so long after the last signature, Max so long after the first;
	// 0: neither does.
	Idle, Max time.Duration
}

// Stricter returns what keeps both rules.
func (r Retention) Stricter(o Retention) Retention {
	shorter := func(a, b time.Duration) time.Duration {
		if a == 0 || b != 0 && b < a {
			return b
		}
		return a
	}
	return Retention{Never: r.Never || o.Never, Idle: shorter(r.Idle, o.Idle), Max: shorter(r.Max, o.Max)}
}

// retained is what is to be kept of the logins of one token.
type retained struct {
	rule       Retention // the strictest of the keys that were used
	since      time.Time // the first signature of this login
	end        time.Time // when to log out; zero: not at all
	timer      *time.Timer
	session    *process // with insertions, tells one login from the next
	insertions uint64
}

// used notes that a key has signed, and logs out when it is to do so at once.
// Keys of one token share a login, and so the strictest of their rules.
func (t *Token) used(ctx context.Context, k *Key) {
	s := t.module.store
	r := s.policyOf(k).Retention
	if r.Never {
		// The signature is made: whether its client still waits does not matter.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loginTimeout)
		defer cancel()
		t.end(ctx)
		return
	}
	kept := s.gate(t.ID).keptSince()
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
		was.timer = time.AfterFunc(was.end.Sub(now), func() { s.goWhileOpen(t.expire) })
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
	kept := t.module.store.gate(t.ID).keptSince()
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
	ctx, cancel := context.WithTimeout(t.module.store.ctx, loginTimeout)
	defer cancel()
	t.end(ctx)
	t.module.log.Info("logged out: the login has lasted as long as configured", "token", t.ID.Label)
}

// end logs out and forgets the PIN. A module that cannot be asked has lost the
// login, or is about to be killed with it.
func (t *Token) end(ctx context.Context) {
	if err := t.forget(ctx); err != nil {
		t.module.log.Warn("cannot log out", "token", t.ID.Label, "reason", err)
	}
}
