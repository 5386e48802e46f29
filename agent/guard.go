package agent

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/joined"
	"p11-agent/agent/request"
	"p11-agent/pinentry/waiting"
)

// A Guard lets requests use keys. It does the same for requests from each door: it refuses
// while the agent is locked, applies the rules, asks a person for approval and for an
// absent token, picks the token, and logs the outcome.
// The Keyring is one user of it. All methods may be called from any goroutine.
type Guard struct {
	lock     *lock
	approver *approval.Approver
	audit    *audit.Trail
	rules    atomic.Pointer[useRules]

	tokens        insertable
	inserter      approval.Inserter // nil: there is no way to ask for a token
	insertTimeout time.Duration
	insertions    waiting.Group[struct{}] // running, by Target.ID
}

// useRules are the rules of the configuration about uses.
type useRules struct {
	allow  func(request.Key) []request.Kind  // nil: none
	policy func(request.Key) approval.Policy // nil: never
}

// insertable is what the Guard needs of Tokens while it waits for a token.
type insertable interface {
	Changed() <-chan struct{}
	Poke()
	Rescan(ctx context.Context) error
}

func newGuard(o *Options) *Guard {
	g := &Guard{
		lock:     newLock(),
		approver: &approval.Approver{Confirm: o.Confirm, Questions: o.Questions, Log: o.Log},
		audit:    audit.New(o.Log, o.Failed),
		tokens:   o.Tokens, inserter: o.Insert, insertTimeout: cmp.Or(o.InsertTimeout, insertPatience),
	}
	g.configure(&o.Rules)
	return g
}

// configure changes the rules.
func (g *Guard) configure(r *Rules) { g.rules.Store(&useRules{allow: r.Allow, policy: r.Approval}) }

// Do serves one request to use a key. It calls op with the key of a token that is present,
// and with each other one if op fails because its token is absent. The error is that of
// op, or says why the use is refused: the agent is locked, a rule or a person refuses it,
// or the token is absent. Do waits for persons and tokens as long as ctx lasts, and logs
// the outcome.
func (g *Guard) Do(ctx context.Context, use *request.Use, t *request.Target, op func(context.Context, request.Key) error) error {
	use.Content = judged(use.Caller, use.Content)
	rec := g.audit.Begin(request.ActionSign, use)
	rec.About(t, nil)
	inside, err := g.lock.enter(ctx, use.Caller, use)
	if err == nil {
		defer inside.leave()
		err = inside.reason(g.use(inside, rec, &access{Target: t, await: true}, operation(op)))
	}
	g.audit.End(rec, err)
	return err
}

// An access is how a request may use a key.
type access struct {
	*request.Target
	each  string // why a person is asked for each use; empty: only if the rules want it
	await bool   // a person is asked to insert a token if none is present
	// elsewhere uses a copy of the key that is on no token, if no token is present. nil:
	// the key has no copy.
	elsewhere func(context.Context) error
	// check says after the use why its result is not to be handed out; nil: it always is.
	check func() error
}

// An operator does something with the key of a token.
type operator interface {
	operate(ctx context.Context, key request.Key) error
}

// operation is a function that does so.
type operation func(context.Context, request.Key) error

func (f operation) operate(ctx context.Context, key request.Key) error { return f(ctx, key) }

// use lets op use the key of a request that the lock has let in.
func (g *Guard) use(ctx context.Context, rec *audit.Record, a *access, op operator) error {
	use := rec.Use
	if err := g.allowed(a.Target, use.Content); err != nil {
		return err
	}
	use.Comment, use.Key = a.Comment, a.PublicKey
	if err := g.approve(ctx, use, a.Target, a.each); err != nil {
		return err
	}
	var paid *atomic.Bool // by a PIN that a person gave for this very request; nil: it need not be
	if use.PINPays {
		paid = new(atomic.Bool)
		ctx = waiting.OnAccepted(ctx, func() { paid.Store(true) })
	}
	err := g.atHome(ctx, rec, a.Target, op)
	if err != nil && isAbsent(err) && !isBusy(err) && a.await && g.inserter != nil {
		if err := g.insert(ctx, a.Target); err != nil {
			return err
		}
		err = g.atHome(ctx, rec, a.Target, op)
	}
	if err != nil && isAbsent(err) && a.elsewhere != nil {
		err = a.elsewhere(ctx)
	}
	if err == nil && a.check != nil {
		err = a.check()
	}
	if err == nil && paid != nil && !paid.Load() {
		// A person gave the PIN for something else, perhaps without a look at this request.
		err = g.approver.ApproveLoss(ctx, use, a.Target)
	}
	return err
}

// approve asks a person where the constraints, the socket or the configuration want it.
// The error says why the use is refused. each says why a person is asked for each use.
func (g *Guard) approve(ctx context.Context, u *request.Use, t *request.Target, each string) error {
	return g.approver.Approve(ctx, u, t, g.rules.Load().policy, each)
}

// atHome operates with the key of a token, first with those that are present. It tries the
// next one only if the token is absent: what a person declines for one token is not asked
// for again for the next.
func (g *Guard) atHome(ctx context.Context, rec *audit.Record, t *request.Target, op operator) error {
	homes := t.Homes
	if len(homes) > 1 {
		var present, absent []request.Key
		for _, home := range homes {
			if home.Present() {
				present = append(present, home)
			} else {
				absent = append(absent, home)
			}
		}
		homes = append(present, absent...)
	}
	var all []error
	for _, home := range homes {
		rec.URI = home.URI()
		err := op.operate(ctx, home)
		if err == nil {
			return nil
		}
		all = append(all, err)
		if ctx.Err() != nil || !isAbsent(err) {
			return joined.Errors(all...)
		}
	}
	if len(all) == 0 {
		return errNowhere
	}
	return joined.Errors(all...)
}

// errNowhere is what is wrong with a token's key that is on no token.
var errNowhere error = nowhereError{}

type nowhereError struct{}

func (nowhereError) Error() string { return "its token is not there" }
func (nowhereError) Absent() bool  { return true }

// isAbsent tells whether a key failed because it is not there.
func isAbsent(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Absent() bool
	}](err)
	return ok && e.Absent()
}

// isBusy tells whether a key failed because another program keeps its token to
// itself: there is nothing to insert.
func isBusy(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Busy() bool
	}](err)
	return ok && e.Busy()
}

// ForgetApprovals makes the agent ask a person again about the keys of tokens for which of
// returns true, and about keys on no token if of returns true for nil.
func (g *Guard) ForgetApprovals(of func(request.Key) bool) {
	g.approver.Forget(func(homes []request.Key) bool {
		if len(homes) == 0 {
			return of(nil)
		}
		return slices.ContainsFunc(homes, of)
	})
}
