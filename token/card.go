package token

import (
	"context"
	"slices"

	"p11-agent/token/card"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// stay returns the card of the last look.
func (t *Token) stay() card.Stay {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.card
}

// isOther reports whether the token is another card than the one that showed was. Only removable
// tokens count: all keys of a fixed token may be replaced.
func (t *Token) isOther(was card.Shown) bool {
	now := t.stay().Shown
	return t.removable() && was.Comparable(now) && !was.Overlaps(now)
}

// see notes which card a look has found, and forgets what belongs to another card. before is the
// list of pcscd from just before the look.
func (t *Token) see(ctx context.Context, p *process.Process, reply *process.Listing, before []pcsc.Reader) {
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	found := card.Stay{Process: p, Number: reply.Info.Stay, Shown: card.ShownBy(reply.Objects)}
	found = found.Placed(slot, before, func() []pcsc.Reader { return t.module.readers.List(ctx) })
	kind := card.Kind{Removable: slot.Flags&wire.CKFRemovableDevice != 0, PCSC: t.module.readers.Used()}
	t.mu.Lock()
	now, change := t.card.Next(found, kind)
	t.card = now
	t.mu.Unlock()
	if change != card.Same {
		// If the card only may be another one, the agent forgets the PINs, but does not count an
		// insertion.
		t.replaced(ctx, change == card.Certainly && t.module.hadAtLastLook(t))
	}
}

// hadAtLastLook reports whether a token was present at the last look.
func (m *moduleState) hadAtLastLook(t *Token) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.last, t)
}

// replaced forgets what belongs to the old card in the slot. unseen means that a card was certainly
// put in, and that no look has seen the slot empty.
func (t *Token) replaced(ctx context.Context, unseen bool) {
	t.pins.Wipe()
	t.mu.Lock()
	t.deadline.Clear()
	t.logins.CardReplaced()
	if unseen {
		t.visits.Come() // otherwise the look counts it
	}
	t.mu.Unlock()
	t.module.store.stir()
	t.module.log.DebugContext(ctx, "another card is in the slot, or a card was put in again", "token", t.ID.Label, "serial", t.ID.Serial)
}

// settle makes sure that the card in the slot is the card of the last look, before it gets a PIN.
func (t *Token) settle(ctx context.Context, p *process.Process, info wire.TokenInfo) (card.Target, error) {
	removals := t.pins.Removals()
	t.mu.Lock()
	was, slot := t.card, t.slot
	t.mu.Unlock()
	if was.Lasts(p, info.Stay, slot, t.module.readers.List(ctx)) {
		return was.Target(removals), nil
	}
	if err := t.lookAgain(ctx, p); err != nil {
		return card.Target{}, err
	}
	removals = t.pins.Removals()
	return t.stay().Target(removals), nil
}

// again looks again after the module process has refused to try a PIN: see card.Target.Again.
func (t *Token) again(ctx context.Context, p *process.Process, was card.Target, kept bool) (at card.Target, ok bool) {
	if t.lookAgain(ctx, p) != nil {
		return was, false
	}
	now := t.stay()
	return was.Again(now, t.pins.Removals(), kept)
}
