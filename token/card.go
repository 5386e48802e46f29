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

// A login, a PIN that is kept and the PINs that were refused belong to the card in the
// slot, not to the texts that the card shows: PIV cards without CHUID all have one serial
// number. So each look notes what tells the card from the next one. When another card may
// be in the slot, the agent forgets the login and the PINs.

// card is what tells one stay of a card in a slot from the next stay.
type card struct {
	process *process.Process // that has seen it; nil: none has
	stay    uint64           // wire.TokenInfo.Stay, of that process
	// What pcscd says of the reader. It is the same for all processes of the module.
	// reader is empty where pcscd does not tell.
	reader string
	events uint32
	shown  shown
}

// shown is what a token shows of its keys, as sorted digests.
type shown struct {
	keys  [][sha256.Size]byte // of public halves
	certs [][sha256.Size]byte // of certificates, where there is no public half
}

// shownBy returns what objects show. Certificates of authorities tell nothing: all cards
// of a company have them.
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

// shownBefore returns what keys of the list of known keys have shown.
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

// comparable tells whether both show something of the same kind.
func (s shown) comparable(o shown) bool {
	return len(s.keys) > 0 && len(o.keys) > 0 || len(s.certs) > 0 && len(o.certs) > 0
}

// overlaps tells whether both show the same key, or the same certificate.
func (s shown) overlaps(o shown) bool {
	return overlap(s.keys, o.keys) || overlap(s.certs, o.certs)
}

func overlap(a, b [][sha256.Size]byte) bool {
	return slices.ContainsFunc(a, func(d [sha256.Size]byte) bool {
		_, found := slices.BinarySearchFunc(b, d, compareDigests)
		return found
	})
}

// maxShown bounds what is remembered of a token's keys on disk.
const maxShown = 32

// text returns the first keys as text.
func (s shown) text() string {
	var all []string
	for _, d := range s.keys[:min(len(s.keys), maxShown)] {
		all = append(all, hex.EncodeToString(d[:]))
	}
	return strings.Join(all, " ")
}

// parseShown reads the text. What makes no sense is left out.
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

// isOther tells whether the token is another card than one that showed something. Only
// cards are told apart so: of a token that stays where it is all keys may be replaced.
func (t *Token) isOther(was shown) bool {
	now := t.shows()
	return t.removable() && was.comparable(now) && !was.overlaps(now)
}

// readerOf returns the reader that is a slot, as pcscd sees it. It is ok when there is one
// such reader and a card is in.
func readerOf(readers []pcsc.Reader, slot wire.Slot) (r pcsc.Reader, ok bool) {
	for _, o := range readers {
		if inReader(slot, o) {
			if r.Name != "" {
				return r, false // names that differ behind the 64 bytes of a slot
			}
			r = o
		}
	}
	return r, r.Name != "" && r.Card
}

// see notes which card a look has found, and forgets what belongs to another one. before is
// what pcscd said just before the objects were read.
func (t *Token) see(ctx context.Context, p *process.Process, reply *process.Listing, before []pcsc.Reader) {
	now := card{process: p, stay: reply.Info.Stay, shown: shownBy(reply.Objects)}
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	if r, ok := readerOf(before, slot); ok {
		after, ok := readerOf(t.module.readers(ctx), slot)
		if ok && after.Events == r.Events { // else nobody knows which card was read
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
	// What only may be another card is forgotten, and does not count as put in again.
	certain := t.card.reader != "" && now.reader != "" || now.shown.comparable(t.card.shown) && !now.shown.overlaps(t.card.shown)
	t.card = now
	t.mu.Unlock()
	if !same {
		t.replaced(ctx, certain && t.module.hadAtLastLook(t))
	}
}

// mayBe tells whether what was seen before is still there.
func (c card) mayBe(now card, removable, byPCSC bool) bool {
	known := c.shown.comparable(now.shown)
	switch {
	case known && !c.shown.overlaps(now.shown):
		return false // all keys have changed
	case c.process == nil:
		return true // nothing is known that could be another card's
	case c.reader != "" && now.reader != "":
		return c.reader == now.reader && c.events == now.events
	case c.process == now.process && c.stay == now.stay:
		return true
	case byPCSC:
		return false // pcscd could have told
	}
	return known || !removable
}

// hadAtLastLook tells whether a token was there at the last look.
func (m *module) hadAtLastLook(t *Token) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.last, t)
}

// replaced forgets what belongs to the card that was in the slot. unseen tells that a card
// was put in for certain, and that the agent has not seen the slot without one.
func (t *Token) replaced(ctx context.Context, unseen bool) {
	t.pins.Wipe()
	t.mu.Lock()
	t.retained.forget()
	t.session, t.attempted = nil, nil
	t.changes++
	if unseen {
		t.insertions++ // else the look counts it
	}
	t.mu.Unlock()
	t.module.store.stir()
	t.module.log.DebugContext(ctx, "another card is in the slot, or a card was put in again", "token", t.ID.Label, "serial", t.ID.Serial)
}

// target is the card that a PIN is for.
type target struct {
	stay  uint64 // see wire.TokenInfo
	card  uint64 // how many cards had gone before, see pin.State.Removals
	shown shown
}

// maxTargets is how often a login goes on with a new stay of the same card.
const maxTargets = 5

// settle makes sure that the card in the slot is the one that was looked at last, before
// it gets a PIN.
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

// again returns where to try a PIN that the module process has refused to try, as another
// stay has begun. It is ok for the same card only: a look for new tokens begins another stay,
// too, and a person who has put the card in again means that card by the PIN. A PIN that was
// kept is gone by then.
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
