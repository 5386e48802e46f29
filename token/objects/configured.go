package objects

import (
	"crypto"
	"errors"
	"slices"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
)

// A PublicKey is a public key that the configuration gives for a private key whose token shows none.
type PublicKey struct {
	// URI names the private key. It must have an id or an object.
	URI *pkcs11uri.URI
	// Key is *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey.
	Key crypto.PublicKey
}

// Check returns the reason why the agent cannot use the public key, or nil.
func (p PublicKey) Check() error {
	if !namesObject(p.URI) {
		return errors.New("the URI must name one key by its id or object")
	}
	if _, ok := pairs.KeyType(p.Key); !ok {
		return errors.New("no token has keys of this type that SSH can use")
	}
	return pairs.Usable(p.Key)
}

// Configured returns the public keys for a token. matches reports whether a URI selects the token.
func Configured(list []PublicKey, matches func(*pkcs11uri.URI) bool) (all []pairs.Configured) {
	for _, p := range list {
		if p.Check() == nil && matches(p.URI) {
			all = append(all, pairs.Configured{ID: p.URI.ID, Label: p.URI.Object, Key: p.Key})
		}
	}
	return all
}

// namesObject reports whether a URI names an object.
func namesObject(u *pkcs11uri.URI) bool { return u.ID != nil || u.Object != nil }

// maxAsked bounds the URIs of clients that the agent searches objects for.
const maxAsked = 256

// Wanted holds the URIs that name objects. A module process searches for these objects even on a token with more
// objects than the listing. The caller guards a Wanted with a lock.
type Wanted struct {
	configured []*pkcs11uri.URI
	asked      []*pkcs11uri.URI // of clients
	all        []*pkcs11uri.URI // both
}

// Configure replaces the URIs of the configuration. URIs that name no object do not count.
func (w *Wanted) Configure(uris []*pkcs11uri.URI) {
	w.configured = slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool { return !namesObject(u) })
	w.join()
}

// Ask adds the URI of a client, until Drop. Of too many URIs, the oldest gives way.
func (w *Wanted) Ask(u *pkcs11uri.URI) {
	w.Drop(u)
	if len(w.asked) == maxAsked {
		w.asked = w.asked[1:]
	}
	if namesObject(u) {
		w.asked = append(slices.Clip(w.asked), u)
	}
	w.join()
}

// Drop removes the URI of a client.
func (w *Wanted) Drop(u *pkcs11uri.URI) {
	w.asked = slices.DeleteFunc(slices.Clone(w.asked), func(o *pkcs11uri.URI) bool { return o == u })
	w.join()
}

func (w *Wanted) join() { w.all = slices.Concat(w.configured, w.asked) }

// All returns all URIs. The slice does not change, and the caller must not change it either.
func (w *Wanted) All() []*pkcs11uri.URI { return w.all }
