package token

import (
	"context"
	"slices"

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
	var here []wire.Slot
	for _, slot := range n.slots {
		if slot.HasToken && slot.Token.Texts() == texts && len(here) < maxTwins {
			here = append(here, slot)
		}
	}
	known := m.store.twins(texts)
	if len(here) == 1 && !slices.ContainsFunc(known, func(k twin) bool { return k.number != 0 }) {
		return // the usual case
	}
	found := make(map[uint64]shown)
	for _, slot := range here {
		reply, err := p.Objects(ctx, &wire.Objects{Token: texts, Slot: slot.ID, Peek: true})
		if err == nil {
			found[slot.ID] = shownBy(reply.Objects)
		} // otherwise the slot decides, and the look returns the reason
	}
	taken := make(map[uint32]bool)
	give := func(fits func(twin, wire.Slot) bool) {
		here = slices.DeleteFunc(here, func(slot wire.Slot) bool {
			i := slices.IndexFunc(known, func(k twin) bool { return !taken[k.number] && fits(k, slot) })
			if i >= 0 {
				n.twins[slot.ID], taken[known[i].number] = known[i].number, true
			}
			return i >= 0
		})
	}
	sameKeys := func(k twin, slot wire.Slot) bool { return k.shown.overlaps(found[slot.ID]) }
	sameSlot := func(k twin, slot wire.Slot) bool { return k.module == m && k.there && k.slot == slot.ID }
	give(func(k twin, slot wire.Slot) bool { return sameKeys(k, slot) && sameSlot(k, slot) })
	give(sameKeys)
	give(sameSlot) // the keys have changed, or the token shows none
	give(func(k twin, slot wire.Slot) bool { return !k.shown.comparable(found[slot.ID]) })
	for _, slot := range here {
		free := uint32(0)
		for taken[free] || slices.ContainsFunc(known, func(k twin) bool { return k.number == free }) {
			free++
		}
		n.twins[slot.ID], taken[free] = free, true
	}
}

// A twin is a token with some texts, as a module shows it or has shown it.
type twin struct {
	number uint32
	module *module
	there  bool // at the last look
	slot   uint64
	shown  shown
}

// twins returns all remembered tokens with some texts.
func (s *Store) twins(texts wire.TokenID) (all []twin) {
	for _, m := range s.modulesNow() {
		m.mu.Lock()
		var tokens []*Token
		for id, t := range m.tokens {
			if id.Texts() == texts {
				tokens = append(tokens, t)
			}
		}
		last := m.last
		m.mu.Unlock()
		slices.SortFunc(tokens, func(a, b *Token) int { return compareIDs(a.ID, b.ID) })
		for _, t := range tokens {
			t.mu.Lock()
			k := twin{number: t.ID.Twin, module: m, slot: t.slot.ID, shown: t.card.shown}
			k.there = t.card.process != nil && slices.Contains(last, t)
			keys := t.keys
			t.mu.Unlock()
			if !k.shown.comparable(k.shown) {
				k.shown = shownBefore(keys)
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
