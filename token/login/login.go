// Package login keeps what the agent knows of the login to one token, without asking the token.
//
// A login belongs to a module process, and to the card in the slot. It begins when the token takes a PIN, or when a
// look at the token shows it. It ends with a logout, with the process, or when the card leaves. A [State] takes in
// these events. A look lasts a while, and what it reports may be older than the last event: a [Mark] tells.
//
// The package promises that a State names no process that the agent has logged out, or whose card has left. Package
// token/pin gets the PIN, package token has the token try it, and package retention says when a login ends. A State
// has no lock: the caller guards it.
package login

import (
	"cmp"
	"time"

	"p11-agent/token/process"
)

// A State is what the agent knows of the login to one token. The zero State has no login.
type State struct {
	in        *process.Process // the process that is logged in, or nil
	since     time.Time        // when the agent noticed the login
	number    uint64           // of the last login that the agent has made
	changes   Mark             // counts the events that a look may miss
	attempted *process.Process // began a login, which may have succeeded
	stale     *process.Process // was logged in when the card was taken out; nil after the next look
}

// A Mark is a time between two events of a State.
type Mark uint64

// Process returns the process that is logged in, or nil.
func (s *State) Process() *process.Process { return s.in }

// Possible returns the process that is logged in, or else the process that began a login and may be logged in.
func (s *State) Possible() *process.Process { return cmp.Or(s.in, s.attempted) }

// Since returns when the agent noticed the login. It returns the zero time without a login.
func (s *State) Since() time.Time {
	if s.in == nil {
		return time.Time{}
	}
	return s.since
}

// Number returns the number of the last login that the agent has made.
func (s *State) Number() uint64 { return s.number }

// Mark returns the mark of this moment, for a look that begins now.
func (s *State) Mark() Mark { return s.changes }

// Look notes what a look at the token has shown: whether the process is logged in. from is the mark of its
// beginning. After another event, the look counts for nothing: it may have read the state before the event, or another
// card.
func (s *State) Look(from Mark, p *process.Process, in bool) {
	switch {
	case s.changes != from:
	case in:
		s.enter(p)
	case s.in == p:
		s.in = nil
	}
}

func (s *State) enter(p *process.Process) {
	if s.in != p {
		s.in, s.since = p, time.Now()
	}
}

// Try notes that the process begins a login. The process may be logged in from now on, whether or not its answer
// arrives.
func (s *State) Try(p *process.Process) { s.attempted = p }

// Refused notes that the token has refused the PIN of Try.
func (s *State) Refused() { s.attempted = nil }

// Begin notes that the process is logged in.
func (s *State) Begin(p *process.Process) {
	s.changes++
	s.enter(p)
	s.number++
}

// End notes that the process is not logged in.
func (s *State) End(p *process.Process) {
	s.changes++
	if s.in == p {
		s.in = nil
	}
}

// Logout notes that a logout begins. It returns the process that may be logged in, or nil. The caller tells that
// process to log out, and then calls done.
func (s *State) Logout() (p *process.Process, done func()) {
	p = s.Possible()
	s.in, s.attempted = nil, nil
	s.changes++
	number := s.number
	return p, func() {
		s.changes++ // a look may have read the login just before the logout
		if s.in == p && s.number == number {
			s.in = nil // a look may have noted the login
		}
	}
}

// EndWith notes that the process is about to end, and reports whether it may be logged in.
func (s *State) EndWith(p *process.Process) bool {
	may := s.in == p || s.attempted == p
	if s.in == p {
		s.in = nil
	}
	if s.attempted == p {
		s.attempted = nil
	}
	return may
}

// CardLeft notes that the card has left its slot.
func (s *State) CardLeft() {
	s.changes++
	s.stale = cmp.Or(s.in, s.attempted, s.stale)
	s.in, s.attempted = nil, nil
}

// CardReplaced notes that another card is in the slot.
func (s *State) CardReplaced() {
	s.changes++
	s.in, s.attempted = nil, nil
}

// TakeStale reports whether the process was logged in when the card left. The process may not have noticed that the
// login has ended. TakeStale reports it once.
func (s *State) TakeStale(p *process.Process) bool {
	stale := s.stale == p
	s.stale = nil
	return stale
}
