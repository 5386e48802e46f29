package agent

import (
	"maps"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
)

// An addition holds what a single ssh-add -s has added.
type addition struct {
	selection    request.Selection
	limits       limits
	certificates []*ssh.Certificate
	// only has the keys that the addition covers, by their wire form. nil stands for all
	// keys that the selection selects, also those that come later.
	only map[string]bool
	// except has the keys that a client removed and another addition then added.
	except map[string]bool
	// forwarded says that the request of the addition was forwarded.
	forwarded bool
}

// covers tells whether the addition covers a key that its selection selects. wire is the
// key's wire form.
func (a *addition) covers(wire string) bool {
	if a.except[wire] || a.only != nil && !a.only[wire] {
		return false
	}
	return !a.limits.certificates || slices.ContainsFunc(a.certificates, func(c *ssh.Certificate) bool {
		return string(c.Key.Marshal()) == wire
	})
}

// certifies tells whether a certificate of the addition is for a key, and is valid now or
// later. wire is the key's wire form.
func (a *addition) certifies(wire string) bool {
	return slices.ContainsFunc(a.certificates, func(c *ssh.Certificate) bool {
		now, change := sshkey.Valid(c, time.Now())
		return (now || !change.IsZero()) && string(c.Key.Marshal()) == wire
	})
}

// coversAs tells whether two additions of the same selection cover the same keys. It
// ignores except.
func (a *addition) coversAs(o *addition) bool {
	if (a.only == nil) != (o.only == nil) || !maps.Equal(a.only, o.only) || a.limits.certificates != o.limits.certificates {
		return false
	}
	return !a.limits.certificates || maps.Equal(certified(a.certificates), certified(o.certificates))
}

// replaces tells whether the addition takes the place of an old one.
func (a *addition) replaces(old *addition) bool {
	return old.selection.String() == a.selection.String() && len(old.except) == 0 && old.coversAs(a)
}

// certified returns the wire forms of the keys that the certificates certify.
func certified(certs []*ssh.Certificate) map[string]bool {
	keys := make(map[string]bool)
	for _, c := range certs {
		keys[string(c.Key.Marshal())] = true
	}
	return keys
}

// known is a key on a token, and its wire form.
type known struct {
	request.Key
	wire string
}

// knownLocked returns the present and the absent keys, of the types that SSH has.
func (k *Keyring) knownLocked() (all []known) {
	for _, key := range slices.Concat(k.opts.Tokens.Keys(), k.opts.Tokens.Away()) {
		if plain := k.plainLocked(key); plain != nil {
			all = append(all, known{key, plain.wire})
		}
	}
	return all
}

// coveredLocked returns the known keys that the addition covers.
func (k *Keyring) coveredLocked(a *addition) []known {
	return slices.DeleteFunc(k.knownLocked(), func(key known) bool {
		return !k.selectsLocked(a.selection, key.Key) || !a.covers(key.wire)
	})
}

// limitsForLocked returns the limits that the addition sets to a key. If the configuration
// offers the key, the agent shows it without a certificate, too.
func (k *Keyring) limitsForLocked(a *addition, key request.Key) limits {
	l := a.limits
	l.certificates = l.certificates && !request.Offered(key, k.opts.Automatic)
	return l
}

// maxOwed bounds the number of keys in Keyring.owed. At the bound, the keyring forgets the
// keys that it does not know any more.
const maxOwed = 4096

// oweLocked notes that a key of a token loses limits. The first use without these limits
// costs a PIN or an approval: see Keyring.owed.
func (k *Keyring) oweLocked(wire string, l limits) {
	if !l.any() {
		return
	}
	l.expires = time.Time{} // the old end does not bind a later addition
	if old := k.owed[wire]; old != nil {
		l = old.and(l)
	} else if len(k.owed) >= maxOwed {
		all := k.knownLocked()
		maps.DeleteFunc(k.owed, func(wire string, _ *limits) bool {
			return !slices.ContainsFunc(all, func(key known) bool { return key.wire == wire })
		})
	}
	k.owed[wire] = &l
	k.change.Add(1)
}

// paid notes that a person has given a PIN or an approval for an identity that has lost
// limits. From now on, requests use the identity without these limits.
func (k *Keyring) paid(id *identity) {
	k.mu.Lock()
	defer k.mu.Unlock()
	wire := id.plainWire()
	if k.owed[wire] == id.owed { // the key has lost no further limits meanwhile
		delete(k.owed, wire)
		k.change.Add(1)
	}
}

