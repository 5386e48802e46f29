package token

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"slices"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Many tokens show private keys after a login only. Until then nobody knows the label and
// the ID of a private key: that of its public key or certificate may be another one. What
// a login has shown of a private key is remembered.

// privateName is what a private key is called, as its token has shown it.
type privateName struct {
	id    []byte
	label string
}

// recall takes over what a login has shown of the private keys. old are the keys that were
// known before, by the digests of their public halves.
func recall(pairs []*found, old map[[sha256.Size]byte][]*Key) {
	for _, f := range pairs {
		if f.visible {
			continue
		}
		o := sameKey(old[f.sum], f)
		if o == nil {
			continue
		}
		f.always, f.unfit, f.loose = o.found.always, o.found.unfit, o.found.loose
		if o.found.private != nil {
			f.isCalled(*o.found.private)
		}
	}
}

// sameKey returns the key that is the same as a pair, nil when there is none: the one with
// its ID, or else the only one. old are keys with the public half of the pair.
func sameKey(old []*Key, f *found) *Key {
	for _, o := range old {
		if bytes.Equal(o.found.id, f.id) {
			return o
		}
	}
	if len(old) != 1 {
		return nil
	}
	return old[0]
}

// isCalled notes what the private key of a pair is called.
func (f *found) isCalled(name privateName) {
	f.private = &name
	if len(name.id) > 0 {
		f.id = name.id
	}
	if name.label != "" {
		f.label = name.label
	}
	f.note(wire.CKOPrivateKey, name.label, name.id)
}

// note notes an object of the pair.
func (f *found) note(class uint64, label string, id []byte) {
	if len(f.labels) >= maxPairObjects && class != wire.CKOPrivateKey { // a pair has one private key
		return
	}
	f.labels = append(f.labels, label)
	f.classes = append(f.classes, class)
	f.ids = append(f.ids, id)
}

// hasID tells whether an object of the pair has an ID.
func (f *found) hasID(id []byte) bool {
	return bytes.Equal(f.id, id) || slices.ContainsFunc(f.ids, func(o []byte) bool { return bytes.Equal(o, id) })
}

// maxAdopted bounds the private keys and the public halves that adopt compares, each with
// each.
const maxAdopted = 64

// adopt puts private keys without a public half together with public halves that no
// private key was found for, by what else fits: an EC key seldom shows its point, and its
// certificate may have another ID, or none. Whether that was right shows with the first
// signature, which is verified. hidden tells that the token may have further private keys. It
// returns the pairs that are left.
func adopt(all []*found, hidden bool) []*found {
	var private, public []*found
	for _, f := range all {
		switch {
		case f.visible && f.public == nil:
			private = append(private, f)
		case !f.visible && f.public != nil && !f.foreign:
			public = append(public, f)
		}
	}
	if len(private) == 0 || len(public) == 0 || len(private) > maxAdopted || len(public) > maxAdopted {
		return all
	}
	gone := make(map[*found]bool)
	join := func(fits func(private, public *found) bool) {
		for _, p := range private {
			match := only(public, func(f *found) bool { return !gone[f] && f.keyType == p.keyType && p.onCurveOf(f) && fits(p, f) })
			if match == nil || gone[p] {
				continue
			}
			if only(private, func(o *found) bool {
				return !gone[o] && o.keyType == match.keyType && o.onCurveOf(match) && fits(o, match)
			}) != p {
				continue
			}
			p.public, p.sum, p.certs = match.public, match.sum, match.certs
			for i := range match.labels {
				p.note(match.classes[i], match.labels[i], match.ids[i])
			}
			p.unfit = firstText(p.unfit, match.unfit)
			gone[match] = true
			private = slices.DeleteFunc(slices.Clone(private), func(o *found) bool { return o == p })
		}
	}
	join(func(p, f *found) bool {
		return p.label != "" && p.label == f.label && (!hidden || len(p.id) == 0 || len(f.id) == 0)
	})
	if !hidden {
		join(func(*found, *found) bool { return true })
		for _, p := range private {
			if gone[p] {
				continue
			}
			mates := alike(private, gone, p)
			for _, f := range public {
				if n := len(alike(public, gone, f)); !gone[f] && f.keyType == p.keyType && p.onCurveOf(f) && n <= len(mates) {
					f.visible, f.loose, f.always = true, true, f.always || p.always
					f.private = &privateName{f.id, f.label}
				}
			}
		}
	}
	return slices.DeleteFunc(all, func(f *found) bool { return gone[f] })
}

