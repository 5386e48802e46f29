package agent

import (
	"bytes"
	"crypto"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// identity is a key as clients see it, with every place it can be used at.
type identity struct {
	key         ssh.PublicKey // plain, or a certificate of plain
	plain       ssh.PublicKey
	wire        string // of key
	comment     string
	homes       []Key
	awaited     bool          // offered while its tokens are away, which are asked for when it is to sign
	software    crypto.Signer // nil: it is on tokens only
	constraints Constraints
	expires     time.Time // zero: never
	fingerprint string    // of plain

	beginning beginning // of its lines in the log
}

// softwareKey is a private key in memory: an identity that is listed when the key is
// on no token, and is not changed once it is.
type softwareKey struct {
	identity
	kept kept
}

// wiredKey is a public key that knows its wire form and its type: clients use keys
// far more often than keys change.
type wiredKey struct {
	ssh.PublicKey
	wire []byte
	kind string
}

func wired(key ssh.PublicKey, wire string) *wiredKey { return &wiredKey{key, []byte(wire), key.Type()} }

// Marshal returns the wire form, which is not to be changed.
func (k *wiredKey) Marshal() []byte { return k.wire }

func (k *wiredKey) Type() string { return k.kind }

// plainKey is what is made of a key of a token once, and not again for each view.
type plainKey struct {
	*wiredKey
	wire        string
	fingerprint string
}

// plainLocked returns that of a key, or nil when it is not of a type that SSH has.
func (k *Keyring) plainLocked(key Key) *plainKey {
	if p := k.plain[key]; p != nil {
		return p
	}
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil
	}
	wire := string(pub.Marshal())
	return &plainKey{wired(pub, wire), wire, k.fingerprint(pub)}
}

// view is the list of identities for as long as nothing changes.
type view struct {
	generation   uint64 // of the tokens
	certificates uint64 // generation
	change       uint64 // of the keyring
	expires      time.Time
	identities   []*identity
	list         Listing
	byKey        map[string]*identity
	limited      bool // an identity is limited to destinations
}

