package token

import (
	"context"
	"slices"

	"p11-agent/token/card"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// Several present tokens may show the same four texts. The agent tells them apart by their keys,
// and by their slots if they show the same keys or none. It numbers them (wire.TokenID.Twin). A
// number stays with its keys, in all modules, for as long as the agent remembers the token. Prompts
// and lists name the reader instead.

// numbering numbers the tokens in slots. p reads their objects if several tokens have the same texts.
func (m *moduleState) numbering(ctx context.Context, p *process.Process, slots []wire.Slot) *card.Numbering {
	return card.NewNumbering(slots, m.twins, func(slot wire.Slot) (card.Shown, error) {
		reply, err := p.Objects(ctx, &wire.Objects{Token: slot.Token.Texts(), Slot: slot.ID, Peek: true})
		if err != nil {
			return card.Shown{}, err
		}
		return card.ShownBy(reply.Objects), nil
	})
}

// twins returns all remembered tokens with some texts, as the module needs them to number its own.
func (m *moduleState) twins(texts wire.TokenID) (all []card.Twin) {
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
