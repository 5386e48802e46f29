package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
)

var (
	errForwarded  = errors.New("it came over a forwarded connection")
	errReadOnly   = errors.New("the socket it came in at is read-only, as those with keys or confirm are unless read-only = false is in their [[socket]] table")
	errNoSoftware = errors.New("keys in memory are switched off (software-keys = false)")

	errCertifiesNone = errors.New("only certificates are to be added, and none of them is for a key of the token and still valid")
)

// AddToken adds the keys that the request's provider selects and the connection sees. If a
// key is there already, the constraints of the request tighten its limits, and lift none.
func (k *Keyring) AddToken(ctx context.Context, c *request.Caller, r request.Token) error {
	rec := k.begin(c, request.ActionAdd)
	inside, err := k.lock.enter(ctx, c, nil)
	if err == nil {
		defer inside.leave()
		err = inside.reason(k.addToken(inside, rec, r))
	}
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) addToken(ctx context.Context, rec *audit.Record, r request.Token) error {
	c := rec.Use.Caller
	if err := mayChange(c); err != nil {
		return err
	}
	if c.Forwarded && !k.opts.RemoteTokens {
		return errForwarded
	}
	if r.Constraints.Confirm && k.opts.Confirm == nil {
		return approval.ErrNoPrompt
	}
	s, err := k.opts.Tokens.Parse(r.Provider, confined(c))
	if err != nil {
		return err
	}
	rec.URI = s.String()
	reached := func(key request.Key) bool {
		v := k.now() // Select may find new tokens
		k.mu.Lock()
		defer k.mu.Unlock()
		plain := k.plainLocked(key)
		return plain != nil && k.reachesLocked(v, c, known{key, plain.wire})
	}
	keys, taken, err := k.opts.Tokens.Select(ctx, s, reached, r.PIN)
	if err == nil {
		err = k.keepAddition(rec, s, r.Constraints)
	}
	if err != nil {
		k.opts.Tokens.Drop(s)
		return err
	}
	if taken {
		// The PIN of this request pays for the limits that the keys have lost. A PIN for
		// another request does not: a client could wait for such a PIN.
		k.paidFor(keys)
	}
	return nil
}

// noteKept is the note when a request would loosen the limits of a key.
const noteKept = "constraints kept: a key keeps what it was added with until it is removed (ssh-add -d or -e)"

// keepAddition adds the keys that a selection selects and the connection reaches. Keys
// that are there keep their limits, and get the new limits besides. Keys that were removed
// get the new limits only, and owe for the old ones (Keyring.owed).
func (k *Keyring) keepAddition(rec *audit.Record, s request.Selection, constraints request.Constraints) error {
	c := rec.Use.Caller
	a := &addition{
		selection: s, limits: limitsOf(&constraints, k.opts.Lifetime), certificates: constraints.Certificates,
		forwarded: c.Forwarded,
	}
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.Generation()
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.nowLocked(generation, certificates)
	shown := make(map[string]bool)
	for _, id := range v.identities {
		shown[id.plainWire()] = true
	}
	var meant []known
	for _, key := range k.knownLocked() {
		if k.selectsLocked(s, key.Key) && k.reachesLocked(v, c, key) {
			meant = append(meant, key)
		}
	}
	if confined(c) {
		// The addition does not cover keys that come later.
		a.only = make(map[string]bool)
		for _, key := range meant {
			a.only[key.wire] = true
		}
	}
	if a.limits.certificates && !slices.ContainsFunc(meant, func(key known) bool { return a.certifies(key.wire) }) {
		return errCertifiesNone
	}
	if err := k.mayAddLocked(a); err != nil {
		return err
	}
	var removed []known
	now := a.limits
	for _, key := range meant {
		switch {
		case !shown[key.wire] && k.removedLocked(key):
			removed = append(removed, key)
			had := v.limits[key.wire]
			if owed := k.owed[key.wire]; owed != nil {
				had = had.and(*owed)
			}
			if now.looser(&had) {
				rec.Note = "constraints loosened: it was removed, and is added without those it had; its next use costs a PIN or an approval"
			}
		case v.limits[key.wire].and(now).indeterminate:
			return errTooMany
		default:
			if had := v.limits[key.wire]; now.looser(&had) {
				rec.Note = noteKept
			}
		}
	}
	for _, old := range slices.Clone(k.added) {
		for _, key := range removed {
			if k.selectsLocked(old.selection, key.Key) && old.covers(key.wire) {
				k.liftLocked(old, key)
			}
		}
	}
	k.mergeLocked(a)
	k.added = append(k.added, a)
	for _, key := range meant {
		k.showLocked(key)
	}
	k.change.Add(1)
	return nil
}

