// Package retention says how long the login to a token lasts: until a time after a use of a key, or
// until an event of the machine.
//
// The package compares rules and keeps the time. Package token says when a key is used, and logs
// out.
package retention

import (
	"fmt"
	"time"
)

// A Rule is how long a login lasts after the use of a key. With the zero value, the login lasts
// until the token ends it, for example when it is removed.
type Rule struct {
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
func (r Rule) EndsAt(e Event) bool {
	return e == Sleep && r.Sleep || e == ScreenLock && r.ScreenLock
}

// Stricter returns a Rule that satisfies both rules.
func (r Rule) Stricter(o Rule) Rule {
	shorter := func(a, b time.Duration) time.Duration {
		if a == 0 || b != 0 && b < a {
			return b
		}
		return a
	}
	return Rule{
		Never: r.Never || o.Never, Idle: shorter(r.Idle, o.Idle), Max: shorter(r.Max, o.Max),
		Sleep: r.Sleep || o.Sleep, ScreenLock: r.ScreenLock || o.ScreenLock,
	}
}

// A Login tells one login to a token from the next.
type Login[S comparable] struct {
	Session    S      // where the token is logged in
	Insertions uint64 // how often the token had appeared
}

// A Deadline is the time at which the login to one token ends. The zero value has no login. The
// caller guards a Deadline with a lock.
type Deadline[S comparable] struct {
	login Login[S]
	rule  Rule      // the strictest rule of the keys that were used
	since time.Time // the first signature of this login, or the login itself when it had none
	end   time.Time // zero: the login does not end by itself
	timer *time.Timer
}

// Extend notes a signature in a login, or the login itself, with a key that has the rule. The keys
// of a token share a login. So the strictest of their rules counts. continued means that the login
// may continue an earlier one without a person: then the time of the earlier login goes on.
//
// At the deadline, a goroutine of its own calls over. The caller takes the lock there, and calls
// Over.
func (d *Deadline[S]) Extend(login Login[S], rule Rule, continued bool, over func()) {
	now := time.Now()
	if d.login != login {
		if !continued || d.since.IsZero() {
			d.Clear()
			d.since = now
		}
		d.login = login
	}
	d.rule, d.end = d.rule.Stricter(rule), time.Time{}
	if d.rule.Idle > 0 {
		d.end = now.Add(d.rule.Idle)
	}
	if last := d.since.Add(d.rule.Max); d.rule.Max > 0 && (d.end.IsZero() || last.Before(d.end)) {
		d.end = last
	}
	switch {
	case d.end.IsZero():
	case d.timer == nil:
		d.timer = time.AfterFunc(d.end.Sub(now), over)
	default:
		d.timer.Reset(d.end.Sub(now))
	}
}

// Over reports whether to log out now. session is where the token is logged in. continues is as
// continued of Extend, for the next login. After an extension, Over reports false, and the
// goroutine calls over again later.
func (d *Deadline[S]) Over(session S, continues bool) bool {
	if d.timer == nil {
		return false // the login has ended meanwhile
	}
	if !continues && session != d.login.Session {
		d.Clear() // the login was lost; the current one has its own end
		return false
	}
	if wait := time.Until(d.end); wait > 0 {
		d.timer.Reset(wait)
		return false
	}
	return true
}

// Clear forgets the login and stops the time.
func (d *Deadline[S]) Clear() {
	if d.timer != nil {
		d.timer.Stop()
	}
	*d = Deadline[S]{}
}

// End returns when the login in a session ends. The time is zero if the login does not end by
// itself, or if the Deadline is not about the session.
func (d *Deadline[S]) End(session S) time.Time {
	if d.login.Session != session {
		return time.Time{}
	}
	return d.end
}
