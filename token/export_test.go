package token

// LoginWaiters returns how many wait for the login under way to the token of
// a key.
func LoginWaiters(k *Key) int {
	return k.token.pins.Status().Waiters
}

// Remembered returns how much of a module the Store remembers: tokens, keys of them, and
// the bytes that those take, about.
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

// Shared returns how many tokens the Store remembers refused PINs and homes for, and how
// many queues the module's process has.
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

// The bounds of what is remembered of one module.
const (
	MaxTokens     = maxTokens
	MaxModuleKeys = maxModuleKeys
	MaxKeyBytes   = maxKeyBytes
)

// The pace at which a module gets new processes in place of those that are well.
const (
	RenewBurst = renewBurst
	RenewEvery = renewEvery
)
