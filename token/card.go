package token

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// A login, a kept PIN and refused PINs belong to the card in the slot, not to the texts that the
// card shows: all PIV cards without CHUID have one serial number. So each look notes what
// distinguishes the card from the next one. When another card may be in the slot, the agent forgets
// the login and the PINs.

// A card identifies one stay of a card in a slot.
type card struct {
	process *process.Process // the process that has read the card; nil: no process has
	stay    uint64           // wire.TokenInfo.Stay, of that process
	// What pcscd reports about the reader, the same for all processes of the module. reader is
	// empty if pcscd does not report it.
	reader string
	events uint32
	shown  shown
}

// shown holds what a token shows of its keys, as sorted digests.
type shown struct {
	keys  [][sha256.Size]byte // of public keys
	certs [][sha256.Size]byte // of certificates, if there is no public key
}

// shownBy returns what objects show. Certificates of authorities do not count: all cards of a
// company have them.
func shownBy(objects []wire.Object) (s shown) {
	for i := range objects {
		o := &objects[i]
		switch {
		case len(o.Modulus) > 0:
			s.keys = append(s.keys, sha256.Sum256(bytes.TrimLeft(o.Modulus, "\x00")))
		case len(o.ECPoint) > 0:
			s.keys = append(s.keys, sha256.Sum256(pairs.Points(o.ECPoint)[0]))
		}
	}
	for _, o := range objects {
		if len(s.keys) == 0 && o.Class == wire.CKOCertificate && len(o.Value) > 0 && !pairs.IsAuthority(o) {
			s.certs = append(s.certs, sha256.Sum256(o.Value))
		}
	}
	s.keys, s.certs = sorted(s.keys), sorted(s.certs)
	return s
}

// shownBefore returns what keys from the list of known keys have shown.
func shownBefore(keys []*Key) (s shown) {
	for _, k := range keys {
		s.keys = append(s.keys, sha256.Sum256(slices.Concat(k.pair.Modulus, k.pair.Point)))
	}
	s.keys = sorted(s.keys)
	return s
}

func sorted(all [][sha256.Size]byte) [][sha256.Size]byte {
	slices.SortFunc(all, compareDigests)
	return slices.Clip(all)
}

func compareDigests(a, b [sha256.Size]byte) int { return bytes.Compare(a[:], b[:]) }

// comparable reports whether both show something of the same kind.
func (s shown) comparable(o shown) bool {
	return len(s.keys) > 0 && len(o.keys) > 0 || len(s.certs) > 0 && len(o.certs) > 0
}

// overlaps reports whether both show a common key or certificate.
func (s shown) overlaps(o shown) bool {
	return overlap(s.keys, o.keys) || overlap(s.certs, o.certs)
}

func overlap(a, b [][sha256.Size]byte) bool {
	return slices.ContainsFunc(a, func(d [sha256.Size]byte) bool {
		_, found := slices.BinarySearchFunc(b, d, compareDigests)
		return found
	})
}

// maxShown bounds what the state directory remembers of a token's keys.
const maxShown = 32

// text prints the first keys.
func (s shown) text() string {
	var all []string
	for _, d := range s.keys[:min(len(s.keys), maxShown)] {
		all = append(all, hex.EncodeToString(d[:]))
	}
	return strings.Join(all, " ")
}

// parseShown reads the output of text, and ignores words that make no sense.
func parseShown(text string) (s shown) {
	for word := range strings.FieldsSeq(text) {
		var d [sha256.Size]byte
		if n, err := hex.Decode(d[:], []byte(word[:min(len(word), 2*sha256.Size)])); err == nil && n == len(d) {
			s.keys = append(s.keys, d)
		}
	}
	s.keys = sorted(s.keys)
	return s
}

// shows returns what the token shows of its keys.
func (t *Token) shows() shown {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.card.shown
}

// isOther reports whether the token is another card than the one that showed was. Only removable
// tokens count: all keys of a fixed token may be replaced.
func (t *Token) isOther(was shown) bool {
	now := t.shows()
	return t.removable() && was.comparable(now) && !was.overlaps(now)
}

