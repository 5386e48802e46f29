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

// A Guard lets requests use keys. It does the same for requests from each door. It refuses
// while the agent is locked, and applies the rules. It asks a person for approval and for
// an absent token. It picks the token, and logs the outcome. The Keyring uses a Guard, too.
// Any goroutine may call its methods.
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

// insertable has the methods of Tokens that the Guard needs while it waits for a token.
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

// Do serves a request to use a key. It calls op with the key of a present token. If op
// fails because the token is absent, Do calls op with the key of the next token. The error
// is the error of op, or says why the agent refuses the use: the agent is locked, a rule
// or a person refuses the use, or the token is absent. Do waits for persons and tokens as
// long as ctx lasts, and logs the outcome.
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
	each  string // why the agent asks a person for each use; empty: only if the rules say so
	await bool   // if no token is present, the agent asks a person to insert one
	// elsewhere uses a copy of the key that is on no token, if no token is present. nil:
	// the key has no copy.
	elsewhere func(context.Context) error
	// check runs after the use. It returns an error if the client must not get the
	// result. nil: the client always gets it.
	check func() error
}

// An operator does something with the key of a token.
type operator interface {
	operate(ctx context.Context, key request.Key) error
}

// operation is a function that is an operator.
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
	var paid *atomic.Bool // a person gave a PIN for this very request; nil: no PIN is needed
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

// approve asks a person if the constraints, the socket or the configuration say so. The
// error says why the use is refused. each says why the agent asks for each use.
func (g *Guard) approve(ctx context.Context, u *request.Use, t *request.Target, each string) error {
	return g.approver.Approve(ctx, u, t, g.rules.Load().policy, each)
}

// atHome calls op with the key of a token, present tokens first. It tries the next token
// only if the token is absent. So if a person declines for a token, the agent does not ask
// again for the next.
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

// errNowhere is the error of a key that is on no token.
var errNowhere error = nowhereError{}

type nowhereError struct{}

func (nowhereError) Error() string { return "its token is not there" }
func (nowhereError) Absent() bool  { return true }

// isAbsent tells whether a key failed because its token is absent.
func isAbsent(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Absent() bool
	}](err)
	return ok && e.Absent()
}

// isBusy tells whether a key failed because another program uses its token exclusively.
// Then the agent does not ask a person to insert it.
func isBusy(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Busy() bool
	}](err)
	return ok && e.Busy()
}

// ForgetApprovals makes the agent ask a person again about some keys. These are the keys of
// tokens for which of returns true. If of returns true for nil, keys on no token are among
// them.
func (g *Guard) ForgetApprovals(of func(request.Key) bool) {
	g.approver.Forget(func(homes []request.Key) bool {
		if len(homes) == 0 {
			return of(nil)
		}
		return slices.ContainsFunc(homes, of)
	})
}