// alike returns the pairs that are left of the type of one of them.
func alike(all []*found, gone map[*found]bool, of *found) (same []*found) {
	for _, f := range all {
		if !gone[f] && f.keyType == of.keyType {
			same = append(same, f)
		}
	}
	return same
}

func firstText(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// only returns the one pair that is meant, nil when there is none or several.
func only(all []*found, meant func(*found) bool) (match *found) {
	for _, f := range all {
		if meant(f) {
			if match != nil {
				return nil
			}
			match = f
		}
	}
	return match
}

// onCurveOf tells whether a private key may belong to a public half, by its curve.
func (f *found) onCurveOf(o *found) bool {
	k, ok := o.public.(*ecdsa.PublicKey)
	if !ok || len(f.params) == 0 {
		return true
	}
	curve, err := namedCurve(f.params)
	return err == nil && curve == k.Curve
}

// ownAuthority tells whether a certificate of an authority is that of the key itself: one
// that the key has issued for itself. It says nothing against the key.
func ownAuthority(c *x509.Certificate) bool {
	return c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject) &&
		c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

// authorities tells which certificates of a token are those of authorities that others
// have put there, and not of a key of the token. Before a login a root certificate looks
// like one that a key has issued for itself. So these count: what the token says of the
// certificate, and whether it has issued another certificate there.
func authorities(objects []wire.Object) map[[sha256.Size]byte]bool {
	var roots, others []*x509.Certificate
	foreign := make(map[[sha256.Size]byte]bool)
	for _, o := range objects {
		if o.Class != wire.CKOCertificate {
			continue
		}
		c, err := certificate(o)
		switch {
		case err != nil:
		case c.IsCA && ownAuthority(c):
			roots = append(roots, c)
			if o.CertCategory == categoryAuthority || o.Trusted == wire.True || len(o.ID) == 0 {
				foreign[sha256.Sum256(c.Raw)] = true
			}
		default:
			others = append(others, c)
			if c.IsCA {
				foreign[sha256.Sum256(c.Raw)] = true
			}
		}
	}
	for _, root := range roots {
		if slices.ContainsFunc(others, func(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, root.RawSubject) }) {
			foreign[sha256.Sum256(root.Raw)] = true
		}
	}
	return foreign
}

// categoryAuthority is CKA_CERTIFICATE_CATEGORY of an authority (PKCS#11 v2.40 section
// 4.6.2).
const categoryAuthority = 2

// nameIndex is which labels and IDs the objects of a token have.
type nameIndex struct {
	labels, ids map[string]bool
}

func indexNames(keys []*Key) *nameIndex {
	x := &nameIndex{labels: make(map[string]bool), ids: make(map[string]bool)}
	for _, k := range keys {
		for i, l := range k.found.labels {
			x.labels[l] = true
			x.ids[string(k.found.ids[i])] = true
		}
		x.ids[string(k.found.id)] = true
	}
	return x
}

// Hidden tells whether the token does not show the private key now, and has never shown it.
// Then a login may show that the key has another label or ID than a URI that selects it.
func (k *Key) Hidden() bool { return !k.found.visible && k.found.private == nil }

// MayMatch tells whether a URI selects the key where it is now, or may do so: what only the
// private key can answer is not known before the token has shown the key. A label or an ID
// that another object of the token has is that object's.
func (k *Key) MayMatch(u *pkcs11uri.URI) bool { return k.mayMatch(u, true) }

func (k *Key) mayMatch(u *pkcs11uri.URI, byPath bool) bool {
	if k.matches(u, byPath) {
		return true
	}
	t := k.token
	if !k.Hidden() || u.Type != "" && u.Type != pkcs11uri.ClassPrivate || u.Object == nil && u.ID == nil || !t.matches(u, byPath) {
		return false
	}
	t.mu.Lock()
	names, private, cut := t.names, t.slot.Info.Flags&wire.CKFLoginRequired != 0, t.cut
	t.mu.Unlock()
	if names == nil || cut || !private && t.present() {
		return false // objects that are not listed may have the name
	}
	label := u.Object == nil || slices.Contains(k.found.labels, *u.Object) || !names.labels[*u.Object]
	// A public key or certificate nearly always has the ID of its private key.
	noID := len(k.found.id) == 0 || u.Type == pkcs11uri.ClassPrivate
	id := u.ID == nil || k.found.hasID(u.ID) || noID && !names.ids[string(u.ID)]
	return label && id
}
