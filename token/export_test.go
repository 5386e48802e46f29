package token

import "p11-agent/token/bounds"

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
	homes = len(s.homes)
	s.mu.Unlock()
	for _, m := range s.modulesNow() {
		m.mu.Lock()
		p := m.proc
		m.mu.Unlock()
		if m.spec.Name == module && p != nil {
			queues = p.Queues()
		}
	}
	return devices, homes, queues
}

// The pace at which a module gets new processes in place of healthy ones.
const (
	RenewBurst = renewBurst
	RenewEvery = renewEvery
)

// Methods that tests find in the stacks of goroutines.
var (
	Look    = (*module).look
	TryStay = (*Token).tryStay
)
