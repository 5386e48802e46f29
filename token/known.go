package token

import (
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"p11-agent/token/known"
	"p11-agent/token/objects"
	"p11-agent/token/pace"
	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// KnownKeys is what a Store does with the list of known keys (package known).
type KnownKeys int

// The values of KnownKeys.
const (
	KnownIgnored KnownKeys = iota // the Store neither reads nor writes the list
	KnownRead                     // the Store reads the list
	KnownKept                     // the Store reads the list, and writes it when it changes
)

// knownPair returns the key pair of an entry of the list.
func knownPair(k *known.Key) (*pairs.Pair, error) {
	pub, err := k.PublicKey()
	if err != nil {
		return nil, err
	}
	keyType, ok := pairs.KeyType(pub)
	if !ok {
		return nil, errors.New("SSH has no public keys of the type of an entry")
	}
	if err := pairs.Usable(pub); err != nil {
		return nil, err
	}
	p := &pairs.Pair{
		ID: k.ID, Label: k.Label, KeyType: keyType, Public: pub, Sum: pairs.Digest(pub), Always: k.Always, Unfit: k.Unfit,
	}
	if k.Shown != "" {
		p.AddMember(pairs.Member{Class: wire.CKOPublicKey, Name: pairs.Name{ID: k.ID, Label: k.Shown}})
	}
	p.AddMember(pairs.Member{Class: wire.CKOPublicKey, Name: pairs.Name{ID: k.ID, Label: k.Label}})
	p.Modulus, p.Point = pairs.Attributes(pub)
	if k.Private {
		p.Private = &pairs.Name{ID: k.ID, Label: k.Label}
	}
	return p, nil
}

func checkKnown(k *known.Key) error {
	_, err := knownPair(k)
	return err
}

// loadKnown reads the list of a directory. The list is empty without a directory, and when
// the file cannot be used.
func loadKnown(dir string, log *slog.Logger) *known.List {
	if dir == "" {
		return new(known.List)
	}
	l, err := known.Load(dir, checkKnown)
	if err != nil {
		log.Warn("cannot read the list of known keys; starting with an empty one", "file", filepath.Join(dir, known.File), "reason", err)
		return new(known.List)
	}
	return l
}

// homesOf returns the homes that the list gives to tokens. They stay: see home.proved.
func homesOf(l *known.List) map[wire.TokenID]home {
	all := make(map[wire.TokenID]home)
	for id, module := range l.Homes() {
		all[id] = home{module: module, proved: true}
	}
	return all
}

// restore makes the tokens of the list known to the module. A token that was present when
// the list was written counts as present until the first look at the module. So the keys
// listed right after the start of the agent are those listed at its end.
func (m *module) restore(l *known.List) {
	for i := range l.Tokens {
		t := &l.Tokens[i]
		if t.Module != m.identity || m.tokens[t.ID()] != nil {
			continue
		}
		restored := newToken(m, t.ID())
		restored.seen = t.Seen
		if t.Login {
			restored.slot.Info.Flags = wire.CKFLoginRequired
		}
		var all []*pairs.Pair
		for j := range t.Keys {
			if f, err := knownPair(&t.Keys[j]); err == nil { // known.Load has checked the key
				all = append(all, f)
			}
		}
		restored.holdLocked(objects.Known(all))
		m.tokens[restored.ID] = restored
		if t.There {
			m.order = append(m.order, restored)
		}
	}
	m.last = slices.Clone(m.order)
}

// knownNow returns the list of this moment. It has the tokens with keys, the tokens whose
// home a PIN has proved, and the tokens of modules that are missing: those come back with
// their module.
func (s *Store) knownNow() []known.Token {
	s.mu.Lock()
	homes, strangers := maps.Clone(s.homes), s.strangers
	s.mu.Unlock()
	var all []known.Token
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			entry := t.entry()
			h := homes[t.ID]
			entry.Home = h.module == m.identity
			if len(entry.Keys) > 0 || entry.Home && h.proved {
				all = append(all, entry)
			}
		}
	}
	for _, entry := range strangers {
		entry.There = false
		entry.Home = homes[entry.ID()].module == entry.Module
		all = append(all, entry)
	}
	return all
}

// entry returns the entry of a token.
func (t *Token) entry() known.Token {
	entry := known.Token{
		Module: t.module.identity, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model, Twin: t.ID.Twin,
		There: t.present(), Seen: t.lastSeen().UTC().Truncate(time.Second),
		Login: t.info().Flags&wire.CKFLoginRequired != 0,
	}
	for _, key := range t.keyList() {
		der, err := x509.MarshalPKIXPublicKey(key.pair.Public)
		if err != nil {
			continue // the agent parses no such key
		}
		e := known.Key{
			ID: key.pair.ID, Label: key.pair.Label, Public: der, Always: key.pair.Always, Unfit: key.pair.Unfit,
			Private: key.pair.Private != nil,
		}
		if shown := key.PublicLabel(); shown != e.Label {
			e.Shown = shown
		}
		if checkKnown(&e) == nil {
			entry.Keys = append(entry.Keys, e)
		}
	}
	return entry
}

// keepKnown writes the list whenever it has changed, and once more when the Store closes.
func (s *Store) keepKnown() {
	w := known.NewWriter(s.opts.StateDir)
	rate := pace.Limit{Burst: knownBurst, Every: knownEvery}
	save := func() {
		if err := w.Write(s.knownNow()); err != nil {
			s.log.Warn("cannot write the list of known keys", "file", w.Path(), "reason", err)
		}
	}
	for {
		select {
		case <-s.dirty:
			if !rate.Wait(s.ctx) {
				s.rewrite() // the Store closes: the case below writes the list
				continue
			}
			save()
		case <-s.ctx.Done():
			select {
			case <-s.dirty:
				save()
			default:
			}
			return
		}
	}
}
