package token

import (
	"context"
	"slices"

	"p11-agent/token/card"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// shows returns what the token shows of its keys.
func (t *Token) shows() card.Shown {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.card.Shown
}

// isOther reports whether the token is another card than the one that showed was. Only removable
// tokens count: all keys of a fixed token may be replaced.
func (t *Token) isOther(was card.Shown) bool {
	now := t.shows()
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
func (m *module) hadAtLastLook(t *Token) bool {
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

// A target is the card that a PIN is for.
type target struct {
	stay  uint64 // see wire.TokenInfo
	card  uint64 // the number of cards that have left, see pin.State.Removals
	shown card.Shown
}

// maxTargets is how often a login continues with a new stay of the same card.
const maxTargets = 5

// settle makes sure that the card in the slot is the card of the last look, before it gets a PIN.
func (t *Token) settle(ctx context.Context, p *process.Process, info wire.TokenInfo) (at target, err error) {
	at.card = t.pins.Removals()
	t.mu.Lock()
	was, slot := t.card, t.slot
	t.mu.Unlock()
	if was.Lasts(p, info.Stay, slot, t.module.readers.List(ctx)) {
		at.stay, at.shown = info.Stay, was.Shown
		return at, nil
	}
	if err := t.lookAgain(ctx, p); err != nil {
		return at, err
	}
	at.card = t.pins.Removals()
	t.mu.Lock()
	at.stay, at.shown = t.card.Number, t.card.Shown
	t.mu.Unlock()
	return at, nil
}

// again returns the new target for a PIN after the module process has refused to try it, because
// another stay has begun. ok is true for the same card only. A look for new tokens begins another
// stay as well. If a user has put the card in again, the typed PIN still counts; a kept PIN does
// not.
func (t *Token) again(ctx context.Context, p *process.Process, was target, kept bool) (at target, ok bool) {
	if t.lookAgain(ctx, p) != nil {
		return was, false
	}
	t.mu.Lock()
	now := t.card
	t.mu.Unlock()
	if cards := t.pins.Removals(); cards != was.card {
		if kept || !was.shown.Overlaps(now.Shown) {
			return was, false
		}
		was.card = cards
	}
	was.stay = now.Number
	return was, true
}
