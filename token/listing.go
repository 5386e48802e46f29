package token

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// errEndless ends a module process that lists more than it may.
var errEndless = errors.New("it lists objects without end")

// A listed is the objects of a token, as its module process lists them.
type listed struct {
	info    wire.TokenInfo
	objects []wire.Object
	size    int  // of the objects, about and in bytes
	cut     bool // the token has more of them
	long    int  // certificates without their value, which is too long
}

// add adds objects, as long as there are not more than a module process may list.
func (l *listed) add(objects []wire.Object) error {
	l.objects = append(l.objects, objects...)
	l.size += bulk(objects)
	const most = wire.MaxObjects + wire.MaxNamedObjects
	if len(l.objects) > most || l.size > wire.MaxObjectBytes+wire.MaxNamedBytes+objectRoom*most {
		return errEndless
	}
	return nil
}

// objects has the module process list the objects of a token.
func (p *process) objects(ctx context.Context, req *wire.Objects) (*listed, error) {
	all := new(listed)
	part := func(f wire.Frame) error {
		part := new(wire.ObjectsPart)
		if err := f.Decode(part); err != nil {
			return err
		}
		if part.First {
			*all = listed{}
		}
		return all.add(part.Objects)
	}
	reply := new(wire.ObjectsReply)
	if err := p.callParts(ctx, listTimeout, wire.TypeObjects, req, reply, part); err != nil {
		return nil, err
	}
	if err := all.add(reply.Objects); err != nil {
		p.kill(fmt.Errorf("its answer made no sense: %w", err))
		return nil, err
	}
	all.info, all.cut, all.long = reply.Info, reply.Cut, int(reply.Long)
	return all, nil
}

// maxNameBytes bounds the names in one request: it has to fit into wire.MaxRequest.
const maxNameBytes = wire.MaxRequest / 2

// named returns the objects of the token that somebody has named. The module process finds
// them even when the token has more objects than it lists.
func (t *Token) named() (all []wire.ObjectName) {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted
	s.mu.Unlock()
	size := 0
	for _, u := range uris {
		if !t.matches(u, true) {
			continue
		}
		name := wire.ObjectName{ID: u.ID}
		// The module process makes UTF-8 of labels, and this one may be the result.
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

// isNamed tells whether somebody has named a key of the token.
func (t *Token) isNamed(p *pairs.Pair) bool {
	s := t.module.store
	s.mu.Lock()
	uris := s.wanted
	s.mu.Unlock()
	return slices.ContainsFunc(uris, func(u *pkcs11uri.URI) bool { return namedBy(p, u) && t.matches(u, true) })
}

// namedBy reports whether the object attributes of a URI name the key.
func namedBy(p *pairs.Pair, u *pkcs11uri.URI) bool {
	return (u.ID == nil || p.HasID(u.ID)) && (u.Object == nil || p.HasLabel(*u.Object))
}

// wantedURIs returns the URIs that name an object.
func wantedURIs(uris []*pkcs11uri.URI) []*pkcs11uri.URI {
	return slices.DeleteFunc(slices.Clone(uris), func(u *pkcs11uri.URI) bool { return u.ID == nil && u.Object == nil })
}

// maxAsked bounds the URIs of clients that have objects searched for.
const maxAsked = 256

// want has the objects that a client's URI names searched for, until unwantLocked.
func (s *Store) want(u *pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unwantLocked(u)
	if len(s.asked) == maxAsked {
		s.asked = s.asked[1:]
	}
	s.asked = append(slices.Clip(s.asked), wantedURIs([]*pkcs11uri.URI{u})...)
	s.setWantedLocked()
}

func (s *Store) unwantLocked(u *pkcs11uri.URI) {
	s.asked = slices.DeleteFunc(slices.Clone(s.asked), func(o *pkcs11uri.URI) bool { return o == u })
	s.setWantedLocked()
}

// setWantedLocked puts together the URIs of the configuration and of clients.
func (s *Store) setWantedLocked() { s.wanted = slices.Concat(s.configuredNames, s.asked) }

// idsOf counts the keys of each ID.
func idsOf(all []*pairs.Pair) map[string]int {
	ids := make(map[string]int, len(all))
	for _, p := range all {
		ids[string(p.ID)]++
	}
	return ids
}
