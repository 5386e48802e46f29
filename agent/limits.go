package agent

import (
	"cmp"
	"slices"
	"time"

	"p11-agent/agent/request"
)

// maxRoutes bounds how many different lists of destinations one key may have: those
// of all its additions that are in force, or all that it had when it was removed.
const maxRoutes = 16

// limits are what the constraints of all additions of one key come to: the strictest
// of each. The zero value limits nothing.
type limits struct {
	confirm       bool
	certificates  bool          // the key is not shown without a certificate
	lifetime      time.Duration // as it was given; 0: none was
	expires       time.Time     // zero: never
	routes        []route       // each of them has to permit what is done
	indeterminate bool          // there were too many routes: no login is permitted
}

// limitsOf returns the limits of one addition that is made now. otherwise is the
// lifetime of an addition that comes with none; 0: for ever.
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

// permitsLogin tells whether the limits let a connection sign. login is nil when the
// data is no request to log in with this key.
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

// over tells whether a time is past. The zero time never is.
func over(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }

// looser tells whether l permits what old does not. A lifetime that is given again
// for the same time is not looser, although it ends later: old may be over.
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

// sooner returns the earlier of two times that are set.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return cmp.Or(b, a)
	}
	return a
}