// paidFor does the same as paid, for keys of tokens.
func (k *Keyring) paidFor(keys []request.Key) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range keys {
		if plain := k.plainLocked(key); plain != nil {
			delete(k.owed, plain.wire)
			k.change.Add(1)
		}
	}
}

// asksPIN tells whether a signature that begins now needs a PIN from a person, on each
// token of the identity.
func (id *identity) asksPIN() bool {
	return len(id.Homes) > 0 && id.software == nil &&
		!slices.ContainsFunc(id.Homes, func(key request.Key) bool { return !key.AsksPIN() })
}

// liftLocked takes a key out of the addition. If the addition then covers no known key,
// liftLocked drops the addition.
func (k *Keyring) liftLocked(a *addition, key known) {
	k.oweLocked(key.wire, k.limitsForLocked(a, key.Key))
	if a.except == nil {
		a.except = make(map[string]bool)
	}
	a.except[key.wire] = true
	k.change.Add(1)
	if len(k.coveredLocked(a)) == 0 {
		k.dropLocked(a)
	}
}

// dropLocked forgets an addition. Its keys lose their limits.
func (k *Keyring) dropLocked(a *addition) {
	for _, key := range k.coveredLocked(a) {
		k.oweLocked(key.wire, k.limitsForLocked(a, key.Key))
	}
	k.replaceLocked(a)
}

// replaceLocked forgets an addition. Another addition has its limits.
func (k *Keyring) replaceLocked(a *addition) {
	k.added = slices.DeleteFunc(k.added, func(o *addition) bool { return o == a })
	k.opts.Tokens.Drop(a.selection)
	k.change.Add(1)
}

// expireLocked ends the additions and the keys in memory whose time is over. It removes an
// automatic identity, too, if a client added it again for a time: the client wants its end.
func (k *Keyring) expireLocked() {
	now := time.Now()
	for _, s := range k.software.expire(now) {
		k.softwareChangedLocked(s.ID)
	}
	for _, a := range slices.Clone(k.added) {
		if !over(a.limits.expires, now) {
			continue
		}
		for _, key := range k.coveredLocked(a) {
			k.endLocked(key)
		}
		k.dropLocked(a)
	}
}

// endLocked removes a key with its certificates, for every addition.
func (k *Keyring) endLocked(key known) {
	k.hideLocked(key.wire, key.Insertions())
	for _, a := range slices.Clone(k.added) {
		if !k.selectsLocked(a.selection, key.Key) || !a.covers(key.wire) {
			continue
		}
		for _, cert := range a.certificates {
			if string(cert.Key.Marshal()) == key.wire {
				k.hideLocked(string(cert.Marshal()), key.Insertions())
			}
		}
		k.liftLocked(a, key)
	}
}

// hideLocked removes an identity of a token, by its wire form, until the token is inserted
// again or a client adds the key again. insertions counts the insertions of the token.
func (k *Keyring) hideLocked(wire string, insertions uint64) {
	if len(k.hidden) >= maxHidden {
		k.pruneHiddenLocked()
	}
	k.hidden[wire] = max(k.hidden[wire], insertions)
	k.change.Add(1)
}

// pruneHiddenLocked forgets the removed certificates that no addition and no file shows
// any more. Otherwise a client could add and remove new certificates without end, and the
// keyring would keep each.
func (k *Keyring) pruneHiddenLocked() {
	shown := make(map[string]bool)
	for _, a := range k.added {
		for _, cert := range a.certificates {
			shown[string(cert.Marshal())] = true
		}
	}
	for _, cert := range k.opts.Certificates.Certificates() {
		shown[string(cert.Marshal())] = true
	}
	for wire := range k.hidden {
		key, err := ssh.ParsePublicKey([]byte(wire))
		if _, ok := key.(*ssh.Certificate); err == nil && ok && !shown[wire] {
			delete(k.hidden, wire)
		}
	}
}

// removedLocked tells whether a key was removed, and its token was not inserted again.
func (k *Keyring) removedLocked(key known) bool {
	n, removed := k.hidden[key.wire]
	return removed && key.Insertions() <= n
}

// showLocked undoes hideLocked for a key and its certificates.
func (k *Keyring) showLocked(key known) {
	delete(k.hidden, key.wire)
	for wire := range k.hidden {
		if cert, err := ssh.ParsePublicKey([]byte(wire)); err == nil {
			if cert, ok := cert.(*ssh.Certificate); ok && string(cert.Key.Marshal()) == key.wire {
				delete(k.hidden, wire)
			}
		}
	}
}
