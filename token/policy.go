package token

import (
	"p11-agent/token/retention"
)

// A Policy is what the configuration says about the PIN of a key's token. With the zero value, a
// login lasts as long as the token keeps it, no PIN is kept, and the flags of the token count.
type Policy struct {
	// Retention says how long a login lasts.
	Retention retention.Rule
	// Remember keeps the PIN that a person gave in locked memory. The agent logs in again with it
	// when another program or a reset has ended the login. The agent forgets the PIN at a logout,
	// when the token is removed, and at the first refusal.
	Remember bool
	// Reuse takes the kept PIN for a key that wants its PIN for each signature, in place of asking
	// each time. It does nothing without Remember.
	Reuse bool
	// Pad says whether the person types the PIN on the reader. nil: the flags of the token say so
	// (CKF_PROTECTED_AUTHENTICATION_PATH).
	Pad *bool
}

// SetPolicy replaces Options.Policy. It counts for the next requests.
func (s *Store) SetPolicy(f func(*Key) Policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy = f
}

// policyOf returns the Policy of a key.
func (s *Store) policyOf(k *Key) Policy {
	s.mu.Lock()
	f := s.policy
	s.mu.Unlock()
	if f == nil {
		return Policy{}
	}
	return f(k)
}
