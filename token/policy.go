package token

// A Policy is what the configuration says about the PIN of a key's token. The
// zero value is the usual one: the token's own login is used for as long as it
// lasts, no PIN is kept, and the token's flags are believed.
type Policy struct {
	Retention
	// Remember keeps the PIN that a person gave in locked memory, to log in again
	// after the login was lost to another program or to a reset. It is forgotten
	// with the login, when the token is removed, and at the first refusal.
	Remember bool
	// Reuse takes the PIN that is kept for a key that wants it for each signature,
	// in place of asking each time. It does nothing without Remember.
	Reuse bool
	// Pad says whether the PIN is typed on the reader, against what the token's
	// flags say (CKF_PROTECTED_AUTHENTICATION_PATH). nil: they are right.
	Pad *bool
}

// SetPolicy replaces Options.Policy, for what follows.
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
