package token

import (
	"log/slog"
	"testing"

	"p11-agent/token/wire"
)

// A status never shows a module that runs with the tokens of a process that has ended, nor the reverse: both change
// under the lock of the module.
func TestStopped(t *testing.T) {
	s := Open(Options{Log: slog.New(slog.DiscardHandler)})
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, drop := range []bool{false, true} {
		m := newModule(s, ModuleSpec{Name: "m"})
		m.order = []*Token{newToken(m, wire.TokenID{Label: "t"})}
		committed := false
		m.Stopped(drop, func() {
			committed = true
			if m.mu.TryLock() {
				t.Error("the module is not locked")
				m.mu.Unlock()
			}
			m.supervisor.Status() // the lock of the supervisor comes after that of the module
		})
		if !committed || len(m.present()) == 0 != drop {
			t.Errorf("drop %v: committed is %v, and %d tokens are present", drop, committed, len(m.present()))
		}
	}
}
