// Package pairs puts the objects of a token together to key pairs.
//
// PKCS#11 has no key pairs. A token holds private keys, public keys and certificates, and many tokens hide private
// keys until a login. [Find] decides which objects belong together: by the public key if both objects show one,
// else by ID and label, and in the end by what is left. The first signature shows whether that was right, because
// the caller verifies it.
//
// The package promises time and memory that grow linearly with the number of objects. It never returns a pair that
// SSH cannot use, and it does not change or keep the objects that it gets. Reading the objects, and remembering
// pairs from one look to the next, are the business of package token. The package does no I/O. Functions may be
// called from any goroutine; a [Pair] has no lock.
package pairs

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"p11-agent/token/wire"
)

const (
	// MaxText is the most bytes of an object's label or ID.
	MaxText = 4 << 10
	// maxMembers is the most objects that a pair remembers.
	maxMembers = 64
)

// ErrLongText is the reason to skip an object whose label or ID has more than [MaxText] bytes.
var ErrLongText = fmt.Errorf("its ID or label has more than %d bytes", MaxText)

// A Pair is a key pair: a private key with its public key, or an object that stands for a hidden private key.
type Pair struct {
	// ID is CKA_ID of the private key, or of another object if the token has not shown the private key. Label is
	// likewise CKA_LABEL.
	ID    []byte
	Label string
	// Members are the objects of the pair. A URI may name any of them.
	Members []Member
	// Private is the name of the private key, or nil if the token has never shown it.
	Private *Name

	KeyType uint64            // CKK
	Public  crypto.PublicKey  // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
	Sum     [sha256.Size]byte // Digest(Public)
	// Modulus and Point are as in Attributes.
	Modulus, Point []byte
	// Certificates are those of the key on the token.
	Certificates []*Certificate

	Visible bool // the token shows the private key now
	Open    bool // the token shows the private key without a login, so that the key may sign without one
	Always  bool // CKA_ALWAYS_AUTHENTICATE
	// Sign, Decrypt and Derive are CKA_SIGN, CKA_DECRYPT and CKA_DERIVE of the private key, if the token has shown it.
	Sign, Decrypt, Derive wire.Tri
	// Loose means that several private keys may belong to the public key. A signature shows which one does.
	Loose bool
	// Unfit is the reason not to offer the key unless a user names it, or empty.
	Unfit string

	params  []byte // CKA_EC_PARAMS of the private key
	foreign bool   // the pair consists of the certificate of an authority only
}

// A Name is what a token calls an object.
type Name struct {
	ID    []byte
	Label string
}

// A Certificate is an X.509 certificate on a token.
type Certificate struct {
	Name
	DER []byte
}

// A KeyObject is a public key object on a token.
type KeyObject struct {
	Name
	Key crypto.PublicKey // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
}

// A Member is one object of a pair.
type Member struct {
	Class uint64 // CKO
	Name
}

// Options say how to put objects together.
type Options struct {
	Token wire.TokenID
	// Hidden means that the token may hold private keys that it shows only after a login. Then a public key or a
	// certificate stands for its private key.
	Hidden bool
	// Cut means that the list of objects is not complete. Then a public key stands for its private key as well.
	Cut bool
	// Configured are public keys that the configuration gives. The token's own public keys and certificates win.
	Configured []Configured
	// Skip is called for each object that Find does not use, with the reason. It may be nil.
	Skip func(o wire.Object, reason error)
}

// Found are the objects of a token.
type Found struct {
	Pairs []*Pair // in the order of the token's objects
	// Certificates and Keys belong to none of the pairs: certificates of authorities, public keys without a private
	// key.
	Certificates []*Certificate
	Keys         []*KeyObject
}

// Find puts the objects of a token together to key pairs.
func Find(objects []wire.Object, opts Options) Found {
	return newFinder(opts).find(objects)
}

// A finder runs Find.
type finder struct {
	opts    Options
	index   *index
	pairs   []*Pair
	certs   []*Certificate             // all that can be read
	keys    []*KeyObject               // all that can be read
	foreign map[[sha256.Size]byte]bool // the digests of certificates, as authorities returns them
}

