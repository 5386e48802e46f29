package token

import (
	"bytes"
	"crypto/sha256"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Many tokens show private keys only after a login. Until then the agent does not know the label
// and ID of a private key: those of its public key or certificate may differ. The agent remembers
// what a login has shown.

// recall copies to new pairs what a login has shown of their private keys. old are the keys known
// so far, by the digests of their public keys.
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

// sameKey returns the key of a pair, or nil: the key with the ID of the pair, or else the only key.
// old are keys with the public key of the pair.
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

// A nameIndex holds the labels and IDs of the objects of a token.
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

// Hidden reports whether the token hides the private key, and has always hidden it. A login may
// then show another label or ID than that of a URI that selects the key.
func (k *Key) Hidden() bool { return !k.pair.Visible && k.pair.Private == nil }

// MayMatch reports whether a URI selects the key, or may do so. While the token hides the private
// key, its label and ID are unknown. A label or ID of another object of the token belongs to that
// object.
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
		return false // the name may belong to an object outside the listing
	}
	label := u.Object == nil || k.pair.HasLabel(*u.Object) || !names.labels[*u.Object]
	// A public key or certificate nearly always has the ID of its private key.
	noID := len(k.pair.ID) == 0 || u.Type == pkcs11uri.ClassPrivate
	id := u.ID == nil || k.pair.HasID(u.ID) || noID && !names.ids[string(u.ID)]
	return label && id
}