// mergeLocked puts an addition in the place of those with the same selection, if it covers
// the same keys. The new addition takes over their limits.
func (k *Keyring) mergeLocked(a *addition) {
	for _, old := range slices.Clone(k.added) {
		switch {
		case old.selection.String() != a.selection.String():
		case a.replaces(old):
			a.limits = a.limits.and(old.limits)
			if len(a.certificates) == 0 {
				a.certificates = old.certificates
			}
			k.replaceLocked(old)
		case a.only == nil:
			// From now on, the PIN of the new addition counts.
			k.opts.Tokens.Drop(old.selection)
		}
	}
}

// Add keeps a private key in memory. If the key is there already, it gets the new comment
// and constraints.
func (k *Keyring) Add(ctx context.Context, c *request.Caller, r request.AddKey) error {
	rec := k.begin(c, request.ActionAdd)
	rec.Key, rec.Comment = k.fingerprint(sshkey.Plain(r.Public)), r.Comment
	err := k.add(ctx, rec, r, string(r.Public.Marshal()))
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) add(ctx context.Context, rec *audit.Record, r request.AddKey, wire string) error {
	c := rec.Use.Caller
	if k.lock.locked() {
		return request.ErrLocked
	}
	if err := mayChange(c); err != nil {
		return err
	}
	switch {
	case restricted(c.Socket):
		return errSomeKeys // the socket shows no keys in memory
	case !k.opts.SoftwareKeys:
		return errNoSoftware
	case r.Constraints.Confirm && k.opts.Confirm == nil:
		return approval.ErrNoPrompt
	case len(r.Constraints.Certificates) > 0 || r.Constraints.CertificatesOnly:
		return errors.New("certificates can only be added to the keys of a token")
	}
	s, err := k.newSoftwareKey(ctx, c, r, wire)
	if err != nil {
		return err
	}
	before := k.nowOnTokens()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expireLocked()
	if id := k.identityLocked(before, wire); id != nil {
		if err := id.seenBy(c); err != nil {
			return err
		}
		switch looser := s.limits.looser(&id.limits); {
		case looser && len(id.Homes) > 0:
			rec.Note = noteKept
		case looser:
			rec.Note = "constraints loosened: it was added again without those it had"
		}
		if len(id.Homes) > 0 {
			// The limits of the key in memory and of the key on the token limit both.
			s.limits = s.limits.and(id.limits)
		}
	}
	if err := mayKeep(s.kept, k.software.with(s), k.addedLocked(), maxSoftwareKeys, maxForwardedSoftwareKeys); err != nil {
		return err
	}
	k.software.put(s)
	k.softwareChangedLocked(wire)
	return nil
}

