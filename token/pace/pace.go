// Package pace bounds how often something happens: a number of times at once, and then once in each interval.
//
// A module can lie, and tell of changes without end. The agent bounds its own work for the module with a [Limit].
// A Limit has no goroutine.
package pace

import (
	"context"
	"time"
)

// A Limit lets something happen Burst times at once, and then once in each interval Every. One goroutine uses it.
type Limit struct {
	Burst int
	Every time.Duration
	spent time.Time // the time at which all that has happened is paid for
}

// Take counts one more event at the time now, and returns how long the event has to wait.
func (l *Limit) Take(now time.Time) time.Duration {
	if l.spent.Before(now) {
		l.spent = now
	}
	l.spent = l.spent.Add(l.Every)
	return max(0, l.spent.Sub(now)-time.Duration(l.Burst)*l.Every)
}

// Wait counts one more event, and waits until it may happen. It returns false if ctx ends first.
func (l *Limit) Wait(ctx context.Context) bool {
	wait := time.NewTimer(l.Take(time.Now()))
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}
