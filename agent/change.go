package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

var (
	errForwarded  = errors.New("it came over a forwarded connection")
	errReadOnly   = errors.New("the socket it came in at is read-only")
	errNoSoftware = errors.New("keys in memory are switched off (software-keys = false)")
	errNobody     = errors.New("nobody can be asked for confirmation")
)

// mayChange tells whether a connection may change what the agent holds.
func (c *Caller) mayChange() error {
	if c.Socket != nil && c.Socket.ReadOnly {
		return errReadOnly
	}
	return nil
}

// AddToken adds what the request's provider selects. What was added before under
// the same name is replaced.
func (k *Keyring) AddToken(ctx context.Context, c *Caller, r TokenRequest) error {
	rec := k.begin(c, RequestAdd)
	inside, err := k.lock.enter(ctx, c, nil)
	if err == nil {
		defer inside.leave()
		err = k.addToken(inside, rec, r)
	}
	k.end(rec, err)
	return err
}

func (k *Keyring) addToken(ctx context.Context, rec *record, r TokenRequest) error {
	c := rec.use.Caller
	if err := c.mayChange(); err != nil {
		return err
	}
	if c.Forwarded && !k.opts.RemoteTokens {
		return errForwarded
	}
	if r.Constraints.Confirm && k.opts.Confirm == nil {
		return errNobody
	}
	if r.Constraints.CertificatesOnly && len(r.Constraints.Certificates) == 0 {
		return errors.New("only certificates are to be added, but there are none")
	}
	s, err := k.opts.Tokens.Parse(r.Provider)
	if err != nil {
		return err
	}
	rec.URI = s.String()
	keys, err := k.opts.Tokens.Select(ctx, s, r.PIN)
	if err != nil {
		k.opts.Tokens.Drop(s)
		return err
	}

	before := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	a := &addition{selection: s, constraints: r.Constraints}
	if a.constraints.Lifetime == 0 {
		a.constraints.Lifetime = k.opts.Lifetime
	}
	if a.constraints.Lifetime > 0 {
		a.expires = time.Now().Add(a.constraints.Lifetime)
	}
	var meant []*identity
	for _, id := range before.identities {
		if !slices.ContainsFunc(id.homes, func(key Key) bool { return k.selectsLocked(s, key) }) {
			continue
		}
		// A client that may not see a key may not change what it may be used for.
		if err := id.constraints.permits(c); err != nil {
			k.opts.Tokens.Drop(s)
			return err
		}
		meant = append(meant, id)
	}
	for _, id := range meant {
		rec.loosened(&id.constraints, &a.constraints)
	}
	for _, old := range slices.Clone(k.added) {
		if old.selection.String() == s.String() {
			k.dropLocked(old)
		}
	}
	a.kept = kept{size: overhead + 2*len(r.Provider) + r.Constraints.Size(), forwarded: c.Forwarded}
	software, added := k.keptLocked()
	if err := mayKeep(a.kept, added.replaced(nil, a.kept), software, maxAdditions, maxForwardedAdditions); err != nil {
		k.opts.Tokens.Drop(s)
		return err
	}
	k.added = append(k.added, a)
	for _, key := range keys {
		if k.selectsLocked(s, key) {
			k.showLocked(key)
		}
	}
	k.change.Add(1)
	return nil
}

// loosened notes that a key may be used more freely from now on: that is what the
// client asks for by adding it again, and nobody else is told.
func (r *record) loosened(old, now *Constraints) {
	if now.looser(old) {
		r.Note = "constraints loosened: it was added again without those it had"
	}
}

// Add keeps a private key in memory. One that is there already gets the new
// comment and constraints.
func (k *Keyring) Add(ctx context.Context, c *Caller, r KeyRequest) error {
	rec := k.begin(c, RequestAdd)
	rec.Key, rec.Comment = k.fingerprint(plainOf(r.Public)), r.Comment
	err := k.add(ctx, rec, r, string(r.Public.Marshal()))
	k.end(rec, err)
	return err
}

func (k *Keyring) add(ctx context.Context, rec *record, r KeyRequest, wire string) error {
	c := rec.use.Caller
	if k.lock.locked() {
		return errLocked
	}
	if err := c.mayChange(); err != nil {
		return err
	}
	switch {
	case !k.opts.SoftwareKeys:
		return errNoSoftware
	case r.Constraints.Confirm && k.opts.Confirm == nil:
		return errNobody
	case len(r.Constraints.Certificates) > 0 || r.Constraints.CertificatesOnly:
		return errors.New("certificates can only be added to the keys of a token")
	}
	s, err := k.newSoftwareKey(ctx, c, r, wire)
	if err != nil {
		return err
	}
	if s.constraints.Lifetime == 0 {
		s.constraints.Lifetime = k.opts.Lifetime
	}
	if s.constraints.Lifetime > 0 {
		s.expires = time.Now().Add(s.constraints.Lifetime)
	}
	before := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if id := before.byKey[wire]; id != nil {
		if err := id.constraints.permits(c); err != nil {
			return err
		}
		rec.loosened(&id.constraints, &s.constraints)
	}
	i := slices.IndexFunc(k.software, func(o *softwareKey) bool { return o.wire == wire })
	var old *kept
	if i >= 0 {
		old = &k.software[i].kept
	}
	software, added := k.keptLocked()
	if err := mayKeep(s.kept, software.replaced(old, s.kept), added, maxSoftwareKeys, maxForwardedSoftwareKeys); err != nil {
		return err
	}
	if i >= 0 {
		k.software[i] = s
	} else {
		k.insertSoftwareLocked(s)
	}
	k.change.Add(1)
	return nil
}

