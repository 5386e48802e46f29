package card

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// Shown holds what a token shows of its keys, as digests. The zero Shown is that of a token that shows none.
type Shown struct {
	keys  digests // of public keys
	certs digests // of certificates, if there is no public key
}

// digests are sorted.
type digests [][sha256.Size]byte

// ShownBy returns what objects show. Certificates of authorities do not count: all cards of a company have them.
func ShownBy(objects []wire.Object) (s Shown) {
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

// ShownOf returns what the objects of key pairs have shown.
func ShownOf(all []*pairs.Pair) (s Shown) {
	for _, p := range all {
		s.keys = append(s.keys, sha256.Sum256(slices.Concat(p.Modulus, p.Point)))
	}
	s.keys = sorted(s.keys)
	return s
}

func sorted(d digests) digests {
	slices.SortFunc(d, compare)
	return slices.Clip(d)
}

func compare(a, b [sha256.Size]byte) int { return bytes.Compare(a[:], b[:]) }

func (s Shown) empty() bool { return len(s.keys)+len(s.certs) == 0 }

// Comparable reports whether both show something of the same kind.
func (s Shown) Comparable(o Shown) bool {
	return len(s.keys) > 0 && len(o.keys) > 0 || len(s.certs) > 0 && len(o.certs) > 0
}

// Overlaps reports whether both show a common key or certificate.
func (s Shown) Overlaps(o Shown) bool { return s.keys.overlap(o.keys) || s.certs.overlap(o.certs) }

func (d digests) overlap(o digests) bool {
	return slices.ContainsFunc(d, func(one [sha256.Size]byte) bool {
		_, found := slices.BinarySearchFunc(o, one, compare)
		return found
	})
}

// maxPrinted bounds the keys in a text.
const maxPrinted = 32

// String prints the digests of the first keys. Parse reads them.
func (s Shown) String() string {
	var all []string
	for _, d := range s.keys[:min(len(s.keys), maxPrinted)] {
		all = append(all, hex.EncodeToString(d[:]))
	}
	return strings.Join(all, " ")
}

// Parse reads the output of String, and ignores words that make no sense.
func Parse(text string) (s Shown) {
	for word := range strings.FieldsSeq(text) {
		var d [sha256.Size]byte
		if n, err := hex.Decode(d[:], []byte(word[:min(len(word), 2*sha256.Size)])); err == nil && n == len(d) {
			s.keys = append(s.keys, d)
		}
	}
	s.keys = sorted(s.keys)
	return s
}
