package token

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"p11-agent/token/wire"
)

// KnownKeys is what a Store does with the list of the keys that it has seen. The
// list is a file in Options.StateDir and holds what everybody may know: tokens by
// name and serial number, and public keys.
type KnownKeys int

// The values of KnownKeys.
const (
	KnownIgnored KnownKeys = iota // neither read nor written
	KnownRead                     // read
	KnownKept                     // read, and written when it changes
)

// KnownFile is the name of the list in Options.StateDir.
const KnownFile = "known-keys"

// What the list may hold. The tokens that were away for the longest time go.
const (
	maxKnownFile   = 16 << 20 // bytes
	maxKnownTokens = 256
	maxKnownKeys   = wire.MaxList // of all tokens together
	maxKnownText   = 4 << 10      // bytes of one text or number
	knownVersion   = 2
)

// known is the list as it is in its file.
type known struct {
	Version int          `json:"version"`
	Tokens  []knownToken `json:"tokens"`
}

type knownToken struct {
	Module       string     `json:"module"`
	Label        string     `json:"label"`
	Serial       string     `json:"serial"`
	Manufacturer string     `json:"manufacturer"`
	Model        string     `json:"model"`
	Twin         uint32     `json:"twin,omitempty"` // see wire.TokenID
	There        bool       `json:"there"`          // when the list was written
	Seen         time.Time  `json:"seen"`
	Home         bool       `json:"home,omitempty"`  // it belongs to this module
	Login        bool       `json:"login,omitempty"` // CKF_LOGIN_REQUIRED
	Keys         []knownKey `json:"keys"`
}

// knownKey is a found with what it takes to offer the key while it is away.
type knownKey struct {
	ID     []byte `json:"id"`
	Label  string `json:"label"`
	Shown  string `json:"public_label,omitempty"` // Key.PublicLabel, where it is another one
	Public []byte `json:"public"`                 // SubjectPublicKeyInfo, RFC 5280 section 4.1
	Always bool   `json:"pin_each_use,omitempty"`
	Unfit  string `json:"unfit,omitempty"`
	// Private tells that the token has shown the private key: ID and Label are its own.
	Private bool `json:"private,omitempty"`
}

func (t *knownToken) id() wire.TokenID {
	return wire.TokenID{Label: t.Label, Serial: t.Serial, Manufacturer: t.Manufacturer, Model: t.Model, Twin: t.Twin}
}

// parseKnown reads the list. What does not make sense makes it an error as a
// whole: nobody but the agent writes it.
func parseKnown(b []byte) (*known, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	k := new(known)
	if err := d.Decode(k); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("there is more behind its end")
	}
	switch k.Version {
	case knownVersion:
	case 1:
		k.settle()
	default:
		return nil, fmt.Errorf("its version is %d, and %d is known here", k.Version, knownVersion)
	}
	if len(k.Tokens) > maxKnownTokens {
		return nil, fmt.Errorf("it has %d tokens", len(k.Tokens))
	}
	keys := 0
	for _, t := range k.Tokens {
		if t.Twin > maxTwins {
			return nil, errors.New("a token in it has a number that is too large")
		}
		for _, text := range []string{t.Module, t.Label, t.Serial, t.Manufacturer, t.Model} {
			if len(text) > maxKnownText {
				return nil, errors.New("a name in it is too long")
			}
		}
		if keys += len(t.Keys); keys > maxKnownKeys {
			return nil, errors.New("it has too many keys")
		}
		for _, key := range t.Keys {
			if _, err := key.found(); err != nil {
				return nil, err
			}
		}
	}
	return k, nil
}

// settle brings a list of version 1 up to date. It has the modules in their order, and
// tokens were used through the first that showed them.
func (k *known) settle() {
	seen := make(map[wire.TokenID]bool)
	for i := range k.Tokens {
		t := &k.Tokens[i]
		t.Home = !seen[t.id()]
		seen[t.id()] = true
	}
	k.Version = knownVersion
}

// homes tells which module each token belongs to.
func (k *known) homes() map[wire.TokenID]home {
	all := make(map[wire.TokenID]home)
	for _, t := range k.Tokens {
		if _, ok := all[t.id()]; t.Home && !ok {
			all[t.id()] = home{module: t.Module, proved: true}
		}
	}
	return all
}

