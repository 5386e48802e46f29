package token

import (
	"slices"
	"time"

	"p11-agent/token/known"
	"p11-agent/token/objects"
	"p11-agent/token/wire"
)

// KnownKeys is what a Store does with the list of known keys (package known).
type KnownKeys int

// The values of KnownKeys.
const (
	KnownIgnored KnownKeys = iota // the Store neither reads nor writes the list
	KnownRead                     // the Store reads the list
	KnownKept                     // the Store reads the list, and writes it when it changes
)

// restore makes the tokens of the list known to the module. A token that was present when
// the list was written counts as present until the first look at the module. So the keys
// listed right after the start of the agent are those listed at its end.
func (m *moduleState) restore(all []known.Token) {
	for i := range all {
		t := &all[i]
		if m.tokens[t.ID()] != nil {
			continue
		}
		restored := newToken(m, t.ID())
		restored.visits.Restore(0, t.Seen)
		if t.Login {
			restored.slot.Info.Flags = wire.CKFLoginRequired
		}
		restored.holdLocked(objects.Known(t.Pairs()))
		m.tokens[restored.ID] = restored
		if t.There {
			m.order = append(m.order, restored)
		}
	}
	m.last = slices.Clone(m.order)
}

// knownNow returns the list of this moment. It has the tokens with keys, the tokens whose
// home a PIN has proved, and the tokens of modules that are missing: those come back with
// their module.
func (s *Store) knownNow() []known.Token {
	s.mu.Lock()
	homes, strangers := s.homes.All(), slices.Clone(s.known.Tokens)
	s.mu.Unlock()
	var all []known.Token
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			entry := t.entry()
			h := homes[t.ID]
			entry.Home = h.Module == m.identity
			if len(entry.Keys) > 0 || entry.Home && h.Proved {
				all = append(all, entry)
			}
		}
	}
	for _, entry := range strangers {
		entry.There = false
		entry.Home = homes[entry.ID()].Module == entry.Module
		all = append(all, entry)
	}
	return all
}

// entry returns the entry of a token.
func (t *Token) entry() known.Token {
	entry := known.Token{
		Module: t.module.identity, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model, Twin: t.ID.Twin,
		There: t.present(), Seen: t.lastSeen().UTC().Truncate(time.Second),
		Login: t.info().Flags&wire.CKFLoginRequired != 0,
	}
	for _, key := range t.keyList() {
		entry.Add(key.pair)
	}
	return entry
}
