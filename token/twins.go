package token

import (
	"context"
	"maps"
	"slices"

	"p11-agent/token/card"
	"p11-agent/token/known"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// Several present tokens may show the same four texts. The agent tells them apart by their keys,
// and by their slots if they show the same keys or none. It numbers them (wire.TokenID.Twin). A
// number stays with its keys, in all modules, for as long as the agent remembers the token. Prompts
// and lists name the reader instead.

// maxTwins bounds the numbers.
const maxTwins = known.MaxTwins

// A numbering numbers the tokens of one look.
type numbering struct {
	module *module
	slots  []wire.Slot
	twins  map[uint64]uint32 // by slot
	done   map[wire.TokenID]bool
}

func (m *module) numbering(slots []wire.Slot) *numbering {
	return &numbering{module: m, slots: slots, twins: make(map[uint64]uint32), done: make(map[wire.TokenID]bool)}
}

// name returns the name of the token in a slot, with its number.
func (n *numbering) name(ctx context.Context, p *process.Process, slot wire.Slot) wire.TokenID {
	if texts := slot.Token.Texts(); !n.done[texts] {
		n.done[texts] = true
		n.number(ctx, p, texts)
	}
	id := slot.Token
	id.Twin = n.twins[slot.ID]
	return id
}

// number numbers all tokens with the same texts.
func (n *numbering) number(ctx context.Context, p *process.Process, texts wire.TokenID) {
	m := n.module
	var here []uint64
	for _, slot := range n.slots {
		if slot.HasToken && slot.Token.Texts() == texts && len(here) < maxTwins {
			here = append(here, slot.ID)
		}
	}
	known := m.twins(texts)
	if len(here) == 1 && !slices.ContainsFunc(known, func(k card.Twin) bool { return k.Number != 0 }) {
		return // the usual case
	}
	shown := make(map[uint64]card.Shown)
	for _, slot := range here {
		reply, err := p.Objects(ctx, &wire.Objects{Token: texts, Slot: slot, Peek: true})
		if err == nil {
			shown[slot] = card.ShownBy(reply.Objects)
		} // otherwise the slot decides, and the look returns the reason
	}
	maps.Copy(n.twins, card.Number(here, shown, known))
}

// twins returns all remembered tokens with some texts, as the module needs them to number its own.
func (m *module) twins(texts wire.TokenID) (all []card.Twin) {
	for _, o := range m.store.modulesNow() {
		o.mu.Lock()
		var tokens []*Token
		for id, t := range o.tokens {
			if id.Texts() == texts {
				tokens = append(tokens, t)
			}
		}
		last := o.last
		o.mu.Unlock()
		slices.SortFunc(tokens, func(a, b *Token) int { return a.ID.Compare(b.ID) })
		for _, t := range tokens {
			t.mu.Lock()
			k := card.Twin{Number: t.ID.Twin, Slot: t.slot.ID, Shown: t.card.Shown}
			k.Placed = o == m && t.card.Process != nil && slices.Contains(last, t)
			set := t.objects
			t.mu.Unlock()
			if !k.Shown.Comparable(k.Shown) {
				k.Shown = card.ShownOf(set.Pairs())
			}
			all = append(all, k)
		}
	}
	return all
}

// reader returns the description of the token's slot if another token with the same texts is
// present. Otherwise it returns "", because the name is enough.
func (t *Token) reader() string {
	s := t.module.store
	for _, m := range s.modulesNow() {
		for _, o := range m.present() {
			if o.ID != t.ID && o.ID.Texts() == t.ID.Texts() {
				t.mu.Lock()
				defer t.mu.Unlock()
				return t.slot.Description
			}
		}
	}
	return ""
}