// found is the key pair as far as the list tells it.
func (k *knownKey) found() (*found, error) {
	if max(len(k.ID), len(k.Label), len(k.Shown), len(k.Unfit), len(k.Public)) > maxKnownText {
		return nil, errors.New("a key in it is too long")
	}
	pub, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		return nil, fmt.Errorf("a public key in it: %w", err)
	}
	keyType, ok := keyTypeOf(pub)
	if !ok {
		return nil, errors.New("a public key in it is of a type that SSH does not have")
	}
	if err := usableKey(pub); err != nil {
		return nil, err
	}
	f := &found{
		id: k.ID, label: k.Label, labels: []string{k.Label}, classes: []uint64{wire.CKOPublicKey}, ids: [][]byte{k.ID},
		keyType: keyType, public: pub, sum: digest(pub), always: k.Always, unfit: k.Unfit,
	}
	if k.Shown != "" {
		f.labels, f.classes, f.ids = nil, nil, nil
		f.note(wire.CKOPublicKey, k.Shown, k.ID)
		f.note(wire.CKOPublicKey, k.Label, k.ID)
	}
	f.modulus, f.point = halves(pub)
	if k.Private {
		f.private = &privateName{k.ID, k.Label}
	}
	return f, nil
}

// loadKnown reads the list of a directory. Without one, and with one that cannot
// be used, nothing is known.
func loadKnown(dir string, log *slog.Logger) *known {
	if dir == "" {
		return new(known)
	}
	b, err := readOwnFile(filepath.Join(dir, KnownFile), maxKnownFile)
	if errors.Is(err, fs.ErrNotExist) {
		return new(known)
	}
	k := new(known)
	if err == nil {
		k, err = parseKnown(b)
	}
	if err != nil {
		log.Warn("the keys seen before are not known", "file", filepath.Join(dir, KnownFile), "reason", err)
		return new(known)
	}
	return k
}

// readOwnFile reads a file that nobody else can have written.
func readOwnFile(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.Mode().IsRegular():
		return nil, errors.New("it is no regular file")
	case !ok || int(sys.Uid) != os.Geteuid() || st.Mode().Perm()&0o022 != 0:
		return nil, errors.New("others could have written it")
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it has more than %d bytes", limit)
	}
	return b, err
}

// replaceFile writes a file that only its owner can read, whole or not at all.
func replaceFile(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}

// restore makes the module know the tokens that it had before. Those that were
// there then count as there until it is looked at: what is listed right after the
// start of the agent is what was listed at its end.
func (m *module) restore(k *known) {
	for _, t := range k.Tokens {
		if t.Module != m.identity || m.tokens[t.id()] != nil {
			continue
		}
		restored := newToken(m, t.id())
		restored.seen = t.Seen
		if t.Login {
			restored.slot.Info.Flags = wire.CKFLoginRequired
		}
		var all []*found
		for _, key := range t.Keys {
			if f, err := key.found(); err == nil { // parseKnown has seen to that
				all = append(all, f)
			}
		}
		ids := idsOf(all)
		for _, f := range all {
			restored.addLocked(newKey(restored, f, ids))
		}
		restored.names = indexNames(restored.keys)
		restored.weight = weight(all)
		m.tokens[restored.ID] = restored
		if t.There {
			m.order = append(m.order, restored)
		}
	}
	m.last = slices.Clone(m.order)
}

// knownNow is the list as it is to be written now. It has the tokens with keys, those
// that have their home by a PIN, and what it had of modules that are not there: a module
// that is missing for a while keeps its tokens.
func (s *Store) knownNow() *known {
	s.mu.Lock()
	homes, strangers := maps.Clone(s.homes), s.strangers
	s.mu.Unlock()
	k := &known{Version: knownVersion, Tokens: []knownToken{}}
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			entry := t.entry()
			h := homes[t.ID]
			entry.Home = h.module == m.identity
			if len(entry.Keys) > 0 || entry.Home && h.proved {
				k.Tokens = append(k.Tokens, entry)
			}
		}
	}
	for _, entry := range strangers {
		entry.There = false
		entry.Home = homes[entry.id()].module == entry.Module
		k.Tokens = append(k.Tokens, entry)
	}
	k.shorten()
	return k
}

// entry is what the list says of a token.
func (t *Token) entry() knownToken {
	entry := knownToken{
		Module: t.module.identity, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model, Twin: t.ID.Twin,
		There: t.present(), Seen: t.lastSeen().UTC().Truncate(time.Second),
		Login: t.info().Flags&wire.CKFLoginRequired != 0,
	}
	for _, key := range t.keyList() {
		der, err := x509.MarshalPKIXPublicKey(key.found.public)
		if err != nil {
			continue // no such key was ever parsed
		}
		e := knownKey{
			ID: key.found.id, Label: key.found.label, Public: der, Always: key.found.always, Unfit: key.found.unfit,
			Private: key.found.private != nil,
		}
		if shown := key.PublicLabel(); shown != e.Label {
			e.Shown = shown
		}
		if _, err := e.found(); err == nil {
			entry.Keys = append(entry.Keys, e)
		}
	}
	return entry
}