// RemoveToken removes the additions for the same provider, and the automatic identities
// that the provider selects. It logs out of a token that loses its last identity.
func (k *Keyring) RemoveToken(ctx context.Context, c *request.Caller, r request.Token) error {
	rec := k.begin(c, request.ActionRemove)
	err := k.removeToken(ctx, rec, r)
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) removeToken(ctx context.Context, rec *audit.Record, r request.Token) error {
	c := rec.Use.Caller
	if k.lock.locked() {
		return request.ErrLocked
	}
	if err := mayChange(c); err != nil {
		return err
	}
	s, err := k.opts.Tokens.Parse(r.Provider, confined(c))
	if err != nil {
		return err
	}
	rec.URI = s.String()
	defer k.opts.Tokens.Drop(s)
	unused, err := k.removeSelected(c, s)
	if err != nil {
		return err
	}
	return k.logOutOf(ctx, unused)
}

// removeSelected removes the keys that a selection selects and the connection reaches.
// unused takes the keys of a token. It returns true if removeSelected removed one of them,
// and no identity uses the token any more.
func (k *Keyring) removeSelected(c *request.Caller, s request.Selection) (unused func([]request.Key) bool, err error) {
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.Generation()
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.nowLocked(generation, certificates)
	removed, used := make(map[request.Key]bool), make(map[request.Key]bool)
	for _, key := range k.knownLocked() {
		switch reached := k.reachesLocked(v, c, key); {
		case reached && k.selectsLocked(s, key.Key):
			removed[key.Key] = true
		case !reached && confined(c) && key.Unfit() == "":
			used[key.Key] = true // other connections may need the login, as in removeSeen
		}
	}
	n := k.removeAdditionsLocked(v, c, func(a *addition) bool { return a.selection.String() == s.String() })
	for _, id := range v.identities {
		if slices.ContainsFunc(id.Homes, s.Match) && id.seenBy(c) == nil {
			k.hideLocked(id.ID, id.insertions())
			k.approver.ForgetKey(id.ID)
			n++
		}
	}
	if n == 0 {
		return nil, errUnknownKey
	}
	for _, id := range k.nowLocked(generation, certificates).identities {
		for _, key := range id.Homes {
			used[key] = true
		}
	}
	return func(keys []request.Key) bool {
		return slices.ContainsFunc(keys, func(key request.Key) bool { return removed[key] }) &&
			!slices.ContainsFunc(keys, func(key request.Key) bool { return used[key] })
	}, nil
}

// logOutOf logs out of tokens after a removal. chosen takes the keys of a token.
func (k *Keyring) logOutOf(ctx context.Context, chosen func([]request.Key) bool) error {
	if err := k.opts.Tokens.LogoutOf(ctx, chosen); err != nil {
		return fmt.Errorf("the keys are removed, but: %w", err)
	}
	return nil
}

// removeAdditionsLocked ends the additions for which meant returns true. If the connection
// is confined, the additions only lose the keys that it reaches. n counts the additions
// that have changed.
func (k *Keyring) removeAdditionsLocked(v *view, c *request.Caller, meant func(*addition) bool) (n int) {
	for _, a := range slices.Clone(k.added) {
		if !meant(a) {
			continue
		}
		if !confined(c) {
			k.dropLocked(a)
			n++
			continue
		}
		reached := slices.DeleteFunc(k.coveredLocked(a), func(key known) bool { return !k.reachesLocked(v, c, key) })
		for _, key := range reached {
			k.liftLocked(a, key)
		}
		n += min(1, len(reached))
	}
	return n
}

// Remove removes an identity. A key in memory is gone for good. An identity of a token
// comes back when the token is inserted again, or when a client adds the key again. For an
// identity of an upstream agent, Remove asks the upstream agent to remove it.
func (k *Keyring) Remove(ctx context.Context, c *request.Caller, key []byte) error {
	rec := k.begin(c, request.ActionRemove)
	rec.Key = k.describe(key)
	err := k.remove(ctx, rec, key)
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) remove(ctx context.Context, rec *audit.Record, key []byte) error {
	c := rec.Use.Caller
	if k.lock.locked() {
		return request.ErrLocked
	}
	if err := mayChange(c); err != nil {
		return err
	}
	id, unseen := k.find(c, key)
	if id == nil {
		switch u := k.upstreamOf(ctx, c, key); {
		case unseen != nil:
			return unseen
		case u != nil:
			rec.Upstream = u.Name()
			return u.Remove(ctx, c, key)
		}
		return errUnknownKey
	}
	rec.About(&id.Target, &id.prefix)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.removeLocked(id)
	return nil
}

