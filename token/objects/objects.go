// Package objects keeps what a look finds on a token.
//
// [Read] makes a [Set] of the objects that a module shows: key pairs, and the certificates and public keys that
// belong to no key, such as those of authorities. A Set answers which pairs a URI names, or may name, without asking
// the token. Many tokens show private keys only after a login. Until then, the label and ID of a private key are
// unknown: those of its public key or certificate may differ. So each Set takes from the Set before it what a login
// has shown.
//
// The package promises that the Sets of one module stay within the bounds of package bounds, and that keys come
// first. Package pairs decides which objects belong together. Reading the objects from the module, and the locks,
// are the business of package token. A Set never changes, so any goroutine may use it without a lock. The package
// does no I/O.
package objects

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/sha256"
	"iter"
	"slices"

	"p11-agent/token/bounds"
	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// A Set holds the objects of one token. The methods of a nil Set answer for a token that was never read.
type Set struct {
	pairs        []*pairs.Pair
	certificates []*pairs.Certificate // of no pair
	keys         []*pairs.KeyObject   // of no pair

	bySum   map[[sha256.Size]byte][]int // pairs, by the digest of their public key
	byID    map[string]int              // how many pairs have an ID
	names   names
	size    bounds.Size
	cut     bool
	leftOut []string
	unused  int
}

// A Look is what a module shows of a token, and what the caller knows of the token.
type Look struct {
	// Objects are those that the module lists. Cut means that the token has more of them. Long counts the
	// certificates whose value is too long and left out.
	Objects []wire.Object
	Cut     bool
	Long    int

	Token wire.TokenID
	// Hidden means that the token may hold private keys that it shows only after a login.
	Hidden bool
	// Configured are public keys of the configuration, for private keys whose token shows none.
	Configured []pairs.Configured
	// Named reports whether a user has named a key. Named keys come first if there is no room for all.
	Named func(*pairs.Pair) bool
	// Before is the Set of the look before, or nil.
	Before *Set
	// Used is the size of the other Sets of the module.
	Used bounds.Size
	// Skip is called for each object that is of no use, with the reason. It may be nil.
	Skip func(o wire.Object, reason error)
}

// Read makes the Set of a look.
func Read(l Look) *Set {
	left := leftOut{objects: l.Cut, long: l.Long}
	found := pairs.Find(l.Objects, pairs.Options{
		Token: l.Token, Hidden: l.Hidden, Cut: l.Cut, Configured: l.Configured,
		Skip: func(o wire.Object, reason error) {
			left.skipped(reason)
			if l.Skip != nil {
				l.Skip(o, reason)
			}
		},
	})
	for _, p := range found.Pairs {
		if old := l.Before.Find(p); old >= 0 && !p.Visible {
			p.Recall(l.Before.pairs[old])
		}
	}
	// Some modules list their objects in a new order each time.
	slices.SortStableFunc(found.Pairs, func(a, b *pairs.Pair) int {
		return cmp.Or(bytes.Compare(a.ID, b.ID), cmp.Compare(a.Label, b.Label))
	})
	room := l.Used.Room()
	s := newSet(fitPairs(found.Pairs, room, l.Named, &left))
	s.addOthers(found, room.OtherBytes, &left)
	s.indexNames()
	s.cut, s.leftOut, s.unused = l.Cut, left.sentences(), left.keys
	return s
}

// Known makes the Set of the key pairs that are known of a token from earlier.
func Known(all []*pairs.Pair) *Set {
	s := newSet(all)
	s.indexNames()
	return s
}

func newSet(all []*pairs.Pair) *Set {
	s := &Set{
		pairs: all, bySum: make(map[[sha256.Size]byte][]int, len(all)), byID: make(map[string]int, len(all)),
		size: bounds.Size{Keys: len(all), KeyBytes: weight(all)},
	}
	for i, p := range all {
		s.bySum[p.Sum] = append(s.bySum[p.Sum], i)
		s.byID[string(p.ID)]++
	}
	return s
}

// Pairs returns the key pairs. The caller must not change the slice.
func (s *Set) Pairs() []*pairs.Pair {
	if s == nil {
		return nil
	}
	return s.pairs
}

// Certificates returns the certificates on the token: those of keys first, and then those of no key, such as the chain
// of authorities.
func (s *Set) Certificates() iter.Seq[*pairs.Certificate] {
	return func(yield func(*pairs.Certificate) bool) {
		for _, p := range s.Pairs() {
			for _, c := range p.Certificates {
				if !yield(c) {
					return
				}
			}
		}
		for _, c := range s.certificates {
			if !yield(c) {
				return
			}
		}
	}
}

// PublicKeys returns the names of the public key objects on the token with their keys: those of key pairs first, and
// then those without a private key.
func (s *Set) PublicKeys() iter.Seq2[pairs.Name, crypto.PublicKey] {
	return func(yield func(pairs.Name, crypto.PublicKey) bool) {
		for _, p := range s.Pairs() {
			for _, m := range p.Members {
				if m.Class == wire.CKOPublicKey && !yield(m.Name, p.Public) {
					return
				}
			}
		}
		for _, k := range s.keys {
			if !yield(k.Name, k.Key) {
				return
			}
		}
	}
}

// Find returns the index in Pairs of a key that an earlier or later Set of the token holds as p, or -1. If several
// pairs have the public key, Find takes the pair that looks the same, or else the pair with the ID of p.
func (s *Set) Find(p *pairs.Pair) int {
	if s == nil {
		return -1
	}
	same := s.bySum[p.Sum]
	for _, fits := range []func(*pairs.Pair) bool{p.Same, func(o *pairs.Pair) bool { return bytes.Equal(o.ID, p.ID) }} {
		if i := slices.IndexFunc(same, func(i int) bool { return fits(s.pairs[i]) }); i >= 0 {
			return same[i]
		}
	}
	if len(same) == 1 {
		return same[0]
	}
	return -1
}

// Alone reports whether the pair is the only one with its ID.
func (s *Set) Alone(p *pairs.Pair) bool {
	return len(p.ID) > 0 && (s == nil || s.byID[string(p.ID)] < 2)
}

// Unused returns how many keys the look has left out.
func (s *Set) Unused() int { return s.unused }

// Hides reports whether the token hides the private key of a pair now.
func (s *Set) Hides() bool {
	return slices.ContainsFunc(s.Pairs(), func(p *pairs.Pair) bool { return !p.Visible })
}

// Size returns how much the Set holds.
func (s *Set) Size() bounds.Size {
	if s == nil {
		return bounds.Size{}
	}
	return s.size
}

// LeftOut says for a person what the look has left out, and which bound is the reason.
func (s *Set) LeftOut() []string {
	if s == nil {
		return nil
	}
	return s.leftOut
}
