package token

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"p11-agent/token/process"
	"p11-agent/token/retention"
)

// used notes that a key has signed, and logs out when the key's Policy says so.
func (t *Token) used(ctx context.Context, k *Key) {
	rule := t.module.store.policyOf(k).Retention
	if rule.Never {
		// The logout goes on when the client of the signature has hung up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), process.LoginTimeout)
		defer cancel()
		t.end(ctx)
		return
	}
	t.retain(rule)
}

// retain sets the end of the login by the rule of a key, after a signature with the key or a login
// for it. With Rule.Never, the login ends after the next signature.
func (t *Token) retain(rule retention.Rule) {
	kept := !t.pins.KeptSince().IsZero()
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.logins.Process()
	if p == nil {
		return
	}
	login := retention.Login[*process.Process]{Session: p, Insertions: t.visits.Count()}
	t.deadline.Extend(login, rule, kept, func() { _ = t.module.store.start(t.expire) })
}

// expire logs out, unless a signature has put off the end just now.
func (t *Token) expire() {
	kept := !t.pins.KeptSince().IsZero()
	t.mu.Lock()
	over := t.deadline.Over(t.logins.Process(), kept)
	t.mu.Unlock()
	if !over {
		return
	}
	ctx, cancel := context.WithTimeout(t.module.store.ctx, process.LoginTimeout)
	defer cancel()
	if t.end(ctx) {
		t.module.log.Info("logged out: the login has lasted as long as configured", "token", t.ID.Label)
	}
}

// end logs out and forgets the PIN. It reports whether it succeeded. When it fails, the module has
// lost the login, or loses it soon with its process.
func (t *Token) end(ctx context.Context) bool {
	err := t.forget(ctx)
	if err != nil && t.module.store.ctx.Err() == nil {
		t.module.log.Warn("cannot log out", "token", t.ID.Label, "reason", err)
	}
	return err == nil
}

// Forget logs out of every token with a key whose Policy ends logins at the Event, whether the key
// was used or not. So the next signature asks for the PIN. Forget returns when all tokens are logged
// out. When a module fails, or does not answer before ctx ends, Forget stops its process, which
// ends its logins. One module does not delay another.
func (s *Store) Forget(ctx context.Context, e retention.Event) {
	var wg sync.WaitGroup
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			if t.endsAt(e) {
				wg.Go(func() { t.forgetAt(ctx, e) })
			}
		}
	}
	wg.Wait()
}

// Forgets reports whether Forget logs out of the token of a key.
func (s *Store) Forgets(k *Key, e retention.Event) bool { return k.token.endsAt(e) }

// endsAt reports whether an Event ends logins to the token, by the Policy of one of its keys.
func (t *Token) endsAt(e retention.Event) bool {
	return slices.ContainsFunc(t.keyList(), func(k *Key) bool { return t.module.store.policyOf(k).Retention.EndsAt(e) })
}

func (t *Token) forgetAt(ctx context.Context, e retention.Event) {
	t.pins.ForgetKept()
	t.mu.Lock()
	p, in := t.logins.Possible(), t.logins.Process() != nil
	t.mu.Unlock()
	if p == nil {
		return
	}
	log := t.module.log.With("token", t.ID.Label, "reason", e.String())
	if err := t.forget(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.New("the module did not answer in time")
		}
		log.Warn("cannot log out; stopping the module", "error", err)
		p.Kill(fmt.Errorf("the module did not log out: %w", err))
		return
	}
	if in {
		log.Info("logged out")
	}
}