// size is what an entry takes of the file, in bytes and about: the encoding of JSON has
// up to six bytes for one of a text.
func (t *knownToken) size() int {
	n := 256 + 6*(len(t.Module)+len(t.Label)+len(t.Serial)+len(t.Manufacturer)+len(t.Model))
	for _, key := range t.Keys {
		n += 128 + 6*(len(key.Label)+len(key.Shown)+len(key.Unfit)) + 2*(len(key.ID)+len(key.Public))
	}
	return n
}

// A share is what entries take of the list.
type share struct{ tokens, keys, bytes int }

func (a share) plus(b share) share {
	return share{a.tokens + b.tokens, a.keys + b.keys, a.bytes + b.bytes}
}

func (a share) minus(b share) share {
	return share{a.tokens - b.tokens, a.keys - b.keys, a.bytes - b.bytes}
}

func (a share) least(b share) share {
	return share{min(a.tokens, b.tokens), min(a.keys, b.keys), min(a.bytes, b.bytes)}
}

func (a share) within(b share) bool {
	return a.tokens <= b.tokens && a.keys <= b.keys && a.bytes <= b.bytes
}

// shorten keeps the list within its bounds. The modules share it equally, and what one
// does not need is shared among the others: a module that shows ever new tokens drops
// tokens of its own.
func (k *known) shorten() {
	byModule := make(map[string][]int) // indices into k.Tokens, those to be kept first
	for i, t := range k.Tokens {
		byModule[t.Module] = append(byModule[t.Module], i)
	}
	names := slices.Sorted(maps.Keys(byModule))
	for _, list := range byModule {
		slices.SortStableFunc(list, func(a, b int) int { return compareKnown(&k.Tokens[a], &k.Tokens[b]) })
	}
	left := share{maxKnownTokens, maxKnownKeys, maxKnownFile / 2} // half: lines and indentation count as well
	keep := make(map[int]bool)
	for parts := len(names); parts > 0; parts /= 2 { // at last all that is left, for one large token
		for before := -1; len(keep) > before; {
			before = len(keep)
			most := share{left.tokens / parts, left.keys / parts, left.bytes / parts}
			for _, name := range names {
				room := left.least(most)
				for _, i := range byModule[name] {
					if s := k.Tokens[i].share(); !keep[i] && s.within(room) {
						room, left, keep[i] = room.minus(s), left.minus(s), true
					}
				}
			}
		}
	}
	kept := make([]knownToken, 0, len(keep))
	for i, t := range k.Tokens {
		if keep[i] {
			kept = append(kept, t)
		}
	}
	k.Tokens = kept
}

func (t *knownToken) share() share { return share{1, len(t.Keys), t.size()} }

// compareKnown puts those tokens of a module first that are to be kept: those that are
// there, and then those that were there last.
func compareKnown(a, b *knownToken) int {
	if a.There != b.There {
		if a.There {
			return -1
		}
		return 1
	}
	return b.Seen.Compare(a.Seen)
}

// keepKnown writes the list whenever it has changed, until the Store is closed
// and once more then.
func (s *Store) keepKnown() {
	path := filepath.Join(s.opts.StateDir, KnownFile)
	var written []byte
	rate := pace{burst: knownBurst, every: knownEvery}
	save := func() {
		k := s.knownNow()
		b, err := json.MarshalIndent(k, "", " ")
		if err == nil && !bytes.Equal(b, written) {
			err = replaceFile(path, append(b, '\n'))
		}
		if err != nil {
			s.log.Warn("the keys that were seen cannot be remembered", "file", path, "reason", err)
			return
		}
		written = b
	}
	for {
		select {
		case <-s.dirty:
			if !reserve(s.ctx, &rate) {
				s.rewrite() // for the end
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

// ForgetKnownKeys removes the list from a directory.
func ForgetKnownKeys(dir string) error {
	err := os.Remove(filepath.Join(dir, KnownFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// compareIDs puts tokens into an order of their own.
func compareIDs(a, b wire.TokenID) int {
	return cmp.Or(cmp.Compare(a.Label, b.Label), cmp.Compare(a.Serial, b.Serial),
		cmp.Compare(a.Manufacturer, b.Manufacturer), cmp.Compare(a.Model, b.Model), cmp.Compare(a.Twin, b.Twin))
}
