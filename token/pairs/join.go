package pairs

import (
	"cmp"
	"crypto/ecdsa"
	"slices"
)

// maxJoined bounds the private and the public keys that join compares, each with each.
const maxJoined = 64

// join puts private keys without a public key together with public keys and certificates without a private key. An
// EC key seldom shows its point, and its certificate may have another ID or none. hidden means that the token may
// hold further private keys. join returns the pairs that are left.
func join(all []*Pair, hidden bool) []*Pair {
	j := joiner{joined: make(map[*Pair]bool)}
	for _, p := range all {
		switch {
		case p.Visible && p.Public == nil:
			j.private = append(j.private, p)
		case !p.Visible && p.Public != nil && !p.foreign:
			j.public = append(j.public, p)
		}
	}
	if len(j.private) == 0 || len(j.public) == 0 || len(j.private) > maxJoined || len(j.public) > maxJoined {
		return all
	}
	j.byLabel(hidden)
	if !hidden {
		j.byElimination()
		j.loosely()
	}
	return slices.DeleteFunc(all, func(p *Pair) bool { return j.joined[p] })
}

// A joiner holds the pairs that still lack a half.
type joiner struct {
	private, public []*Pair
	joined          map[*Pair]bool // the public halves that are part of another pair now
}

// byLabel joins the halves that alone have a label in common. While private keys may be hidden, two different IDs
// count against it.
func (j *joiner) byLabel(hidden bool) {
	j.unique(func(private, public *Pair) bool {
		return private.Label != "" && private.Label == public.Label && (!hidden || len(private.ID) == 0 || len(public.ID) == 0)
	})
}

// byElimination joins the last private key of a kind with the last public key of that kind.
func (j *joiner) byElimination() {
	j.unique(func(_, _ *Pair) bool { return true })
}

// unique joins two halves if they fit each other and no third half.
func (j *joiner) unique(fits func(private, public *Pair) bool) {
	for _, private := range j.private {
		public := only(j.public, func(p *Pair) bool { return private.mayBeOf(p) && fits(private, p) })
		if public == nil {
			continue
		}
		if only(j.private, func(p *Pair) bool { return p.mayBeOf(public) && fits(p, public) }) != private {
			continue
		}
		private.takePublic(public)
		j.joined[public] = true
		j.private, j.public = without(j.private, private), without(j.public, public)
	}
}

// loosely makes a pair of each public key that is left, if there are at least as many private keys of its type. The
// module process finds the private key when the key signs.
func (j *joiner) loosely() {
	for _, private := range j.private {
		keys := countType(j.private, private.KeyType)
		for _, p := range j.public {
			if private.mayBeOf(p) && countType(j.public, p.KeyType) <= keys {
				p.Visible, p.Loose, p.Always = true, true, p.Always || private.Always
				p.Private = &Name{p.ID, p.Label}
			}
		}
	}
}

// takePublic adds the public half to a private key.
func (p *Pair) takePublic(public *Pair) {
	p.Public, p.Sum, p.Certificates = public.Public, public.Sum, public.Certificates
	for _, m := range public.Members {
		p.AddMember(m)
	}
	p.Unfit = cmp.Or(p.Unfit, public.Unfit)
}

// mayBeOf reports whether a private key may belong to a public key: both have the same type and curve.
func (p *Pair) mayBeOf(public *Pair) bool {
	if p.KeyType != public.KeyType {
		return false
	}
	k, ok := public.Public.(*ecdsa.PublicKey)
	if !ok || len(p.params) == 0 {
		return true
	}
	curve, err := namedCurve(p.params)
	return err == nil && curve == k.Curve
}

func countType(all []*Pair, keyType uint64) (n int) {
	for _, p := range all {
		if p.KeyType == keyType {
			n++
		}
	}
	return n
}

// only returns the one pair that fits, or nil if none or several do.
func only(all []*Pair, fits func(*Pair) bool) (match *Pair) {
	for _, p := range all {
		if fits(p) {
			if match != nil {
				return nil
			}
			match = p
		}
	}
	return match
}

func without(all []*Pair, p *Pair) []*Pair {
	return slices.DeleteFunc(slices.Clone(all), func(o *Pair) bool { return o == p })
}
