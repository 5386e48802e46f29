package agent

import (
	"crypto"
	"maps"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
)

// identity is an SSH key that clients see, with each place that has its private key.
type identity struct {
	request.Target // ID is the wire form of key; Fingerprint and PublicKey belong to plain

	key      ssh.PublicKey // plain, or a certificate of plain
	plain    ssh.PublicKey
	named    bool          // see Identity.Named
	awaited  bool          // listed while its tokens are absent; the agent asks for a token
	software crypto.Signer // nil: the identity is on tokens only
	limits   limits
	owed     *limits // see Keyring.owed; nil: the identity has lost no limits

	prefix audit.Prefix // of the lines in the log
}

// softwareKey is a private key in memory. Its identity is listed if the key is on no
// token. Nothing changes the identity once it is listed.
type softwareKey struct {
	identity
	kept kept
}

// wiredKey is a public key that keeps its wire form and its type, because clients use keys
// far more often than keys change.
type wiredKey struct {
	ssh.PublicKey
	wire []byte
	kind string
}

func wired(key ssh.PublicKey, wire string) *wiredKey { return &wiredKey{key, []byte(wire), key.Type()} }

// Marshal returns the wire form. Callers must not change it.
func (k *wiredKey) Marshal() []byte { return k.wire }

func (k *wiredKey) Type() string { return k.kind }

// plainKey is the SSH form of a key of a token. All views share it.
type plainKey struct {
	*wiredKey
	wire        string
	fingerprint string
}

// plainLocked returns the plainKey of a key, or nil when SSH has no such type of key or
// OpenSSH does not read the key.
func (k *Keyring) plainLocked(key request.Key) *plainKey {
	if p := k.plain[key]; p != nil {
		return p
	}
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil || sshkey.Readable(pub) != nil {
		return nil
	}
	wire := string(pub.Marshal())
	return &plainKey{wired(pub, wire), wire, k.fingerprint(pub)}
}

// tokenView has the identities of tokens. It is valid until something changes about them.
// If a key is in memory as well, its identity says so.
type tokenView struct {
	generation   uint64 // of the tokens
	certificates uint64 // generation
	change       uint64 // of the keyring
	expires      time.Time
	identities   []*identity
	byKey        map[string]*identity
	limits       map[string]limits // of all keys of tokens, shown or not, by their wire form
	limited      bool              // an identity is limited to destinations
}

// view has all identities. It is valid until something changes.
type view struct {
	tokens     *tokenView
	software   uint64 // change of the keys in memory
	expires    time.Time
	identities []*identity
	list       Listing
	byKey      map[string]*identity
	limits     map[string]limits // as in tokens
	limited    bool              // an identity is limited to destinations
}

