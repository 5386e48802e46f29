package token

import (
	"slices"

	"p11-agent/token/bounds"
	"p11-agent/token/card"
	"p11-agent/token/known"
)

// The list of known keys has room for every number that package card gives.
var _ [known.MaxTwins - card.MaxTwins]struct{}

// prune forgets absent tokens of which there are too many.
func (m *moduleState) prune() {
	s := m.store
	s.mu.Lock()
	m.mu.Lock()
	var pruned []*Token
	for _, id := range bounds.Surplus(m.absentLocked(), len(m.tokens)) {
		t := m.tokens[id]
		pruned = append(pruned, t)
		delete(m.tokens, id)
		m.insertions = max(m.insertions, t.visits.Count())
		s.homes.Forget(id, m.identity)
	}
	m.mu.Unlock()
	s.mu.Unlock()
	for _, t := range pruned {
		t.mu.Lock()
		t.deadline.Clear()
		t.mu.Unlock()
		t.pins.Close()
	}
}

// absentLocked returns the tokens that are absent and not in use. The caller holds the locks of the
// Store and of the module.
func (m *moduleState) absentLocked() (absent []bounds.Absent) {
	for id, t := range m.tokens {
		if !slices.Contains(m.order, t) && !slices.Contains(m.last, t) && !t.pins.InUse() {
			absent = append(absent, bounds.Absent{ID: id, Size: t.holds(), Home: m.store.homes.Stays(id, m.identity), Left: t.visits.Left()})
		}
	}
	return absent
}