func newFinder(opts Options) *finder {
	if opts.Skip == nil {
		opts.Skip = func(wire.Object, error) {}
	}
	return &finder{opts: opts, index: newIndex()}
}

// find adds public keys first: they are the best source of the public key. A private key finds its pair by ID, or
// by its own public key. Certificates come last. A certificate of an authority may have the ID of a key that the
// authority vouches for, so it comes after the key's own certificate.
func (f *finder) find(objects []wire.Object) Found {
	objects = authoritiesLast(f.withoutLongTexts(f.withConfigured(objects)))
	f.foreign = authorities(objects)
	for _, step := range []struct {
		class uint64
		add   func(wire.Object) error
	}{
		{wire.CKOPublicKey, f.addPublicKey},
		{wire.CKOPrivateKey, f.addPrivateKey},
		{wire.CKOCertificate, f.addCertificate},
	} {
		for _, o := range objects {
			if o.Class != step.class {
				continue
			}
			if err := step.add(o); err != nil {
				f.opts.Skip(o, err)
			}
		}
	}
	return f.found(f.usable(join(f.pairs, f.opts.Hidden)))
}

// found adds to the pairs the objects that belong to none of them.
func (f *finder) found(all []*Pair) Found {
	found := Found{Pairs: all}
	used, sums := make(map[*Certificate]bool), make(map[[sha256.Size]byte]bool)
	for _, p := range all {
		sums[p.Sum] = true
		for _, c := range p.Certificates {
			used[c] = true
		}
	}
	for _, c := range f.certs {
		if !used[c] {
			found.Certificates = append(found.Certificates, c)
		}
	}
	for _, k := range f.keys {
		if !sums[Digest(k.Key)] {
			found.Keys = append(found.Keys, k)
		}
	}
	return found
}

// withConfigured adds an object for each configured public key that the token lacks.
func (f *finder) withConfigured(objects []wire.Object) []wire.Object {
	if len(f.opts.Configured) == 0 {
		return objects
	}
	known := Find(objects, Options{Token: f.opts.Token, Hidden: f.opts.Hidden}).Pairs
	objects = slices.Clip(objects)
	for _, c := range f.opts.Configured {
		if !slices.ContainsFunc(known, c.names) {
			objects = append(objects, c.object(objects))
		}
	}
	return objects
}

// withoutLongTexts removes the objects whose ID or label is too long, and clears both for Skip.
func (f *finder) withoutLongTexts(objects []wire.Object) []wire.Object {
	return slices.DeleteFunc(slices.Clone(objects), func(o wire.Object) bool {
		long := max(len(o.ID), len(o.Label)) > MaxText
		if long {
			o.ID, o.Label = nil, ""
			f.opts.Skip(o, ErrLongText)
		}
		return long
	})
}

func (f *finder) addPublicKey(o wire.Object) error {
	pub, err := PublicKey(o)
	if err != nil {
		return err
	}
	f.keys = append(f.keys, &KeyObject{Name{o.ID, o.Label}, pub})
	p := f.add(o, o.KeyType, pub)
	if o.Sign == wire.False {
		p.Unfit = "its public key is not for verifying signatures"
	}
	return nil
}

func (f *finder) addPrivateKey(o wire.Object) error {
	if !slices.Contains([]uint64{wire.CKKRSA, wire.CKKEC, wire.CKKECEdwards}, o.KeyType) {
		return fmt.Errorf("its type (CKK %#x) cannot be used with SSH", o.KeyType)
	}
	pub, _ := PublicKey(o) // Many tokens do not show the public key here.
	p := f.add(o, o.KeyType, pub)
	p.Open = f.opts.Hidden || o.Private == wire.False
	p.Label = cmp.Or(o.Label, p.Label)
	p.Private, p.params = &Name{o.ID, o.Label}, o.ECParams
	p.Always = o.AlwaysAuth == wire.True
	p.Sign, p.Decrypt, p.Derive = o.Sign, o.Decrypt, o.Derive
	p.Unfit = ""
	if o.Sign == wire.False {
		p.Unfit = "it is not for signing"
	}
	return nil
}