// now returns the present view. It makes a new one if something has changed.
func (k *Keyring) now() *view {
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.Generation()
	if v := k.view.Load(); v != nil && v.software == k.software.change.Load() && !over(v.expires, time.Now()) && k.good(v.tokens, generation, certificates) {
		return v
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.nowLocked(generation, certificates)
}

// nowLocked returns the present view, for these generations.
func (k *Keyring) nowLocked(generation, certificates uint64) *view {
	tokens := k.nowOnTokensLocked(generation, certificates)
	if v := k.view.Load(); v != nil && v.tokens == tokens && v.software == k.software.change.Load() {
		return v // another goroutine has made this view meanwhile
	}
	v := &view{
		tokens: tokens, software: k.software.change.Load(), expires: tokens.expires, identities: slices.Clip(tokens.identities),
		byKey: maps.Clone(tokens.byKey), limits: tokens.limits, limited: tokens.limited,
	}
	for s := range k.software.all() {
		v.expires = sooner(v.expires, s.limits.expires)
		if v.byKey[s.ID] == nil {
			v.byKey[s.ID] = &s.identity
			v.identities = append(v.identities, &s.identity)
			v.limited = v.limited || s.limits.route()
		}
	}
	v.list.Identities = make([]Identity, len(v.identities))
	for i, id := range v.identities {
		v.list.Identities[i] = Identity{Key: id.key, Comment: k.listedAs(id), Named: id.named || len(id.Homes) == 0}
	}
	k.view.Store(v)
	return v
}

// nowOnTokens returns the present view of tokens. It makes a new one if something has
// changed about them.
func (k *Keyring) nowOnTokens() *tokenView {
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.Generation()
	if v := k.tokens.Load(); k.good(v, generation, certificates) {
		return v
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.nowOnTokensLocked(generation, certificates)
}

// good tells whether the view is present: nothing has changed since.
func (k *Keyring) good(v *tokenView, generation, certificates uint64) bool {
	return v != nil && v.generation == generation && v.certificates == certificates && v.change == k.change.Load() &&
		!over(v.expires, time.Now())
}

func (k *Keyring) nowOnTokensLocked(generation, certificates uint64) *tokenView {
	k.expireLocked()
	// Another goroutine may have made the view meanwhile.
	if v := k.tokens.Load(); k.good(v, generation, certificates) {
		return v
	}
	v := &tokenView{
		generation: generation, certificates: certificates, change: k.change.Load(),
		byKey: make(map[string]*identity), limits: make(map[string]limits),
	}
	k.tokensLocked(v)
	v.certify(k.opts.Certificates.Certificates(), k.hidden)
	for _, id := range v.identities {
		if s := k.software.get(id.ID); s != nil {
			// The limits of the key on the token and those of the key in memory limit both.
			v.until(s.limits.expires)
			id.software, id.limits = s.software, id.limits.and(s.limits)
		}
		if owed := k.owed[id.plainWire()]; owed != nil && id.limits.looser(owed) {
			id.owed = owed
		}
		v.limited = v.limited || id.limits.route() || id.owed != nil && id.owed.route()
	}
	k.tokens.Store(v)
	return v
}

// identityLocked returns the identity with this wire form, or nil. v is the present view.
func (k *Keyring) identityLocked(v *tokenView, wire string) *identity {
	if id := v.byKey[wire]; id != nil {
		return id
	}
	if s := k.software.get(wire); s != nil {
		return &s.identity
	}
	return nil
}

// softwareChangedLocked notes that a key in memory has come, has changed or has gone. The
// view of tokens changes only if the key is on a token, too.
func (k *Keyring) softwareChangedLocked(wire string) {
	if v := k.tokens.Load(); v != nil && v.byKey[wire] != nil {
		k.change.Add(1)
	}
}

// listedAs returns the comment of an identity in the list that clients get.
func (k *Keyring) listedAs(id *identity) string {
	if k.opts.Listed != nil && len(id.Homes) > 0 && id.Comment == id.Homes[0].URI() {
		return k.opts.Listed(id.Homes[0])
	}
	return id.Comment
}

// until notes that the view is valid until t at most. The zero time sets no bound.
func (v *tokenView) until(t time.Time) {
	if !t.IsZero() && (v.expires.IsZero() || t.Before(v.expires)) {
		v.expires = t
	}
}

func (v *tokenView) add(id *identity) {
	v.byKey[id.ID] = id
	v.identities = append(v.identities, id)
}

// tokensLocked puts the identities of tokens into the view. The limits of all additions
// that cover a key bind the key, in any order and with any selection: an addition can
// only tighten the limits.
func (k *Keyring) tokensLocked(v *tokenView) {
	present := k.opts.Tokens.Keys()
	keys := slices.Concat(present, k.opts.Tokens.Away())
	plains := make(map[request.Key]*plainKey, len(keys))
	defer func() { k.plain = plains }()
	plainOf := func(key request.Key) *plainKey {
		plain := plains[key]
		if plain == nil {
			if plain = k.plainLocked(key); plain != nil {
				plains[key] = plain
			}
		}
		return plain
	}
	// take puts a key into the view. If cert is not nil, the key gets the certificate.
	// named says that the configuration names keys, and alone that it or a client names
	// this single key.
	take := func(i int, cert *ssh.Certificate, named, alone bool) {
		key := keys[i]
		awaited := k.opts.OfferAway != nil && k.opts.OfferAway(key, named)
		if i >= len(present) && !awaited {
			return
		}
		plain := plainOf(key)
		if plain == nil {
			return
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
			id = &identity{
				Target: request.Target{ID: wire, Comment: key.URI(), Fingerprint: plain.fingerprint, PublicKey: key.Public()},
				key:    shown, plain: plain.wiredKey,
			}
			if name := k.opts.Name(key); name != "" {
				id.Comment, id.named = name, true
			}
			v.add(id)
		}
		id.named = id.named || alone
		if !slices.Contains(id.Homes, key) {
			id.Homes = append(id.Homes, key)
		}
		id.awaited = id.awaited || awaited
	}
	for i, alone := range request.Offers(keys, k.opts.Automatic) {
		take(i, nil, k.opts.Automatic != nil, alone)
	}
	type covered struct {
		a *addition
		i int
	}
	var all []covered
	for _, a := range k.added {
		v.until(a.limits.expires)
		for i, key := range keys {
			if !k.selectsLocked(a.selection, key) {
				continue
			}
			if plain := plainOf(key); plain != nil && a.covers(plain.wire) {
				all = append(all, covered{a, i})
				v.limits[plain.wire] = v.limits[plain.wire].and(k.limitsForLocked(a, key))
			}
		}
	}
	for _, c := range all {
		if !v.limits[plains[keys[c.i]].wire].certificates && !c.a.limits.certificates {
			take(c.i, nil, false, !c.a.selection.Broad())
		}
		for _, cert := range c.a.certificates {
			take(c.i, cert, false, true)
		}
	}
	for _, id := range v.identities {
		id.limits = v.limits[id.plainWire()]
		id.limits.certificates = id.limits.certificates || id.ID != id.plainWire()
	}
}

// counts tells whether a certificate is valid now.
func (v *tokenView) counts(cert *ssh.Certificate) bool {
	ok, change := sshkey.Valid(cert, time.Now())
	v.until(change)
	return ok
}

// certify also shows the keys of tokens with their certificates. Each certificate comes
// after its key.
func (v *tokenView) certify(certs []*ssh.Certificate, hidden map[string]uint64) {
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
		limits := id.limits
		limits.certificates = true
		for _, c := range of[id.ID] {
			wire := string(c.Marshal())
			n, removed := hidden[wire]
			if v.byKey[wire] != nil || removed && id.insertions() <= n || !v.counts(c) {
				continue
			}
			v.add(&identity{
				Target: request.Target{ID: wire, Comment: id.Comment, Fingerprint: id.Fingerprint, PublicKey: id.PublicKey, Homes: id.Homes},
				key:    wired(c, wire), plain: id.plain, named: id.named, awaited: id.awaited, limits: limits,
			})
		}
	}
}

// insertions counts how often the tokens of the identity have appeared, and returns the
// largest count.
func (id *identity) insertions() (n uint64) {
	for _, key := range id.Homes {
		n = max(n, key.Insertions())
	}
	return n
}

// plainWire returns the wire form of the key without a certificate.
func (id *identity) plainWire() string { return string(id.plain.Marshal()) }

// selectsLocked applies request.Selects to a selection that a client named. If the
// configuration selects some keys, a client that names every key means only these. So it
// can bring them back.
func (k *Keyring) selectsLocked(s request.Selection, key request.Key) bool {
	if s.All() && len(k.opts.Automatic) > 0 {
		return request.Offered(key, k.opts.Automatic)
	}
	return request.Selects(s, key)
}

// cryptoOf returns a key in the form of the standard library, or nil if it has none.
func cryptoOf(key ssh.PublicKey) crypto.PublicKey {
	if k, ok := key.(ssh.CryptoPublicKey); ok {
		return k.CryptoPublicKey()
	}
	return nil
}
