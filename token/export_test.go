package token

// LoginWaiters returns how many wait for the login under way to the token of
// a key.
func LoginWaiters(k *Key) int {
	g := k.token.module.store.gate(k.token.ID)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flight == nil {
		return 0
	}
	return g.flight.waiters
}
