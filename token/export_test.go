package token

// LoginWaiters returns how many requests wait for the login under way to the token of a key.
func LoginWaiters(k *Key) int {
	return k.token.pins.Status().Waiters
}

// Remembered returns how much the Store remembers of a module: the number of tokens, the number of
// their keys, and about how many bytes the keys take.
func Remembered(s *Store, module string) (tokens, keys, bytes int) {
	for _, m := range s.modulesNow() {
		if m.spec.Name != module {
			continue
		}
		for _, t := range m.known() {
			n, size := t.holds()
			tokens, keys, bytes = tokens+1, keys+n, bytes+size
		}
	}
	return tokens, keys, bytes
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

// The bounds of what the Store remembers of one module.
const (
	MaxTokens     = maxTokens
	MaxModuleKeys = maxModuleKeys
	MaxKeyBytes   = maxKeyBytes
)

// The pace at which a module gets new processes in place of healthy ones.
const (
	RenewBurst = renewBurst
	RenewEvery = renewEvery
)
