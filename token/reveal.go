package token

import (
	"p11-agent/token/objects"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Hidden reports whether the token hides the private key, and has always hidden it. A login may
// then show another label or ID than that of a URI that selects the key.
func (k *Key) Hidden() bool { return objects.Hidden(k.pair) }

// MayMatch reports whether a URI selects the key, or may do so. While the token hides the private
// key, its label and ID are unknown. A label or ID of another object of the token belongs to that
// object.
func (k *Key) MayMatch(u *pkcs11uri.URI) bool {
	if k.Matches(u) {
		return true
	}
	t := k.token
	t.mu.Lock()
	set, logins := t.objects, t.slot.Info.Flags&wire.CKFLoginRequired != 0
	t.mu.Unlock()
	return set.MayName(u, k.pair) && t.matches(u) && (logins || !t.present())
}
