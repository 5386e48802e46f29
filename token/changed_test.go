package token_test

import (
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/tokentest"
)

// StatusChanged reports each change of the state of the tokens.
func TestStatusChanged(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, nil)
	state := func() token.ModuleStatus { return b.store.Modules()[0] }
	// follow waits for the state. It looks only after StatusChanged has reported a change.
	follow := func(what string, is func(token.ModuleStatus) bool) {
		t.Helper()
		late := time.After(3 * time.Minute)
		for !is(state()) {
			select {
			case <-b.store.StatusChanged():
			case <-late:
				t.Fatalf("the store did not say that it changed: %s, %+v", what, state())
			}
		}
	}
	has := func(n int, in bool) func(token.ModuleStatus) bool {
		return func(m token.ModuleStatus) bool {
			return m.Running && m.Err == nil && len(m.Tokens) == n && (n == 0 || m.Tokens[0].LoggedIn == in)
		}
	}
	follow("the token is found", has(1, false))
	for range 2 {
		// The test drops a report of earlier changes.
		select {
		case <-b.store.StatusChanged():
		default:
		}
		b.mustSign()
		follow("a login", has(1, true))
		if err := b.store.LogoutAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		follow("all are logged out", has(1, false))
	}
	b.card.Remove()
	follow("the token is taken out", has(0, false))
	b.card.Insert()
	follow("the token is back", has(1, false))
	b.fake.Processes()[b.fake.Started()-1].Kill()
	follow("the module fails", func(m token.ModuleStatus) bool { return m.Restarts > 0 || m.Err != nil })
	follow("the module is back", has(1, false))
}
