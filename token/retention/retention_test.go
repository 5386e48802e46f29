package retention

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestStricter(t *testing.T) {
	for name, tt := range map[string]struct{ a, b, want Rule }{
		"nothing":       {},
		"one limit":     {Rule{}, Rule{Idle: time.Hour}, Rule{Idle: time.Hour}},
		"the shorter":   {Rule{Idle: time.Minute, Max: time.Hour}, Rule{Idle: time.Hour, Max: time.Minute}, Rule{Idle: time.Minute, Max: time.Minute}},
		"each event":    {Rule{Sleep: true}, Rule{ScreenLock: true}, Rule{Sleep: true, ScreenLock: true}},
		"never":         {Rule{Never: true}, Rule{Idle: time.Hour}, Rule{Never: true, Idle: time.Hour}},
		"the same rule": {Rule{Max: time.Hour}, Rule{Max: time.Hour}, Rule{Max: time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tt.a.Stricter(tt.b); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			if got := tt.b.Stricter(tt.a); got != tt.want {
				t.Errorf("the other way round: got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestEndsAt(t *testing.T) {
	for _, tt := range []struct {
		rule  Rule
		event Event
		want  bool
	}{
		{Rule{}, Sleep, false},
		{Rule{Sleep: true}, Sleep, true},
		{Rule{Sleep: true}, ScreenLock, false},
		{Rule{ScreenLock: true}, ScreenLock, true},
		{Rule{Sleep: true, ScreenLock: true}, 0, false},
	} {
		if got := tt.rule.EndsAt(tt.event); got != tt.want {
			t.Errorf("%+v, %v: %v", tt.rule, tt.event, got)
		}
	}
}

// first, second and other are sessions of the tests.
const (
	first = iota + 1
	second
	other
)

// A step of a login takes place after a time.
type step struct {
	after     time.Duration
	session   int // 0: only time passes
	inserted  uint64
	rule      Rule
	continued bool
}

// ends returns how long after the first step a login ends that lasts in a session; 0: not within a
// day.
func ends(t *testing.T, session int, kept bool, steps ...step) (after time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // of what holds the Deadline
		var d Deadline[int]
		defer d.Clear()
		start := time.Now()
		over := func() {
			mu.Lock()
			defer mu.Unlock()
			if d.Over(session, kept) && after == 0 {
				after = time.Since(start)
			}
		}
		for _, s := range steps {
			time.Sleep(s.after)
			synctest.Wait()
			if s.session != 0 {
				mu.Lock()
				d.Extend(Login[int]{s.session, s.inserted}, s.rule, s.continued, over)
				mu.Unlock()
			}
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
	})
	return after
}

func TestDeadline(t *testing.T) {
	const m, h = time.Minute, time.Hour
	for _, tt := range []struct {
		name    string
		session int
		kept    bool
		steps   []step
		want    time.Duration
	}{
		{"no rule", first, false, []step{{session: first}}, 0},
		{"idle", first, false, []step{{session: first, rule: Rule{Idle: m}}}, m},
		{"idle, and used again", first, false, []step{{session: first, rule: Rule{Idle: h}}, {after: m, session: first, rule: Rule{Idle: h}}}, h + m},
		{"max, and used again", first, false, []step{{session: first, rule: Rule{Max: h}}, {after: m, session: first, rule: Rule{Max: h}}}, h},
		{"max before idle", first, false, []step{{session: first, rule: Rule{Idle: h, Max: m}}}, m},
		{"idle before max", first, false, []step{{session: first, rule: Rule{Idle: m, Max: h}}}, m},
		{"the rule of another key", first, false, []step{{session: first, rule: Rule{Idle: m}}, {session: first}}, m},
		{"the stricter rule comes later", first, false, []step{{session: first, rule: Rule{Max: 2 * h}}, {after: h, session: first, rule: Rule{Idle: m}}}, h + m},
		{"a later login begins anew", second, false, []step{{session: first, rule: Rule{Max: h}}, {after: m, session: second, rule: Rule{Max: h}}}, h + m},
		{"an insertion begins anew", first, false, []step{{session: first, rule: Rule{Max: h}}, {after: m, session: first, inserted: 1, rule: Rule{Max: h}}}, h + m},
		{"a kept PIN continues the login", second, true, []step{{session: first, rule: Rule{Max: h}}, {after: m, session: second, rule: Rule{Max: h}, continued: true}}, h},
		{"another login lasts", other, false, []step{{session: first, rule: Rule{Max: h}}}, 0},
		{"a kept PIN may make another login", other, true, []step{{session: first, rule: Rule{Max: h}}}, h},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := ends(t, tt.session, tt.kept, tt.steps...); got != tt.want {
				t.Errorf("the login ends after %v, want %v", got, tt.want)
			}
		})
	}
}

func TestDeadlineIsCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d Deadline[int]
		d.Extend(Login[int]{Session: first}, Rule{Idle: time.Minute}, false, func() { t.Error("the time goes on") })
		if got := time.Until(d.End(first)); got != time.Minute {
			t.Errorf("the login ends in %v", got)
		}
		if !d.End(second).IsZero() {
			t.Error("a login in another session ends")
		}
		d.Clear()
		if d.Over(first, false) || !d.End(first).IsZero() {
			t.Error("the login still ends")
		}
		time.Sleep(time.Hour)
	})
}
