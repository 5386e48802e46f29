package token

import (
	"bytes"
	"crypto/sha256"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Many tokens show private keys after a login only. Until then nobody knows the label and
// the ID of a private key: that of its public key or certificate may be another one. What
// a login has shown of a private key is remembered.

// recall takes over what a login has shown of the private keys. old are the keys that were
// known before, by the digests of their public halves.
func recall(all []*pairs.Pair, old map[[sha256.Size]byte][]*Key) {
	for _, p := range all {
		if p.Visible {
			continue
		}
		if o := sameKey(old[p.Sum], p); o != nil {
			p.Recall(o.pair)
		}
	}
}

// sameKey returns the key that is the same as a pair, nil when there is none: the one with
// its ID, or else the only one. old are keys with the public half of the pair.
func sameKey(old []*Key, p *pairs.Pair) *Key {
	for _, o := range old {
		if bytes.Equal(o.pair.ID, p.ID) {
			return o
		}
	}
	if len(old) != 1 {
		return nil
	}
	return old[0]
}

// nameIndex is which labels and IDs the objects of a token have.
type nameIndex struct {
	labels, ids map[string]bool
}

func indexNames(keys []*Key) *nameIndex {
	x := &nameIndex{labels: make(map[string]bool), ids: make(map[string]bool)}
	for _, k := range keys {
		for _, m := range k.pair.Members {
			x.labels[m.Label] = true
			x.ids[string(m.ID)] = true
		}
		x.ids[string(k.pair.ID)] = true
	}
	return x
}

// Hidden tells whether the token does not show the private key now, and has never shown it.
// Then a login may show that the key has another label or ID than a URI that selects it.
func (k *Key) Hidden() bool { return !k.pair.Visible && k.pair.Private == nil }

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
	label := u.Object == nil || k.pair.HasLabel(*u.Object) || !names.labels[*u.Object]
	// A public key or certificate nearly always has the ID of its private key.
	noID := len(k.pair.ID) == 0 || u.Type == pkcs11uri.ClassPrivate
	id := u.ID == nil || k.pair.HasID(u.ID) || noID && !names.ids[string(u.ID)]
	return label && id
}
