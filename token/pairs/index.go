package pairs

import (
	"crypto"
	"crypto/sha256"
	"iter"

	"p11-agent/token/wire"
)

// An index finds the pairs that an object may belong to. It does not walk through all pairs, because a token may
// hold thousands.
type index struct {
	lists map[indexKey]*indexList
	steps int // the pairs that first has checked; for tests
}

// An indexKey holds what the pairs of one list have in common.
type indexKey struct {
	keyType uint64
	kind    listKind
	sum     [sha256.Size]byte // withSum and withSumAndID
	id      string            // all but withSum
	label   string            // noPrivateLabel and noPublicLabel
}

type listKind uint8

const (
	withSum        listKind = iota // pairs with this public key
	withSumAndID                   // pairs with this public key and this ID
	noPrivate                      // pairs without a private key, with this ID
	noPrivateLabel                 // pairs without a private key, with this ID and label
	noPublic                       // pairs without a public key, with this ID
	noPublicLabel                  // pairs without a public key, with this ID and label
)

// An indexList holds pairs in the order in which note added them.
type indexList struct{ pairs []*Pair }

func newIndex() *index { return &index{lists: make(map[indexKey]*indexList)} }

// keys returns the lists that the pair belongs to.
func (p *Pair) keys() (all []indexKey) {
	id := string(p.ID)
	if p.Public != nil {
		all = append(all, indexKey{keyType: p.KeyType, kind: withSum, sum: p.Sum}, indexKey{keyType: p.KeyType, kind: withSumAndID, sum: p.Sum, id: id})
	} else {
		all = append(all, indexKey{keyType: p.KeyType, kind: noPublic, id: id}, indexKey{keyType: p.KeyType, kind: noPublicLabel, id: id, label: p.Label})
	}
	if !p.Visible {
		all = append(all, indexKey{keyType: p.KeyType, kind: noPrivate, id: id}, indexKey{keyType: p.KeyType, kind: noPrivateLabel, id: id, label: p.Label})
	}
	return all
}

// note adds a pair to its lists. The caller calls it again after each change of the pair.
func (x *index) note(p *Pair) {
	for _, key := range p.keys() {
		l := x.lists[key]
		if l == nil {
			l = new(indexList)
			x.lists[key] = l
		}
		if n := len(l.pairs); n == 0 || l.pairs[n-1] != p {
			l.pairs = append(l.pairs, p)
		}
	}
}

// candidates returns the few pairs that an object may belong to, one of each list.
func (x *index) candidates(o wire.Object, keyType uint64, pub crypto.PublicKey, sum [sha256.Size]byte) iter.Seq[*Pair] {
	id := string(o.ID)
	keys := []indexKey{{keyType: keyType, kind: noPrivateLabel, id: id, label: o.Label}, {keyType: keyType, kind: noPrivate, id: id}}
	if pub != nil {
		keys = []indexKey{
			{keyType: keyType, kind: withSumAndID, sum: sum, id: id},
			{keyType: keyType, kind: withSumAndID, sum: sum},
			{keyType: keyType, kind: noPublicLabel, id: id, label: o.Label},
			{keyType: keyType, kind: noPublic, id: id},
		}
		if id == "" || o.Class == wire.CKOCertificate { // a certificate may have another ID than its key
			keys = append(keys, indexKey{keyType: keyType, kind: withSum, sum: sum})
		}
	}
	return func(yield func(*Pair) bool) {
		for _, key := range keys {
			if p := x.first(key); p != nil && !yield(p) {
				return
			}
		}
	}
}

// first returns the first pair of a list. It removes pairs that have changed and no longer belong to the list.
func (x *index) first(key indexKey) *Pair {
	l := x.lists[key]
	for l != nil && len(l.pairs) > 0 {
		x.steps++
		p := l.pairs[0]
		if p.belongs(key) {
			return p
		}
		l.pairs = l.pairs[1:]
	}
	return nil
}

// belongs reports whether the pair still belongs to a list that note has added it to.
func (p *Pair) belongs(key indexKey) bool {
	switch key.kind {
	case withSum:
		return true
	case withSumAndID:
		return string(p.ID) == key.id
	case noPrivate, noPrivateLabel:
		return !p.Visible && string(p.ID) == key.id && (key.kind == noPrivate || p.Label == key.label)
	default:
		return p.Public == nil && string(p.ID) == key.id && (key.kind == noPublic || p.Label == key.label)
	}
}
