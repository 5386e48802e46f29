package agent

import (
	"testing"
	"time"
)

// Alive returns when the lock of the keyring is free. It uses no token.
func TestAlive(t *testing.T) {
	f := newFixture(Options{}, edKey("pkcs11:token=a"))
	f.tokens.mu.Lock()
	pokes, rescans := f.tokens.pokes, f.tokens.rescans
	f.tokens.mu.Unlock()
	f.Alive()
	f.tokens.mu.Lock()
	if f.tokens.pokes != pokes || f.tokens.rescans != rescans {
		t.Error("tokens were looked at")
	}
	f.tokens.mu.Unlock()

	f.mu.Lock()
	alive := make(chan struct{})
	go func() {
		f.Alive()
		close(alive)
	}()
	select {
	case <-alive:
		t.Error("a keyring that is stuck is alive")
	case <-time.After(50 * time.Millisecond): // it would have been
	}
	f.mu.Unlock()
	<-alive
}
