package card

import (
	"crypto/ed25519"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"p11-agent/token/pairs"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// showing returns what a token with some keys shows, one letter for each key.
func showing(keys string) Shown {
	var objects []wire.Object
	for _, k := range keys {
		objects = append(objects, wire.Object{Class: wire.CKOPublicKey, Modulus: []byte{0, byte(k)}})
	}
	return ShownBy(objects)
}

func inserted(events uint32) []pcsc.Reader {
	return []pcsc.Reader{{Name: "empty"}, {Name: "reader", Card: true, Events: events}}
}

var slot = wire.Slot{Description: "reader", Flags: wire.CKFRemovableDevice}

// stay returns the stay of a card that shows some keys. If events is not 0, pcscd reports it.
func stay(p *process.Process, number uint64, events uint32, keys string) Stay {
	s := Stay{Process: p, Number: number, Shown: showing(keys)}
	if events != 0 {
		s = s.Placed(slot, inserted(events), func() []pcsc.Reader { return inserted(events) })
	}
	return s
}

// TestNext checks when the agent takes a card for another one.
func TestNext(t *testing.T) {
	one, other := new(process.Process), new(process.Process)
	card, byPCSC := Kind{Removable: true}, Kind{Removable: true, PCSC: true}
	for _, tt := range []struct {
		name     string
		was, now Stay
		of       Kind
		want     Change
	}{
		{"the first look", Stay{}, stay(one, 1, 7, "ab"), card, Same},
		{"the first look, with keys of the list", Stay{Shown: showing("xy")}, stay(one, 1, 7, "ab"), card, Certainly},
		{"nothing has changed", stay(one, 1, 7, "ab"), stay(one, 1, 7, "ab"), byPCSC, Same},
		{"a key is new", stay(one, 1, 7, "a"), stay(one, 1, 7, "ab"), byPCSC, Same},
		{"all keys have changed", stay(one, 1, 7, "ab"), stay(one, 1, 7, "cd"), byPCSC, Certainly},
		{"all keys of a fixed token have changed", stay(one, 1, 0, "ab"), stay(one, 1, 0, "cd"), Kind{}, Certainly},
		{"it was out meanwhile", stay(one, 1, 7, "ab"), stay(one, 2, 9, "ab"), byPCSC, Certainly},
		{"another process has read it", stay(one, 1, 7, "ab"), stay(other, 4, 7, "ab"), byPCSC, Same},
		{"another process has read it, and pcscd reports no reader", stay(one, 1, 0, "ab"), stay(other, 4, 0, "ab"), byPCSC, MayBeNew},
		{"it has the keys, and pcscd is not there", stay(one, 1, 0, "ab"), stay(other, 4, 0, "ab"), card, Same},
		{"it shows no key, and pcscd is not there", stay(one, 1, 0, ""), stay(other, 4, 0, ""), card, MayBeNew},
		{"a fixed token shows no key", stay(one, 1, 0, ""), stay(other, 4, 0, ""), Kind{}, Same},
		{"pcscd was silent, and the process saw one stay", stay(one, 1, 7, "ab"), stay(one, 1, 0, "ab"), byPCSC, Same},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, got := tt.was.Next(tt.now, tt.of); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// A look that could tell less of the same card takes the rest from the look before.
func TestNextKeeps(t *testing.T) {
	p := new(process.Process)
	was := stay(p, 1, 7, "ab")
	now, _ := was.Next(stay(p, 1, 0, ""), Kind{Removable: true, PCSC: true})
	if now.place != was.place || !now.Shown.Overlaps(showing("a")) {
		t.Errorf("the reader and the keys are lost: %+v", now)
	}
	now, _ = was.Next(stay(p, 2, 0, ""), Kind{Removable: true, PCSC: true})
	if now.place.reader != "" || now.Shown.Overlaps(showing("a")) {
		t.Errorf("the new card has the reader and the keys of the old one: %+v", now)
	}
}

func TestPlaced(t *testing.T) {
	at := func(slot wire.Slot, before, after []pcsc.Reader) string {
		return Stay{}.Placed(slot, before, func() []pcsc.Reader { return after }).place.reader
	}
	if got := at(slot, inserted(7), inserted(7)); got != "reader" {
		t.Errorf("the reader is %q", got)
	}
	if got := at(slot, inserted(7), inserted(9)); got != "" {
		t.Errorf("the card may have changed during the look, and its reader is %q", got)
	}
	if got := at(wire.Slot{Description: "empty"}, inserted(7), inserted(7)); got != "" {
		t.Errorf("a reader without a card is %q", got)
	}
	long := strings.Repeat("r", 64)
	two := []pcsc.Reader{{Name: long + "1", Card: true}, {Name: long + "2", Card: true}}
	if got := at(wire.Slot{Description: long}, two, two); got != "" {
		t.Errorf("of two readers, one is taken: %q", got)
	}
	if got := at(wire.Slot{Description: long}, two[:1], two[:1]); got != two[0].Name {
		t.Errorf("the reader with the long name is %q", got)
	}
}

func TestLasts(t *testing.T) {
	one, other := new(process.Process), new(process.Process)
	s := stay(one, 1, 7, "a")
	for _, tt := range []struct {
		name    string
		process *process.Process
		number  uint64
		readers []pcsc.Reader
		want    bool
	}{
		{"the same", one, 1, inserted(7), true},
		{"pcscd does not answer", one, 1, nil, true},
		{"another process", other, 1, inserted(7), false},
		{"another stay", one, 2, inserted(7), false},
		{"another stay by pcscd", one, 1, inserted(9), false},
	} {
		if got := s.Lasts(tt.process, tt.number, slot, tt.readers); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	if !s.IsIn(inserted(7)) || s.IsIn(inserted(9)) || s.IsIn(nil) || stay(one, 1, 0, "a").IsIn(inserted(7)) {
		t.Error("it is in another reader than that of the look")
	}
}

// An authority's certificate is on all cards of a company, and tells no card from another.
func TestShown(t *testing.T) {
	if a, b := showing("abc"), showing("cd"); !a.Comparable(b) || !a.Overlaps(b) || a.Overlaps(showing("d")) {
		t.Error("common keys are not found")
	}
	if a := showing("a"); a.Comparable(Shown{}) || (Shown{}).Comparable(Shown{}) {
		t.Error("no keys are compared")
	}
	certificate := wire.Object{Class: wire.CKOCertificate, Value: []byte("one")}
	if s := ShownBy([]wire.Object{certificate}); !s.Comparable(s) || !s.Overlaps(s) {
		t.Error("a certificate without a public key is not compared")
	}
	key := wire.Object{Class: wire.CKOPublicKey, ECPoint: []byte("point")}
	if s := ShownBy([]wire.Object{certificate, key}); s.Comparable(ShownBy([]wire.Object{certificate})) {
		t.Error("a certificate beside a public key is compared")
	}
	point := ed25519.PublicKey(make([]byte, ed25519.PublicKeySize))
	if !ShownOf([]*pairs.Pair{{Point: point}}).Overlaps(ShownBy([]wire.Object{{Class: wire.CKOPublicKey, ECPoint: point}})) {
		t.Error("a known key is not that of the token")
	}
}

func TestShownText(t *testing.T) {
	all := "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	text := showing(all).String()
	if n := len(strings.Fields(text)); n != maxPrinted {
		t.Errorf("%d keys are printed", n)
	}
	if got := Parse(text + " nonsense 1234"); got.String() != text || !got.Overlaps(showing(all)) {
		t.Errorf("read again: %v", got)
	}
}

// TestNumber checks the numbers of tokens with the same texts.
func TestNumber(t *testing.T) {
	first := Twin{Number: 0, Shown: showing("a"), Placed: true, Slot: 1}
	second := Twin{Number: 1, Shown: showing("b"), Placed: true, Slot: 2}
	for _, tt := range []struct {
		name  string
		slots []uint64
		shown map[uint64]Shown
		known []Twin
		want  map[uint64]uint32
	}{
		{"none is known", []uint64{1, 2}, map[uint64]Shown{1: showing("a"), 2: showing("b")}, nil, map[uint64]uint32{1: 0, 2: 1}},
		{"they have changed places", []uint64{1, 2}, map[uint64]Shown{1: showing("b"), 2: showing("a")}, []Twin{first, second}, map[uint64]uint32{1: 1, 2: 0}},
		{"the first has left", []uint64{2}, map[uint64]Shown{2: showing("b")}, []Twin{first, second}, map[uint64]uint32{2: 1}},
		{"a third has come", []uint64{1, 2, 3}, map[uint64]Shown{1: showing("a"), 2: showing("b"), 3: showing("c")}, []Twin{first, second}, map[uint64]uint32{1: 0, 2: 1, 3: 2}},
		{"they show no keys", []uint64{2, 1}, nil, []Twin{first, second}, map[uint64]uint32{1: 0, 2: 1}},
		{"the keys of one have changed", []uint64{1, 2}, map[uint64]Shown{1: showing("x"), 2: showing("b")}, []Twin{first, second}, map[uint64]uint32{1: 0, 2: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := number(tt.slots, tt.shown, tt.known); !maps.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// TestNumbering checks that a token whose texts are its own is not read.
func TestNumbering(t *testing.T) {
	card := func(slot uint64, label string) wire.Slot {
		return wire.Slot{ID: slot, HasToken: true, Token: wire.TokenID{Label: label}}
	}
	slots := []wire.Slot{card(1, "twin"), card(2, "single"), card(3, "twin"), {ID: 4}}
	var peeked []uint64
	n := NewNumbering(slots, func(wire.TokenID) []Twin { return nil }, func(slot wire.Slot) (Shown, error) {
		peeked = append(peeked, slot.ID)
		return showing(string(rune('a' + slot.ID))), nil
	})
	var got []uint32
	for _, slot := range slots[:3] {
		got = append(got, n.Name(slot).Twin)
	}
	if !slices.Equal(got, []uint32{0, 0, 1}) || !slices.Equal(peeked, []uint64{1, 3}) {
		t.Errorf("the numbers are %v, the slots %v were read", got, peeked)
	}
}

func TestVisits(t *testing.T) {
	var v Visits
	if !v.Left().IsZero() {
		t.Error("the token left before it came")
	}
	then := time.Unix(1000, 0)
	v.Restore(7, then)
	v.Come()
	if v.Count() != 8 || !v.Left().Equal(then) {
		t.Errorf("%d visits, it left at %v", v.Count(), v.Left())
	}
	v.Leave()
	if !v.Left().After(then) {
		t.Errorf("it left at %v", v.Left())
	}
}

// TestTarget checks for which card a PIN counts after another stay has begun.
func TestTarget(t *testing.T) {
	p := new(process.Process)
	at := stay(p, 1, 7, "ab").Target(3)
	for _, tt := range []struct {
		name     string
		now      Stay
		removals uint64
		kept     bool
		want     bool
	}{
		{"a look has begun the stay", stay(p, 2, 7, "ab"), 3, false, true},
		{"a look has begun the stay, and the PIN is kept", stay(p, 2, 7, "ab"), 3, true, true},
		{"the card was put in again", stay(p, 2, 9, "ab"), 4, false, true},
		{"the card was put in again, and the PIN is kept", stay(p, 2, 9, "ab"), 4, true, false},
		{"another card was put in", stay(p, 2, 9, "cd"), 4, false, false},
		{"a card without keys was put in", stay(p, 2, 9, ""), 4, false, false},
	} {
		again, ok := at.Again(tt.now, tt.removals, tt.kept)
		if ok != tt.want {
			t.Errorf("%s: %v", tt.name, ok)
		}
		if want := map[bool]uint64{true: 2, false: 1}[ok]; again.Stay != want {
			t.Errorf("%s: the stay is %d", tt.name, again.Stay)
		}
	}
	// The card that was put in again is the target now.
	again, _ := at.Again(stay(p, 2, 9, "ab"), 4, false)
	if _, ok := again.Again(stay(p, 3, 9, "ab"), 4, true); !ok {
		t.Error("a look has begun another stay, and the PIN does not count")
	}
}
