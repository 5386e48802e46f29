package token

import (
	"context"

	"p11-agent/token/bounds"
	"p11-agent/token/supervise"
)

// LoginWaiters returns how many requests wait for the login under way to the token of a key.
func LoginWaiters(k *Key) int {
	return k.token.pins.Status().Waiters
}

// Remembered returns how much the Store remembers of a module: the number of tokens, and the size of
// their objects.
func Remembered(s *Store, module string) (tokens int, size bounds.Size) {
	for _, m := range s.modulesNow() {
		if m.spec.Name != module {
			continue
		}
		for _, t := range m.known() {
			tokens, size = tokens+1, size.Plus(t.holds())
		}
	}
	return tokens, size
}

// Certificates returns the labels of the certificates that the Store keeps of a token, and how many
// public keys it keeps.
func Certificates(k *Key) (labels []string, keys int) {
	k.token.mu.Lock()
	set := k.token.objects
	k.token.mu.Unlock()
	for c := range set.Certificates() {
		labels = append(labels, c.Label)
	}
	for range set.PublicKeys() {
		keys++
	}
	return labels, keys
}

// Shared returns for how many tokens the Store remembers refused PINs and homes. queues is the
// number of queues of the module's process.
func Shared(s *Store, module string) (devices, homes, queues int) {
	devices = s.devices.Len()
	s.mu.Lock()
	homes = len(s.homes.All())
	s.mu.Unlock()
	now, cancel := context.WithCancel(context.Background())
	cancel()
	for _, m := range s.modulesNow() {
		if m.spec.Name != module {
			continue
		}
		if p, err := m.supervisor.Process(now); err == nil {
			queues = p.Queues()
		}
	}
	return devices, homes, queues
}

// The pace at which a module gets new processes in place of healthy ones.
const (
	RenewBurst = supervise.RenewBurst
	RenewEvery = supervise.RenewEvery
)

// Methods that tests find in the stacks of goroutines.
var (
	Look    = (*moduleState).Look
	TryStay = (*Token).tryStay
)
