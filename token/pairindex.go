package token

import (
	"crypto"
	"crypto/sha256"
	"iter"

	"p11-agent/token/wire"
)

// A pairIndex finds the key pair that an object belongs to without a look at all pairs: a
// token may have thousands of them.
type pairIndex struct {
	lines map[pairKey]*pairLine
	steps int // pairs that were looked at, for tests
}

// A pairKey is what pairs have in common.
type pairKey struct {
	keyType uint64
	kind    pairKind
	sum     [sha256.Size]byte // withSum and withSumAndID
	id      string            // all but withSum
	label   string            // noPrivateLabel and noPublicLabel
}

type pairKind uint8

const (
	withSum        pairKind = iota // the public half is this
	withSumAndID                   // and so is the ID
	noPrivate                      // the private half is missing, and the ID is this
	noPrivateLabel                 // and so is the label
	noPublic                       // likewise, for the public half
	noPublicLabel
)

// A pairLine has pairs in the order in which they got there.
type pairLine struct{ pairs []*found }

func newPairIndex() *pairIndex { return &pairIndex{lines: make(map[pairKey]*pairLine)} }

// keys returns where the pair belongs.
func (f *found) keys() (all []pairKey) {
	id := string(f.id)
	if f.public != nil {
		all = append(all, pairKey{keyType: f.keyType, kind: withSum, sum: f.sum}, pairKey{keyType: f.keyType, kind: withSumAndID, sum: f.sum, id: id})
	} else {
		all = append(all, pairKey{keyType: f.keyType, kind: noPublic, id: id}, pairKey{keyType: f.keyType, kind: noPublicLabel, id: id, label: f.label})
	}
	if !f.visible {
		all = append(all, pairKey{keyType: f.keyType, kind: noPrivate, id: id}, pairKey{keyType: f.keyType, kind: noPrivateLabel, id: id, label: f.label})
	}
	return all
}

// note puts a pair into the index. It is called again when the pair has got something new.
func (x *pairIndex) note(f *found) {
	for _, key := range f.keys() {
		l := x.lines[key]
		if l == nil {
			l = new(pairLine)
			x.lines[key] = l
		}
		if n := len(l.pairs); n == 0 || l.pairs[n-1] != f {
			l.pairs = append(l.pairs, f)
		}
	}
}

// candidates returns the pairs that an object may belong to, at most a few.
func (x *pairIndex) candidates(o wire.Object, keyType uint64, pub crypto.PublicKey, sum [sha256.Size]byte) iter.Seq[*found] {
	id := string(o.ID)
	keys := []pairKey{{keyType: keyType, kind: noPrivateLabel, id: id, label: o.Label}, {keyType: keyType, kind: noPrivate, id: id}}
	if pub != nil {
		keys = []pairKey{
			{keyType: keyType, kind: withSumAndID, sum: sum, id: id},
			{keyType: keyType, kind: withSumAndID, sum: sum},
			{keyType: keyType, kind: noPublicLabel, id: id, label: o.Label},
			{keyType: keyType, kind: noPublic, id: id},
		}
		if id == "" {
			keys = append(keys, pairKey{keyType: keyType, kind: withSum, sum: sum})
		}
	}
	return func(yield func(*found) bool) {
		for _, key := range keys {
			if f := x.first(key); f != nil && !yield(f) {
				return
			}
		}
	}
}

// first returns the first pair of a line. Pairs that do not belong there any more leave it
// for good.
func (x *pairIndex) first(key pairKey) *found {
	l := x.lines[key]
	for l != nil && len(l.pairs) > 0 {
		x.steps++
		f := l.pairs[0]
		if f.belongs(key) {
			return f
		}
		l.pairs = l.pairs[1:]
	}
	return nil
}

// belongs tells whether the pair still belongs to a line that it has been put into.
func (f *found) belongs(key pairKey) bool {
	switch key.kind {
	case withSum:
		return true
	case withSumAndID:
		return string(f.id) == key.id
	case noPrivate, noPrivateLabel:
		return !f.visible && string(f.id) == key.id && (key.kind == noPrivate || f.label == key.label)
	default:
		return f.public == nil && string(f.id) == key.id && (key.kind == noPublic || f.label == key.label)
	}
}