// removeLocked removes an identity of this agent, as Remove says.
func (k *Keyring) removeLocked(id *identity) {
	if s := k.software.remove(id.ID); s != nil {
		if len(id.Homes) > 0 {
			k.oweLocked(id.plainWire(), s.limits)
		}
		k.softwareChangedLocked(id.ID)
	}
	if len(id.Homes) > 0 {
		k.hideLocked(id.ID, id.insertions())
	}
	k.approver.ForgetKey(id.ID)
}

// RemoveAll removes every identity that the connection sees, and forgets the approvals of
// persons for them. It logs out of their tokens if the connection sees all identities of
// the token. If the connection is not confined, it logs out of every token. Identities of
// upstream agents stay.
func (k *Keyring) RemoveAll(ctx context.Context, c *request.Caller) error {
	rec := k.begin(c, request.ActionRemoveAll)
	err := k.removeAll(ctx, c)
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) removeAll(ctx context.Context, c *request.Caller) error {
	if k.lock.locked() {
		return request.ErrLocked
	}
	if err := mayChange(c); err != nil {
		return err
	}
	return k.clear(ctx, c)
}

// Clear removes every identity, as RemoveAll does for a client that sees all of them. It
// applies no rule, and also works while the agent is locked. The user of the agent sends a
// signal for it, and no client can.
func (k *Keyring) Clear(ctx context.Context) error { return k.clear(ctx, new(request.Caller)) }

// clear removes all identities that the connection sees, and logs out.
func (k *Keyring) clear(ctx context.Context, c *request.Caller) error {
	defer k.relieve(k.keptBytes())
	logout := k.opts.Tokens.LogoutAll
	if may := k.removeSeen(c); confined(c) {
		logout = func(ctx context.Context) error { return k.opts.Tokens.LogoutOf(ctx, may) }
	} else {
		k.approver.ForgetAll()
	}
	if err := logout(ctx); err != nil {
		return fmt.Errorf("the keys are removed, but: %w", err)
	}
	return nil
}

// removeSeen removes every identity that the connection sees. may takes the keys of a
// token, and tells whether the connection may log out of the token. It may if it sees a key
// of the token, and sees all keys of the token that the agent uses.
func (k *Keyring) removeSeen(c *request.Caller) (may func([]request.Key) bool) {
	generation, certificates := k.opts.Tokens.Generation(), k.opts.Certificates.Generation()
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.nowLocked(generation, certificates)
	seen, unseen := make(map[request.Key]bool), make(map[request.Key]bool)
	for _, key := range k.knownLocked() {
		switch {
		case k.reachesLocked(v, c, key):
			k.hideLocked(key.wire, key.Insertions())
			seen[key.Key] = true
		case key.Unfit() == "":
			unseen[key.Key] = true
		}
	}
	for _, id := range v.identities {
		if id.seenBy(c) == nil {
			k.removeLocked(id)
			continue
		}
		for _, key := range id.Homes {
			unseen[key] = true
		}
	}
	k.removeAdditionsLocked(v, c, func(*addition) bool { return true })
	return func(keys []request.Key) bool {
		return slices.ContainsFunc(keys, func(key request.Key) bool { return seen[key] }) &&
			!slices.ContainsFunc(keys, func(key request.Key) bool { return unseen[key] })
	}
}

// Configure changes the rules. Automatic identities that were removed come back, and the
// pauses of questions end.
func (k *Keyring) Configure(r Rules) {
	k.opts.Questions.Reset()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expireLocked() // additions end under the rules of their time
	k.opts.Rules = r
	k.configure(&r)
	clear(k.hidden)
	k.change.Add(1)
}
