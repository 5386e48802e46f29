package agent

import (
	"cmp"
	"slices"
	"time"

	"p11-agent/agent/request"
)

// maxRoutes bounds the different lists of destinations of a key. They come from all its
// additions that are in force, or from those that it had when it was removed.
const maxRoutes = 16

// limits combine the constraints of all additions of a key: the strictest of each kind. The
// zero value limits nothing.
type limits struct {
	confirm       bool
	certificates  bool          // the key is not shown without a certificate
	lifetime      time.Duration // of the addition; 0: it had none
	expires       time.Time     // zero: never
	routes        []route       // each has to permit a use
	indeterminate bool          // there were too many routes: no login is permitted
}

// limitsOf returns the limits of a new addition. otherwise is its lifetime if the
// constraints have none; 0: for ever.
func limitsOf(c *request.Constraints, otherwise time.Duration) limits {
	l := limits{confirm: c.Confirm, certificates: c.CertificatesOnly, lifetime: c.Lifetime}
	if l.lifetime == 0 {
		l.lifetime = otherwise
	}
	if l.lifetime > 0 {
		l.expires = time.Now().Add(l.lifetime)
	}
	if len(c.Destinations) > 0 {
		l.routes = []route{c.Destinations}
	}
	return l
}

// and returns the limits that are as strict as both. It changes neither.
func (l limits) and(o limits) limits {
	l.confirm = l.confirm || o.confirm
	l.certificates = l.certificates || o.certificates
	if o.lifetime > 0 && (l.lifetime == 0 || o.lifetime < l.lifetime) {
		l.lifetime = o.lifetime
	}
	l.expires = sooner(l.expires, o.expires)
	l.indeterminate = l.indeterminate || o.indeterminate
	l.routes = slices.Clip(l.routes)
	for _, r := range o.routes {
		if !slices.ContainsFunc(l.routes, r.equal) {
			l.routes = append(l.routes, r)
		}
	}
	if len(l.routes) > maxRoutes {
		l.routes, l.indeterminate = l.routes[:maxRoutes], true
	}
	return l
}

// permits tells whether the limits let a connection see and change the key.
func (l *limits) permits(who *request.Caller) error {
	if l.indeterminate && (len(who.Binds) > 0 || who.BindFailed) {
		return errElsewhere
	}
	for _, r := range l.routes {
		if err := r.permits(who); err != nil {
			return err
		}
	}
	return nil
}

// permitsLogin tells whether the limits let a connection sign. login is nil if the data is
// not a login with this key.
func (l *limits) permitsLogin(who *request.Caller, login *request.Login) error {
	if l.indeterminate {
		return errElsewhere
	}
	for _, r := range l.routes {
		if err := r.permitsLogin(who, login); err != nil {
			return err
		}
	}
	return nil
}

// over tells whether a time is past. The zero time is never past.
func over(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }

// looser tells whether l permits a use that old does not permit. A new lifetime of the same
// length is not looser, although it ends later: old may be over.
func (l *limits) looser(old *limits) bool {
	return old.indeterminate ||
		old.confirm && !l.confirm ||
		old.certificates && !l.certificates ||
		old.lifetime > 0 && (l.lifetime == 0 || l.lifetime > old.lifetime) ||
		slices.ContainsFunc(old.routes, func(r route) bool { return !slices.ContainsFunc(l.routes, r.equal) })
}

// any tells whether there is a limit at all.
func (l *limits) any() bool {
	return l.confirm || l.certificates || l.lifetime > 0 || len(l.routes) > 0 || l.indeterminate
}

// route tells whether the limits depend on where the key is used.
func (l *limits) route() bool { return len(l.routes) > 0 || l.indeterminate }

// sooner returns the earlier of two times. A zero time is not set, and does not count.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return cmp.Or(b, a)
	}
	return a
}