func (f *finder) addCertificate(o wire.Object) error {
	cert, err := certificate(o)
	if err != nil {
		return err
	}
	c := &Certificate{Name{o.ID, o.Label}, o.Value}
	f.certs = append(f.certs, c)
	keyType, ok := KeyType(cert.PublicKey)
	if !ok {
		return errors.New("the key in this certificate cannot be used with SSH")
	}
	p := f.add(o, keyType, cert.PublicKey)
	if len(p.Certificates) < maxMembers {
		p.Certificates = append(p.Certificates, c)
	}
	issued := f.foreign[sha256.Sum256(cert.Raw)]
	keyed := slices.ContainsFunc(p.Members, Member.isKey)
	p.foreign = issued && !keyed
	if selfIssued(cert) && (keyed || !issued) {
		return nil // The key has issued its own certificate.
	}
	// The certificate counts even if the private key says that it signs: libykcs11 2.2 says so of each key after a
	// login.
	if reason := unfitCertificate(cert); reason != "" && p.Unfit == "" {
		p.Unfit = reason
	}
	return nil
}

// add adds an object to its pair, and makes a new pair if no pair fits. pub is nil if the object shows no public key.
func (f *finder) add(o wire.Object, keyType uint64, pub crypto.PublicKey) *Pair {
	var sum [sha256.Size]byte
	if pub != nil {
		sum = Digest(pub)
	}
	p := f.pairOf(o, keyType, pub, sum)
	if p == nil {
		p = &Pair{KeyType: keyType}
		f.pairs = append(f.pairs, p)
	}
	isPrivate := o.Class == wire.CKOPrivateKey
	if len(p.ID) == 0 || isPrivate && len(o.ID) > 0 {
		p.ID = o.ID
	}
	if p.Public == nil && pub != nil {
		p.Public, p.Sum = pub, sum
	}
	if p.Label == "" {
		p.Label = o.Label
	}
	p.Visible = p.Visible || isPrivate
	p.AddMember(Member{o.Class, Name{o.ID, o.Label}})
	f.index.note(p)
	return p
}

// A fit says how well an object fits a pair. The best fit wins, and among equal ones the first candidate.
type fit int

const (
	fitNone        fit = iota
	fitCertificate     // same public key; a certificate may have another ID than its key
	fitID              // same ID; one of both shows no public key
	fitIDAndLabel      // same ID and label; one of both shows no public key
	fitPublic          // same public key; one of both has no ID
	fitPublicAndID     // same public key and ID
)

// pairOf returns the pair that an object belongs to, or nil.
func (f *finder) pairOf(o wire.Object, keyType uint64, pub crypto.PublicKey, sum [sha256.Size]byte) (best *Pair) {
	bestFit := fitNone
	for p := range f.index.candidates(o, keyType, pub, sum) {
		if p.KeyType != keyType {
			continue
		}
		fit := p.fitOfName(o)
		if p.Public != nil && pub != nil {
			fit = p.fitOfPublic(o, sum)
		}
		if fit > bestFit {
			best, bestFit = p, fit
		}
	}
	return best
}

// fitOfPublic compares an object with a pair if both have a public key.
func (p *Pair) fitOfPublic(o wire.Object, sum [sha256.Size]byte) fit {
	switch {
	case p.Sum != sum:
		return fitNone
	case bytes.Equal(p.ID, o.ID):
		return fitPublicAndID
	case len(p.ID) == 0 || len(o.ID) == 0:
		return fitPublic
	case o.Class == wire.CKOCertificate:
		return fitCertificate
	}
	return fitNone
}

// fitOfName compares an object with a pair if one of both has no public key.
func (p *Pair) fitOfName(o wire.Object) fit {
	switch {
	case !bytes.Equal(p.ID, o.ID):
		return fitNone
	case o.Class == wire.CKOPrivateKey && p.Visible: // A pair has one private key.
		return fitNone
	case p.Label == o.Label:
		return fitIDAndLabel
	}
	return fitID
}

