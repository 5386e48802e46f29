package objects

import (
	"slices"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// names holds the labels and IDs of the key pairs of a token. An object of no pair does not count: a URI with its name may still
// mean a hidden key.
type names struct{ labels, ids map[string]bool }

func (x names) add(n pairs.Name) {
	x.labels[n.Label] = true
	x.ids[string(n.ID)] = true
}

// indexNames notes the names of all objects.
func (s *Set) indexNames() {
	s.names = names{labels: make(map[string]bool), ids: make(map[string]bool)}
	for _, p := range s.pairs {
		for _, m := range p.Members { // also those whose certificate is left out
			s.names.add(m.Name)
		}
		s.names.ids[string(p.ID)] = true
	}
	for c := range s.Certificates() {
		s.names.add(c.Name)
	}
	for name := range s.PublicKeys() {
		s.names.add(name)
	}
}

// Names reports whether the object attributes of a URI name a pair: ID and label, and the class of one of its
// objects. A private key that shows only after a login counts.
func Names(u *pkcs11uri.URI, p *pairs.Pair) bool {
	if !hasName(u, p) {
		return false
	}
	label := ""
	if u.Object != nil {
		label = *u.Object
	}
	fits := func(class uint64) bool {
		return u.MatchObject(pkcs11uri.ObjectInfo{Class: className(class), ID: u.ID, Label: label})
	}
	return fits(wire.CKOPrivateKey) || slices.ContainsFunc(p.Members, func(m pairs.Member) bool { return fits(m.Class) })
}

// hasName reports whether a pair has the ID and label of a URI.
func hasName(u *pkcs11uri.URI, p *pairs.Pair) bool {
	return (u.ID == nil || p.HasID(u.ID)) && (u.Object == nil || p.HasLabel(*u.Object))
}

func className(cko uint64) pkcs11uri.Class {
	switch cko {
	case wire.CKOCertificate:
		return pkcs11uri.ClassCert
	case wire.CKOPublicKey:
		return pkcs11uri.ClassPublic
	default:
		return pkcs11uri.ClassPrivate
	}
}

// Hidden reports whether the token hides the private key of a pair, and has always hidden it.
func Hidden(p *pairs.Pair) bool { return !p.Visible && p.Private == nil }

// MayName reports whether the object attributes of a URI may name the hidden private key of a pair. A label or ID of
// another object of the token belongs to that object.
func (s *Set) MayName(u *pkcs11uri.URI, p *pairs.Pair) bool {
	if s == nil || s.cut { // then the name may belong to an object that is not in the Set
		return false
	}
	if !Hidden(p) || u.Type != "" && u.Type != pkcs11uri.ClassPrivate || u.Object == nil && u.ID == nil {
		return false
	}
	label := u.Object == nil || p.HasLabel(*u.Object) || !s.names.labels[*u.Object]
	// A public key or certificate nearly always has the ID of its private key.
	noID := len(p.ID) == 0 || u.Type == pkcs11uri.ClassPrivate
	id := u.ID == nil || p.HasID(u.ID) || noID && !s.names.ids[string(u.ID)]
	return label && id
}

// maxNameBytes bounds the names in one request, which must fit into wire.MaxRequest.
const maxNameBytes = wire.MaxRequest / 2

// SearchNames returns the names of objects in URIs, for which the module process searches.
func SearchNames(uris []*pkcs11uri.URI) (all []wire.ObjectName) {
	size := 0
	for _, u := range uris {
		name := wire.ObjectName{ID: u.ID}
		// The module process converts labels to UTF-8, and this label may be a result of that.
		if u.Object != nil && !strings.ContainsRune(*u.Object, '\uFFFD') {
			name.Label = *u.Object
		}
		size += len(name.ID) + len(name.Label) + 8
		if len(name.ID) == 0 && name.Label == "" || len(name.Label) > wire.MaxText {
			continue
		}
		if size > maxNameBytes || len(all) == wire.MaxNames {
			break
		}
		all = append(all, name)
	}
	return all
}
