package objects

import (
	"errors"
	"fmt"

	"p11-agent/token/bounds"
	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// objectWeight is about the memory in bytes that an object of no key takes besides its texts and value.
const objectWeight = 256

// weight estimates the memory in bytes that pairs take.
func weight(all []*pairs.Pair) int {
	n := 0
	for _, p := range all {
		n += p.Weight()
		for _, c := range p.Certificates {
			n += certificateWeight(c)
		}
	}
	return n
}

func certificateWeight(c *pairs.Certificate) int { return len(c.DER) + len(c.ID) + len(c.Label) }

// fitPairs returns as many pairs as there is room for. Named pairs come first. Certificates give way to keys, because
// SSH does not need them.
func fitPairs(all []*pairs.Pair, room bounds.Size, named func(*pairs.Pair) bool, left *leftOut) []*pairs.Pair {
	bytes := room.KeyBytes
	fits := make(map[*pairs.Pair]bool, len(all))
	add := func(p *pairs.Pair) {
		if fits[p] || len(fits) >= room.Keys || p.Weight() > bytes {
			return
		}
		fits[p] = true
		bytes -= p.Weight()
	}
	if len(all) > room.Keys || weight(all) > bytes {
		for _, p := range all {
			if named != nil && named(p) {
				add(p)
			}
		}
	}
	for _, p := range all {
		add(p)
	}
	kept := make([]*pairs.Pair, 0, len(fits))
	for _, p := range all {
		if !fits[p] {
			continue
		}
		kept = append(kept, p)
		for i, c := range p.Certificates {
			if size := certificateWeight(c); size <= bytes {
				bytes -= size
				continue
			}
			left.certificates += len(p.Certificates) - i
			p.Certificates = p.Certificates[:i]
			break
		}
	}
	left.keys = len(all) - len(kept)
	return kept
}

// addOthers adds as many objects of no pair as there is room for.
func (s *Set) addOthers(found pairs.Found, room int, left *leftOut) {
	fits := func(size int) bool {
		if size += objectWeight; size > room {
			left.others++
			return false
		}
		room -= size
		s.size.OtherBytes += size
		return true
	}
	for _, c := range found.Certificates {
		if fits(certificateWeight(c)) {
			s.certificates = append(s.certificates, c)
		}
	}
	for _, k := range found.Keys {
		modulus, point := pairs.Attributes(k.Key)
		if fits(len(k.ID) + len(k.Label) + len(modulus) + len(point)) {
			s.keys = append(s.keys, k)
		}
	}
}

// leftOut counts what a look leaves out because of a bound.
type leftOut struct {
	objects      bool // some are not read
	long         int  // certificates
	texts        int  // objects
	keys         int
	certificates int // of keys
	others       int // objects of no key
}

// skipped counts an object that package pairs does not use.
func (l *leftOut) skipped(reason error) {
	if errors.Is(reason, pairs.ErrLongText) {
		l.texts++
	}
}

// sentences returns the bounds for a person.
func (l *leftOut) sentences() (all []string) {
	note := func(is bool, format string, args ...any) {
		if is {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	note(l.objects, "objects of the token: %d of them and %d MiB are read at the most; to have a key found all the same, name it by its id or object in keys",
		wire.MaxObjects, wire.MaxObjectBytes>>20)
	note(l.keys > 0, "%s: of one module %d keys and %d MiB are used at the most; to have a key used, name it by its id or object in keys",
		bounds.Count(l.keys, "key"), bounds.MaxKeys, bounds.MaxKeyBytes>>20)
	note(l.long > 0, "%s: 1 MiB of each is read at the most", bounds.Count(l.long, "certificate"))
	note(l.texts > 0, "%s: an ID or a label has %d bytes at the most", bounds.Count(l.texts, "object"), pairs.MaxText)
	note(l.certificates > 0, "%s of keys: there is room for %d MiB; the keys are used without them",
		bounds.Count(l.certificates, "certificate"), bounds.MaxKeyBytes>>20)
	note(l.others > 0, "%s of no key: there is room for %d MiB", bounds.Count(l.others, "object"), bounds.MaxOtherBytes>>20)
	return all
}