// readerOf returns the reader of a slot, as pcscd sees it. ok means that there is exactly one such
// reader, with a card.
func readerOf(readers []pcsc.Reader, slot wire.Slot) (r pcsc.Reader, ok bool) {
	for _, o := range readers {
		if inReader(slot, o) {
			if r.Name != "" {
				return r, false // names that differ after the 64 bytes of a slot
			}
			r = o
		}
	}
	return r, r.Name != "" && r.Card
}

// see notes which card a look has found, and forgets what belongs to another card. before is the
// list of pcscd from just before the look.
func (t *Token) see(ctx context.Context, p *process.Process, reply *process.Listing, before []pcsc.Reader) {
	now := card{process: p, stay: reply.Info.Stay, shown: shownBy(reply.Objects)}
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	if r, ok := readerOf(before, slot); ok {
		after, ok := readerOf(t.module.readers(ctx), slot)
		if ok && after.Events == r.Events { // otherwise the card may have changed during the look
			now.reader, now.events = r.Name, r.Events
		}
	}
	byPCSC := t.module.usesReaders()
	t.mu.Lock()
	same := t.card.mayBe(now, slot.Flags&wire.CKFRemovableDevice != 0, byPCSC)
	if was := t.card; same && now.reader == "" && was.process == p && was.stay == now.stay {
		now.reader, now.events = was.reader, was.events
	}
	if !now.shown.comparable(t.card.shown) && same && len(now.shown.keys)+len(now.shown.certs) == 0 {
		now.shown = t.card.shown
	}
	// If the card only may be another one, the agent forgets the PINs, but does not count an
	// insertion.
	certain := t.card.reader != "" && now.reader != "" || now.shown.comparable(t.card.shown) && !now.shown.overlaps(t.card.shown)
	t.card = now
	t.mu.Unlock()
	if !same {
		t.replaced(ctx, certain && t.module.hadAtLastLook(t))
	}
}

// mayBe reports whether the card from before may still be there.
func (c card) mayBe(now card, removable, byPCSC bool) bool {
	known := c.shown.comparable(now.shown)
	switch {
	case known && !c.shown.overlaps(now.shown):
		return false // all keys have changed
	case c.process == nil:
		return true // the agent knows nothing of the old card
	case c.reader != "" && now.reader != "":
		return c.reader == now.reader && c.events == now.events
	case c.process == now.process && c.stay == now.stay:
		return true
	case byPCSC:
		return false // pcscd would have shown the same stay
	}
	return known || !removable
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
	t.retained.forget()
	t.session, t.attempted = nil, nil
	t.changes++
	if unseen {
		t.insertions++ // otherwise the look counts it
	}
	t.mu.Unlock()
	t.module.store.stir()
	t.module.log.DebugContext(ctx, "another card is in the slot, or a card was put in again", "token", t.ID.Label, "serial", t.ID.Serial)
}

// A target is the card that a PIN is for.
type target struct {
	stay  uint64 // see wire.TokenInfo
	card  uint64 // the number of cards that have left, see pin.State.Removals
	shown shown
}

// maxTargets is how often a login continues with a new stay of the same card.
const maxTargets = 5

// settle makes sure that the card in the slot is the card of the last look, before it gets a PIN.
func (t *Token) settle(ctx context.Context, p *process.Process, info wire.TokenInfo) (at target, err error) {
	at.card = t.pins.Removals()
	t.mu.Lock()
	was, slot := t.card, t.slot
	t.mu.Unlock()
	same := was.process == p && was.stay == info.Stay
	if r, ok := readerOf(t.module.readers(ctx), slot); ok && was.reader != "" {
		same = same && was.reader == r.Name && was.events == r.Events
	}
	if same {
		at.stay, at.shown = info.Stay, was.shown
		return at, nil
	}
	if err := t.lookAgain(ctx, p); err != nil {
		return at, err
	}
	at.card = t.pins.Removals()
	t.mu.Lock()
	at.stay, at.shown = t.card.stay, t.card.shown
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
		if kept || !was.shown.overlaps(now.shown) {
			return was, false
		}
		was.card = cards
	}
	was.stay = now.stay
	return was, true
}