// RemoveToken removes what AddToken has added for the same provider, and what
// it selects of the automatic identities.
func (k *Keyring) RemoveToken(_ context.Context, c *Caller, r TokenRequest) error {
	rec := k.begin(c, RequestRemove)
	err := k.removeToken(rec, r)
	k.end(rec, err)
	return err
}

func (k *Keyring) removeToken(rec *record, r TokenRequest) error {
	c := rec.use.Caller
	if k.lock.locked() {
		return errLocked
	}
	if err := c.mayChange(); err != nil {
		return err
	}
	s, err := k.opts.Tokens.Parse(r.Provider)
	if err != nil {
		return err
	}
	rec.URI = s.String()
	defer k.opts.Tokens.Drop(s)
	before := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	var meant []*identity
	for _, id := range before.identities {
		if !slices.ContainsFunc(id.homes, s.Match) {
			continue
		}
		if err := id.constraints.permits(c); err != nil {
			return err
		}
		meant = append(meant, id)
	}
	n := len(meant)
	for _, a := range slices.Clone(k.added) {
		if a.selection.String() == s.String() {
			k.dropLocked(a)
			n++
		}
	}
	if n == 0 {
		return errUnknownKey
	}
	for _, id := range meant {
		k.hideLocked(id)
		k.approvals.forgetIdentity(id.wire)
	}
	return nil
}

// Remove removes one identity: from memory for good, of a token until that is
// inserted again or the key is added again. One of an upstream agent is removed
// there.
func (k *Keyring) Remove(ctx context.Context, c *Caller, key []byte) error {
	rec := k.begin(c, RequestRemove)
	rec.Key = k.describe(key)
	err := k.remove(ctx, rec, key)
	k.end(rec, err)
	return err
}

func (k *Keyring) remove(ctx context.Context, rec *record, key []byte) error {
	c := rec.use.Caller
	if k.lock.locked() {
		return errLocked
	}
	if err := c.mayChange(); err != nil {
		return err
	}
	id := k.now().byKey[string(key)]
	if id == nil || !id.shownBy(c.Socket) {
		if u := k.upstreamOf(ctx, c, key); u != nil {
			rec.Upstream = u.Name()
			return u.Remove(ctx, c, key)
		}
		return errUnknownKey
	}
	rec.about(id)
	if err := id.constraints.permits(c); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.software = slices.DeleteFunc(k.software, func(s *softwareKey) bool { return s.wire == id.wire })
	if len(id.homes) > 0 {
		k.hideLocked(id)
	}
	k.approvals.forgetIdentity(id.wire)
	k.change.Add(1)
	return nil
}

// RemoveAll removes every identity, forgets what persons have allowed, and logs
// out of every token. Those of
// upstream agents stay.
func (k *Keyring) RemoveAll(ctx context.Context, c *Caller) error {
	rec := k.begin(c, RequestRemoveAll)
	err := k.removeAll(ctx, c)
	k.end(rec, err)
	return err
}

func (k *Keyring) removeAll(ctx context.Context, c *Caller) error {
	if k.lock.locked() {
		return errLocked
	}
	if err := c.mayChange(); err != nil {
		return err
	}
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.generation()
	k.mu.Lock()
	shown := k.nowLocked(generation, certificates).identities
	software, added := k.keptLocked()
	defer func() {
		k.now() // the view before holds on to it all
		relieve(software.size + added.size)
	}()
	for _, a := range slices.Clone(k.added) {
		k.dropLocked(a)
	}
	k.software = nil
	for _, id := range shown {
		if len(id.homes) > 0 {
			k.hideLocked(id)
		}
	}
	k.change.Add(1)
	for _, key := range slices.Concat(k.opts.Tokens.Keys(), k.opts.Tokens.Away()) {
		k.hideKeyLocked(key)
	}
	k.mu.Unlock()
	k.approvals.forgetAll()
	if err := k.opts.Tokens.LogoutAll(ctx); err != nil {
		return fmt.Errorf("the keys are removed, but: %w", err)
	}
	return nil
}

// Configure changes the rules. Automatic identities that were removed are back.
func (k *Keyring) Configure(r Rules) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.opts.Rules = r
	clear(k.hidden)
	k.change.Add(1)
}
