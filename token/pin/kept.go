package pin

import (
	"time"

	"p11-agent/pinentry/secret"
)

// maxRetries is how often the agent tries a kept PIN again after it lost a login. A pull and
// the return of a card may each cost a login of another card.
const maxRetries = 2

// A keptPIN is the PIN that was right last, in locked memory. State.mu guards it.
type keptPIN struct {
	pin   *secret.Secret // nil: none is kept
	since time.Time      // when the PIN was given
	lost  int            // the logins with the PIN that were lost since it was right: see retry
}

// keep keeps a PIN that was right. removals is State.Removals before the token got the PIN:
// when the card has left since, the PIN is not kept. The PIN stays the caller's.
func (s *State) keep(pin *secret.Secret, removals uint64) error {
	c, err := pin.Clone()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.removals != removals {
		c.Wipe()
		return nil
	}
	if s.kept.pin == nil {
		s.kept.since = time.Now()
	}
	s.kept.pin.Wipe()
	s.kept.pin, s.kept.lost = c, 0
	return nil
}

// copyKept returns a copy of the kept PIN, which the caller wipes. It returns nil when no PIN
// is kept. It also returns nil when a login with the PIN was lost and the token shows a wrong
// try: that PIN may be the wrong one.
func (s *State) copyKept(tries Tries) (*secret.Secret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept.pin == nil || s.kept.lost > 0 && tries != TriesUnknown {
		return nil, nil
	}
	return s.kept.pin.Clone()
}

// retry notes that a login with the kept PIN was lost: its module process ended for another
// card or request, and the token may have got the PIN. It tells whether the agent may try the
// PIN again.
func (s *State) retry() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept.lost++
	return s.kept.pin != nil && s.kept.lost <= maxRetries
}

// KeptSince tells when the kept PIN was given; zero: no PIN is kept.
func (s *State) KeptSince() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept.pin == nil {
		return time.Time{}
	}
	return s.kept.since
}

// ForgetKept wipes the kept PIN.
func (s *State) ForgetKept() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept.pin.Wipe()
	s.kept.pin = nil
}

// refuse remembers that the token refused a PIN. It forgets the kept PIN: that is the same
// PIN, or it is out of date.
func (s *State) refuse(pin *secret.Secret, tries Tries) {
	s.ForgetKept()
	s.device.refuse(pin, s.module, tries)
}

// wasRefused tells whether the token refused a PIN a moment ago, through any module.
func (s *State) wasRefused(pin *secret.Secret, tries Tries) bool {
	return s.device.wasRefused(pin, s.module, tries)
}

// forgetRefusals forgets the PINs that the token refused through this module.
func (s *State) forgetRefusals() {
	s.device.forget(func(r refusal) bool { return r.module == s.module })
}

// Wipe forgets every PIN of the token through this module, because its card has left.
func (s *State) Wipe() {
	s.mu.Lock()
	s.removals++
	s.mu.Unlock()
	s.ForgetKept()
	s.forgetRefusals()
}
