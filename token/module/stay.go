package module

import (
	"context"

	"p11-agent/token/wire"
)

// stays fails when the PIN of a request is for another stay of a token than p. Another
// card may have come into the slot since the agent looked at the card.
func (p *presence) stays(wanted uint64) error {
	if wanted != 0 && wanted != p.stay {
		return &wire.Error{Reason: wire.ReasonOtherToken}
	}
	return nil
}

// place notes in which slot a token is. The agent tells tokens with the same texts apart
// by their keys. So the agent says which of them is in which slot.
func (s *server) place(t *token, slot uint) {
	s.mu.Lock()
	s.slots[t.id], s.placed[t.id] = slot, true
	s.mu.Unlock()
	if p := t.present(); p != nil && p.slot != slot {
		t.retire(p)
	}
}

// presenceIn returns the presence of a token with these texts in a slot, or nil.
func (s *server) presenceIn(slot uint, id wire.TokenID) *presence {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tokens {
		if p := t.present(); t.id.Texts() == id && p != nil && p.slot == slot {
			return p
		}
	}
	return nil
}

// peek reads the objects of the token in a slot. The agent uses them to identify the
// token.
func (s *server) peek(ctx context.Context, lib *library, m *wire.Objects, send func(*wire.ObjectsPart) error) (wire.Message, error) {
	p := &presence{lib: lib, slot: uint(m.Slot), id: m.Token.Texts()}
	session, info, err := p.openSession()
	if err != nil {
		return nil, err
	}
	defer func() { _ = lib.closeSession(session) }()
	r := &reading{lib: lib, session: session, log: s.log, send: send, pause: ctx.Err}
	r.begin()
	if err := r.all(nil); err != nil {
		return nil, err
	}
	return &wire.ObjectsReply{Info: info, Objects: r.part.Objects, Cut: r.cut, Long: r.long}, nil
}
