package module

import (
	"context"
	"slices"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// A snapshot holds the numbers of all slots, and of the slots with a token.
type snapshot struct {
	all, present []uint
}

func takeSnapshot(lib *library) (*snapshot, error) {
	all, err := lib.slots(false)
	if err != nil {
		return nil, err
	}
	present, err := lib.slots(true)
	if err != nil {
		return nil, err
	}
	return &snapshot{all: all, present: present}, nil
}

func (s *snapshot) equal(o *snapshot) bool {
	return slices.Equal(s.all, o.all) && slices.Equal(s.present, o.present)
}

// changed compares the slots with those that the agent knows. If they differ, it returns
// true, and tell forgets the tokens that have gone. Otherwise changed forgets them
// itself.
func (s *server) changed(lib *library) bool {
	s.polling.Lock()
	defer s.polling.Unlock()
	now, err := takeSnapshot(lib)
	if err != nil {
		return false // the next request to the module gets the error
	}
	s.mu.Lock()
	changed := s.seen != nil && !s.seen.equal(now)
	if changed {
		for _, slot := range s.seen.present {
			if !slices.Contains(now.present, slot) && !slices.Contains(s.gone, slot) {
				s.gone = append(s.gone, slot)
			}
		}
		s.seen = now
	}
	for _, t := range s.tokens {
		if p := t.present(); p != nil && !slices.Contains(now.present, p.slot) {
			s.leaving = append(s.leaving, stay{t, p})
		}
	}
	s.mu.Unlock()
	if !changed {
		s.retireLeaving()
	}
	return changed
}

// A stay is a token and its presence in a slot.
type stay struct {
	t *token
	p *presence
}

// retireLeaving forgets the tokens that have gone. It asks the module to close their
// sessions, and the module may hang then.
func (s *server) retireLeaving() {
	s.mu.Lock()
	none := len(s.leaving) == 0
	s.mu.Unlock()
	if none {
		return
	}
	s.life.RLock() // C_Finalize must not run meanwhile
	defer s.life.RUnlock()
	s.mu.Lock()
	leaving := s.leaving
	s.leaving = nil
	s.mu.Unlock()
	for _, l := range leaving {
		l.t.retire(l.p)
	}
}

// listSlots lists the slots and tokens. It leaves out a slot that fails.
func (s *server) listSlots(ctx context.Context, lib *library, m *wire.Slots) (wire.Message, error) {
	if err := take(ctx, s.listing); err != nil {
		return nil, err
	}
	defer func() { <-s.listing }()
	if m.Reinitialize || s.down {
		if err := s.reinitialize(lib); err != nil {
			return nil, err
		}
	}
	s.life.RLock()
	defer s.life.RUnlock()
	now, err := takeSnapshot(lib)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.seen, s.gone = now, nil
	s.mu.Unlock()
	fixed := len(now.all) > 0
	reply := &wire.SlotsReply{PCSC: pcsc.Loaded()}
	for _, slot := range now.all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		w, err := s.describe(lib, slot)
		if err != nil {
			s.log.Printf("slot %d is left out: %v", slot, err)
			fixed = false
			continue
		}
		fixed = fixed && w.Flags&wire.CKFRemovableDevice == 0
		reply.Slots = append(reply.Slots, w)
	}
	s.mu.Lock()
	s.fixed = fixed
	s.mu.Unlock()
	return reply, nil
}

// reinitialize shuts the module down and starts it again, unless this would disturb a
// request or a login. The caller holds listing.
//
// If a thread is in C_WaitForSlotEvent, the agent has to replace the whole process. By
// the standard C_Finalize ends the wait. But OpenSC 0.23 frees memory that the thread
// still uses: it crashed in 2 of 300 runs.
func (s *server) reinitialize(lib *library) error {
	s.polling.Lock()
	defer s.polling.Unlock()
	if !s.life.TryLock() {
		return nil // a request is under way
	}
	keep := false
	defer func() {
		if !keep {
			s.life.Unlock()
		}
	}()
	s.mu.Lock()
	var live []*token
	for _, t := range s.tokens {
		if t.present() != nil {
			live = append(live, t)
		}
	}
	s.mu.Unlock()
	for _, t := range live {
		if in, err := t.present().loggedIn(); err == nil && in {
			return nil
		}
	}
	if !s.waiter.stayOut() {
		keep = true // no request may reach the module and then be lost
		err := &wire.Error{Reason: wire.ReasonRenew}
		s.lose(err)
		return err
	}
	for _, t := range live {
		t.retire(t.present())
	}
	if !s.down {
		if err := lib.finalize(); err != nil {
			s.waiter.resume()
			return err
		}
	}
	err := lib.initialize(s.initArgs)
	if s.down = err != nil; !s.down {
		s.waiter.resume()
	}
	return err
}

// describe reads all that the agent needs about a slot.
func (s *server) describe(lib *library, slot uint) (wire.Slot, error) {
	info, err := lib.slotInfo(slot)
	if err != nil {
		return wire.Slot{}, err
	}
	w := wire.Slot{
		ID:           uint64(slot),
		Description:  text(info.SlotDescription, maxText),
		Manufacturer: text(info.ManufacturerID, maxText),
		Flags:        uint64(info.Flags),
	}
	if w.Flags&wire.CKFTokenPresent == 0 {
		return w, nil
	}
	id, state, err := lib.tokenInfo(slot)
	switch code(err) {
	case wire.CKROK:
	case wire.CKRTokenNotPresent, wire.CKRTokenNotRecognized:
		return w, nil // the card was taken out just now, or the module does not know it
	}
	if err != nil {
		return wire.Slot{}, err
	}
	if state.Flags&wire.CKFTokenInitialized == 0 {
		return w, nil
	}
	w.HasToken, w.Token, w.Info = true, id, state
	if w.Mechanisms, err = s.mechanismsOf(lib, slot, id); err != nil {
		return wire.Slot{}, err
	}
	s.mu.Lock()
	if !s.placed[id] {
		s.slots[id] = slot
	}
	s.mu.Unlock()
	if p := s.presenceIn(slot, id); p != nil {
		// An error shows in the next request for the token.
		w.Info.LoggedIn, _ = p.loggedIn()
		w.Info.Stay = p.stay
	}
	return w, nil
}

// mechanismsOf lists the mechanisms with which a token signs, decrypts or derives. They do
// not change while the token is the same.
func (s *server) mechanismsOf(lib *library, slot uint, id wire.TokenID) ([]wire.Mechanism, error) {
	s.mu.Lock()
	known, ok := s.mechanisms[id]
	s.mu.Unlock()
	if ok {
		return known, nil
	}
	kinds, err := lib.mechanisms(slot)
	if err != nil {
		return nil, err
	}
	var list []wire.Mechanism
	for _, kind := range kinds {
		info, err := lib.mechanismInfo(slot, kind)
		switch code(err) {
		case wire.CKRMechanismInvalid:
			continue // listed, but missing: leave out only this mechanism
		}
		if err != nil {
			return nil, err
		}
		if info.Flags&(wire.CKFSign|wire.CKFDecrypt|wire.CKFDerive) != 0 {
			list = append(list, wire.Mechanism{
				Type:   uint64(kind),
				MinKey: uint64(info.MinKeySize),
				MaxKey: uint64(info.MaxKeySize),
				Flags:  uint64(info.Flags),
			})
		}
	}
	s.mu.Lock()
	s.mechanisms[id] = list
	s.mu.Unlock()
	return list, nil
}
