package login

import (
	"testing"

	"p11-agent/token/process"
)

func want(t *testing.T, what string, got, want *process.Process) {
	t.Helper()
	if got != want {
		t.Errorf("%s: the wrong process is logged in", what)
	}
}

// TestLook checks what a look may tell of a login.
func TestLook(t *testing.T) {
	one := new(process.Process)
	var s State
	s.Look(s.Mark(), one, true)
	want(t, "a look shows a login", s.Process(), one)
	since := s.Since()
	s.Look(s.Mark(), one, true)
	if since.IsZero() || s.Since() != since {
		t.Error("the login begins again")
	}
	s.Look(s.Mark(), new(process.Process), false)
	want(t, "another process has no login", s.Process(), one)
	s.Look(s.Mark(), one, false)
	want(t, "a look shows no login", s.Process(), nil)
	if !s.Since().IsZero() {
		t.Error("the login that has ended has a time")
	}
	for name, event := range map[string]func(*State){
		"login":         func(s *State) { s.Begin(new(process.Process)) },
		"end":           func(s *State) { s.End(one) },
		"logout":        func(s *State) { s.Logout() },
		"card left":     (*State).CardLeft,
		"card replaced": (*State).CardReplaced,
	} {
		var s State
		mark := s.Mark()
		event(&s)
		now := s.Process()
		s.Look(mark, one, true)
		want(t, "a look from before: "+name, s.Process(), now)
	}
}

func TestBegin(t *testing.T) {
	one := new(process.Process)
	var s State
	s.Try(one)
	want(t, "a login under way", s.Process(), nil)
	want(t, "a login under way is possible", s.Possible(), one)
	s.Refused()
	want(t, "a refused login", s.Possible(), nil)
	s.Begin(one)
	s.Begin(one)
	want(t, "a login", s.Process(), one)
	if s.Number() != 2 {
		t.Errorf("the login has number %d", s.Number())
	}
	s.End(new(process.Process))
	want(t, "another process is logged out", s.Process(), one)
	s.End(one)
	want(t, "it is logged out", s.Process(), nil)
}

func TestLogout(t *testing.T) {
	one := new(process.Process)
	var s State
	s.Begin(one)
	p, done := s.Logout()
	want(t, "the process to log out", p, one)
	want(t, "during the logout", s.Process(), nil)
	s.Look(s.Mark(), one, true) // reads the token just before the logout
	done()
	want(t, "after the logout", s.Process(), nil)

	s.Begin(one)
	_, done = s.Logout()
	s.Begin(one)
	done()
	want(t, "after a new login", s.Process(), one)
}

func TestEndWith(t *testing.T) {
	one, other := new(process.Process), new(process.Process)
	var s State
	s.Begin(one)
	s.Try(other)
	if s.EndWith(new(process.Process)) || !s.EndWith(other) || !s.EndWith(one) || s.EndWith(one) {
		t.Error("the wrong processes may be logged in")
	}
	want(t, "both have ended", s.Possible(), nil)
}

func TestCardLeft(t *testing.T) {
	one := new(process.Process)
	var s State
	s.Begin(one)
	s.CardLeft()
	s.CardLeft()
	want(t, "the card has left", s.Possible(), nil)
	if !s.TakeStale(one) || s.TakeStale(one) {
		t.Error("the process of the login is not reported once")
	}
	s.Begin(one)
	s.CardReplaced()
	want(t, "another card", s.Possible(), nil)
	if s.TakeStale(one) {
		t.Error("the process of the old card is reported")
	}
}