// usable returns the pairs that SSH can use, and completes them.
func (f *finder) usable(all []*Pair) (usable []*Pair) {
	for _, p := range all {
		if err := f.check(p); err != nil {
			f.opts.Skip(wire.Object{Class: wire.CKOPrivateKey, ID: p.ID, Label: p.Label, KeyType: p.KeyType}, err)
			continue
		}
		p.Modulus, p.Point = Attributes(p.Public)
		if p.isAttestation(f.opts.Token) {
			p.Unfit = "it is an attestation key"
		}
		usable = append(usable, p)
	}
	return usable
}

// check returns the reason not to use a pair, or nil.
func (f *finder) check(p *Pair) error {
	switch {
	case p.Public == nil:
		return errors.New("the token gives no public key or certificate for it")
	case !p.Visible && !f.opts.Hidden && !f.opts.Cut:
		return errors.New("there is no private key for it on the token")
	}
	return Usable(p.Public)
}

func (m Member) isKey() bool { return m.Class != wire.CKOCertificate }

func (c *Certificate) same(o *Certificate) bool { return bytes.Equal(c.DER, o.DER) }

// AddMember notes an object of the pair. The pair remembers a bounded number of objects, and always the private key.
func (p *Pair) AddMember(m Member) {
	if len(p.Members) >= maxMembers && m.Class != wire.CKOPrivateKey {
		return
	}
	p.Members = append(p.Members, m)
}

// HasID reports whether an object of the pair has an ID.
func (p *Pair) HasID(id []byte) bool {
	return bytes.Equal(p.ID, id) || slices.ContainsFunc(p.Members, func(m Member) bool { return bytes.Equal(m.ID, id) })
}

// HasLabel reports whether an object of the pair has a label.
func (p *Pair) HasLabel(label string) bool {
	return slices.ContainsFunc(p.Members, func(m Member) bool { return m.Label == label })
}

// PublicLabel returns the label of the first member that the token shows without a login: a public key or a
// certificate. It returns Label if no such member has a label.
func (p *Pair) PublicLabel() string {
	for _, m := range p.Members {
		if m.Label != "" && m.Class != wire.CKOPrivateKey {
			return m.Label
		}
	}
	return p.Label
}

// Recall copies what an earlier login has shown of the private key. old is the same key as the caller knew it
// before.
func (p *Pair) Recall(old *Pair) {
	p.Always, p.Unfit, p.Loose = old.Always, old.Unfit, old.Loose
	p.Sign, p.Decrypt, p.Derive = old.Sign, old.Decrypt, old.Derive
	if old.Private == nil {
		return
	}
	name := *old.Private
	p.Private = &name
	if len(name.ID) > 0 {
		p.ID = name.ID
	}
	p.Label = cmp.Or(name.Label, p.Label)
	p.AddMember(Member{wire.CKOPrivateKey, name})
}

// Same reports whether two pairs look the same.
func (p *Pair) Same(o *Pair) bool {
	return bytes.Equal(p.ID, o.ID) && p.Label == o.Label &&
		slices.EqualFunc(p.Members, o.Members, func(a, b Member) bool {
			return a.Class == b.Class && a.Label == b.Label && bytes.Equal(a.ID, b.ID)
		}) &&
		p.Visible == o.Visible && p.Open == o.Open && p.Always == o.Always && p.Loose == o.Loose && p.Unfit == o.Unfit &&
		p.Sign == o.Sign && p.Decrypt == o.Decrypt && p.Derive == o.Derive &&
		slices.EqualFunc(p.Certificates, o.Certificates, (*Certificate).same) && Equal(p.Public, o.Public)
}

// Weight estimates the memory in bytes that the pair takes without its certificates.
func (p *Pair) Weight() int {
	n := 1024 + len(p.ID) + 2*len(p.Modulus) + 2*len(p.Point)
	for _, m := range p.Members {
		n += len(m.Label)
	}
	return n
}