// now returns the present view, made anew when something has changed.
func (k *Keyring) now() *view {
	v := k.view.Load()
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.generation()
	if k.good(v, generation, certificates) {
		return v
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	// Somebody else may have made it meanwhile.
	if v := k.view.Load(); k.good(v, generation, certificates) {
		return v
	}
	return k.nowLocked(generation, certificates)
}

// good tells whether nothing has changed since the view was made.
func (k *Keyring) good(v *view, generation, certificates uint64) bool {
	return v != nil && v.generation == generation && v.certificates == certificates && v.change == k.change.Load() &&
		(v.expires.IsZero() || time.Now().Before(v.expires))
}

func (k *Keyring) nowLocked(generation, certificates uint64) *view {
	k.expireLocked()
	v := &view{generation: generation, certificates: certificates, change: k.change.Load(), byKey: make(map[string]*identity, len(k.software))}
	k.tokensLocked(v)
	v.certify(k.opts.Certificates.certificates(), k.hidden)
	for _, s := range k.software {
		v.until(s.expires)
		if id := v.byKey[s.wire]; id != nil {
			// The key is on a token as well: whatever limits either limits both.
			id.software = s.software
			id.expires = sooner(id.expires, s.expires)
			id.constraints.Confirm = id.constraints.Confirm || s.constraints.Confirm
			if len(id.constraints.Destinations) == 0 {
				id.constraints.Destinations = s.constraints.Destinations
			}
			continue
		}
		v.add(&s.identity)
	}
	v.list.Identities = make([]Identity, len(v.identities))
	for i, id := range v.identities {
		v.list.Identities[i] = Identity{Key: id.key, Comment: id.comment}
		v.limited = v.limited || len(id.constraints.Destinations) > 0
	}
	k.view.Store(v)
	return v
}

// until notes that the view is good only so long.
func (v *view) until(t time.Time) {
	if !t.IsZero() && (v.expires.IsZero() || t.Before(v.expires)) {
		v.expires = t
	}
}

func (v *view) add(id *identity) {
	v.byKey[id.wire] = id
	v.identities = append(v.identities, id)
}

// tokensLocked puts the identities of tokens into the view.
func (k *Keyring) tokensLocked(v *view) {
	present := k.opts.Tokens.Keys()
	keys := slices.Concat(present, k.opts.Tokens.Away())
	plains := make(map[Key]*plainKey, len(keys))
	defer func() { k.plain = plains }()
	// take shows a key, with a certificate when that is not nil. a is nil for one that
	// nobody has added, and named tells that the configuration has it.
	take := func(i int, cert *ssh.Certificate, a *addition, named bool) {
		key := keys[i]
		awaited := k.opts.OfferAway != nil && k.opts.OfferAway(key, named)
		if i >= len(present) && !awaited {
			return
		}
		plain := plains[key]
		if plain == nil {
			if plain = k.plainLocked(key); plain == nil {
				return
			}
			plains[key] = plain
		}
		shown, wire := plain.wiredKey, plain.wire
		if cert != nil {
			if string(cert.Key.Marshal()) != wire || !v.counts(cert) {
				return
			}
			wire = string(cert.Marshal())
			shown = wired(cert, wire)
		}
		id := v.byKey[wire]
		if id == nil {
			if n, ok := k.hidden[wire]; ok && key.Insertions() <= n {
				return
			}
			id = &identity{key: shown, plain: plain.wiredKey, wire: wire, comment: key.URI(), fingerprint: plain.fingerprint}
			if name := k.opts.Name(key); name != "" {
				id.comment = name
			}
			v.add(id)
		}
		if !slices.Contains(id.homes, key) {
			id.homes = append(id.homes, key)
		}
		id.awaited = id.awaited || awaited
		if a != nil {
			id.constraints, id.expires = a.constraints, a.expires
		}
	}
	if k.opts.Automatic == nil {
		for i, key := range keys {
			if key.Unfit() == "" {
				take(i, nil, nil, false)
			}
		}
	}
	for _, s := range k.opts.Automatic {
		for i, key := range keys {
			if selects(s, key) {
				take(i, nil, nil, true)
			}
		}
	}
	for _, a := range k.added {
		for i, key := range keys {
			if !k.selectsLocked(a.selection, key) {
				continue
			}
			if !a.constraints.CertificatesOnly {
				take(i, nil, a, false)
			}
			for _, cert := range a.constraints.Certificates {
				take(i, cert, a, false)
			}
		}
		v.until(a.expires)
	}
}

// counts tells whether a certificate is valid now.
func (v *view) counts(cert *ssh.Certificate) bool {
	ok, change := valid(cert, time.Now())
	v.until(change)
	return ok
}

// certify shows the keys of tokens with their certificates, too, each after its
// key.
func (v *view) certify(certs []*ssh.Certificate, hidden map[string]uint64) {
	if len(certs) == 0 {
		return
	}
	of := make(map[string][]*ssh.Certificate)
	for _, c := range certs {
		wire := string(c.Key.Marshal())
		of[wire] = append(of[wire], c)
	}
	plain := v.identities
	v.identities = make([]*identity, 0, len(plain))
	for _, id := range plain {
		v.identities = append(v.identities, id)
		for _, c := range of[id.wire] {
			wire := string(c.Marshal())
			n, removed := hidden[wire]
			if v.byKey[wire] != nil || removed && id.insertions() <= n || !v.counts(c) {
				continue
			}
			v.add(&identity{
				key: wired(c, wire), plain: id.plain, wire: wire, comment: id.comment, fingerprint: id.fingerprint,
				homes: id.homes, awaited: id.awaited, constraints: id.constraints, expires: id.expires,
			})
		}
	}
}

// insertions counts how often a token of the identity has appeared, for the one
// that has most often.
func (id *identity) insertions() (n uint64) {
	for _, key := range id.homes {
		n = max(n, key.Insertions())
	}
	return n
}

// shownBy tells whether a socket shows the identity.
func (id *identity) shownBy(s *Socket) bool {
	if s == nil || s.Only == nil {
		return true
	}
	return slices.ContainsFunc(s.Only, func(sel Selection) bool {
		return slices.ContainsFunc(id.homes, func(key Key) bool { return selects(sel, key) })
	})
}

func selects(s Selection, k Key) bool {
	return s.Match(k) && (k.Unfit() == "" || !s.Broad())
}

// selectsLocked is selects for what a client named. Who names every key where
// the configuration lists some means those: this is how they are brought back.
func (k *Keyring) selectsLocked(s Selection, key Key) bool {
	if s.All() && len(k.opts.Automatic) > 0 {
		return slices.ContainsFunc(k.opts.Automatic, func(s Selection) bool { return selects(s, key) })
	}
	return selects(s, key)
}

// expireLocked ends what was added for a time that is over. An automatic
// identity that was added again for a time goes too: that is what was asked for.
// One that was added once more after that stays, as the last word counts.
func (k *Keyring) expireLocked() {
	now := time.Now()
	over := func(t time.Time) bool { return !t.IsZero() && !now.Before(t) }
	if n := len(k.software); n > 0 {
		k.software = slices.DeleteFunc(k.software, func(s *softwareKey) bool { return over(s.expires) })
		if len(k.software) != n {
			k.change.Add(1)
		}
	}
	added := slices.Clone(k.added)
	for i, a := range added {
		if !over(a.expires) {
			continue
		}
		k.dropLocked(a)
		later := added[i+1:]
		for _, key := range slices.Concat(k.opts.Tokens.Keys(), k.opts.Tokens.Away()) {
			if k.selectsLocked(a.selection, key) && !slices.ContainsFunc(later, func(o *addition) bool { return k.selectsLocked(o.selection, key) }) {
				k.hideKeyLocked(key)
			}
		}
	}
}

// dropLocked forgets an addition.
func (k *Keyring) dropLocked(a *addition) {
	k.added = slices.DeleteFunc(k.added, func(o *addition) bool { return o == a })
	k.opts.Tokens.Drop(a.selection)
	k.change.Add(1)
}

// hideLocked removes an identity of a token until that is inserted again or the
// key is added again.
func (k *Keyring) hideLocked(id *identity) {
	if len(k.hidden) >= maxHidden {
		k.pruneHiddenLocked()
	}
	k.hidden[id.wire] = max(k.hidden[id.wire], id.insertions())
	k.change.Add(1)
}

// pruneHiddenLocked forgets the removed certificates that nothing shows any more.
// Otherwise a client adds and removes ever new ones, and each is remembered.
func (k *Keyring) pruneHiddenLocked() {
	certified := make(map[string]bool)
	for _, a := range k.added {
		for _, cert := range a.constraints.Certificates {
			certified[string(cert.Marshal())] = true
		}
	}
	for _, cert := range k.opts.Certificates.certificates() {
		certified[string(cert.Marshal())] = true
	}
	for wire := range k.hidden {
		key, err := ssh.ParsePublicKey([]byte(wire))
		if _, ok := key.(*ssh.Certificate); err == nil && ok && !certified[wire] {
			delete(k.hidden, wire)
		}
	}
}

// hideKeyLocked does so with a key, without its certificates.
func (k *Keyring) hideKeyLocked(key Key) {
	if pub, err := ssh.NewPublicKey(key.Public()); err == nil {
		k.hideLocked(&identity{wire: string(pub.Marshal()), homes: []Key{key}})
	}
}

// showLocked ends what hideLocked has done to a key and its certificates.
func (k *Keyring) showLocked(key Key) {
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return
	}
	delete(k.hidden, string(pub.Marshal()))
	for wire := range k.hidden {
		if cert, err := ssh.ParsePublicKey([]byte(wire)); err == nil {
			if cert, ok := cert.(*ssh.Certificate); ok && bytes.Equal(cert.Key.Marshal(), pub.Marshal()) {
				delete(k.hidden, wire)
			}
		}
	}
}
