package agent

import (
	"container/list"
	"iter"
	"sync/atomic"
	"time"
)

// softwareKeys are the private keys in memory. A request for one of them takes the same
// time, however many there are. The zero value is empty. Keyring.mu guards it.
//
// The list of keys has a limit in bytes (maxAnswer of the SSH door). So the keys of
// forwarded clients come last.
type softwareKeys struct {
	byWire    map[string]*list.Element // of own or forwarded, with a *softwareKey
	own       list.List
	forwarded list.List
	kept      budget
	change    atomic.Uint64 // counts the changes, under mu
	expires   time.Time     // no key expires before; zero: no key expires
}

// get returns the key with this wire form, or nil. It does not return expired keys.
func (m *softwareKeys) get(wire string) *softwareKey {
	e := m.byWire[wire]
	if e == nil {
		return nil
	}
	if s := e.Value.(*softwareKey); !over(s.limits.expires, time.Now()) {
		return s
	}
	return nil
}

// all returns the keys in the order of a list.
func (m *softwareKeys) all() iter.Seq[*softwareKey] {
	return func(yield func(*softwareKey) bool) {
		for _, l := range []*list.List{&m.own, &m.forwarded} {
			for e := l.Front(); e != nil; e = e.Next() {
				if !yield(e.Value.(*softwareKey)) {
					return
				}
			}
		}
	}
}

// with returns the budget after a put of the key.
func (m *softwareKeys) with(s *softwareKey) budget {
	if e := m.byWire[s.ID]; e != nil {
		old := e.Value.(*softwareKey).kept
		return m.kept.replaced(&old, s.kept)
	}
	return m.kept.replaced(nil, s.kept)
}

// put adds a key. It replaces a key with the same wire form.
func (m *softwareKeys) put(s *softwareKey) {
	m.kept = m.with(s)
	m.change.Add(1)
	m.expires = sooner(m.expires, s.limits.expires)
	if e := m.byWire[s.ID]; e != nil {
		e.Value = s
		return
	}
	if m.byWire == nil {
		m.byWire = make(map[string]*list.Element)
	}
	l := &m.own
	if s.kept.forwarded {
		l = &m.forwarded
	}
	m.byWire[s.ID] = l.PushBack(s)
}

// remove removes the key with this wire form, and returns it, or nil.
func (m *softwareKeys) remove(wire string) *softwareKey {
	e := m.byWire[wire]
	if e == nil {
		return nil
	}
	s := e.Value.(*softwareKey)
	delete(m.byWire, wire)
	m.own.Remove(e) // a list ignores the elements of the other list
	m.forwarded.Remove(e)
	m.kept.remove(s.kept)
	m.change.Add(1)
	return s
}

// expire removes the keys whose time is over.
func (m *softwareKeys) expire(now time.Time) (gone []*softwareKey) {
	if m.expires.IsZero() || now.Before(m.expires) {
		return nil
	}
	var next time.Time
	for s := range m.all() {
		if over(s.limits.expires, now) {
			gone = append(gone, s)
		} else {
			next = sooner(next, s.limits.expires)
		}
	}
	for _, s := range gone {
		m.remove(s.ID)
	}
	m.expires = next
	return gone
}
