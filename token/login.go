package token

import (
	"context"
	"errors"
	"slices"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/card"
	"p11-agent/token/pin"
	"p11-agent/token/process"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

// Package pin gets a PIN and decides whether the token may try it. This file makes the token try
// it: by C_Login, or by an operation with a key that wants its PIN each time.

// supplied is a PIN that came with a request, if one did.
type supplied struct {
	pin.Supplied
	selector *selection.Selector // what the PIN was supplied for; nil: nothing is known of that
	taken    *bool               // set when the token takes the PIN; may be nil

	clientTells bool // the client tells the person to type the PIN on the reader
}

// supply makes a supplied of a PIN, which stays the caller's.
func supply(p *secret.Secret) supplied { return supplied{Supplied: pin.Supplied{PIN: p}} }

// login logs in to the token for a key, or waits for a login that is under way. It returns the
// PIN that the person typed when the key wants the PIN for the signature as well. The caller
// wipes that PIN.
func (t *Token) login(ctx context.Context, k *Key, with supplied) (*secret.Secret, error) {
	run := func(ctx context.Context, list *waiting.List) (*secret.Secret, error) {
		return t.runLogin(ctx, list, k, with)
	}
	if with.PIN.Len() > 0 {
		return t.pins.Alone(ctx, run)
	}
	return t.pins.Share(ctx, t.module.store.start, run)
}

// runLogin logs in when it is the token's turn.
func (t *Token) runLogin(ctx context.Context, list *waiting.List, k *Key, with supplied) (typed *secret.Secret, err error) {
	defer t.module.supervisor.Use()()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.module.store.ctx, cancel)()
	err = t.inTurn(ctx, list, with.PIN.Len() > 0, func(ctx context.Context) error {
		typed, err = t.logInNow(ctx, list, k, with)
		return err
	})
	err = t.loginFailed(err, false)
	if err != nil && t.module.store.ctx.Err() != nil {
		err = ErrClosed
	}
	return typed, err
}

// inTurn calls do when it is the token's turn to get a PIN.
func (t *Token) inTurn(ctx context.Context, list *waiting.List, supplied bool, do func(context.Context) error) error {
	err := t.pins.InTurn(ctx, list, supplied, do)
	if errors.Is(err, pin.ErrForgotten) {
		return ErrAbsent
	}
	return err
}

// start runs f in a goroutine that Close waits for. It fails when the Store is closed.
func (s *Store) start(f func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.wg.Go(f)
	return nil
}

// logInNow logs in. The caller has the turn.
func (t *Token) logInNow(ctx context.Context, list *waiting.List, k *Key, with supplied) (typed *secret.Secret, err error) {
	p, err := t.module.supervisor.Process(ctx)
	if err != nil {
		return nil, err
	}
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, err
	}
	if info.LoggedIn {
		t.setLoggedIn(p, true)
		if with.PIN.Len() == 0 {
			return nil, nil
		}
	}
	// Some tokens show only after the login that a key wants its PIN each time. A source gives
	// the PIN again. The signature needs a PIN that a person typed.
	now := t.current(k)
	always := now.pair.Always
	wanted := (always || !now.pair.Visible) && t.module.store.source(k) == nil
	at, err := t.settle(ctx, p, info)
	if err != nil {
		return nil, err
	}
	out := info.LoggedIn // the module looks at no PIN while a login lasts
	try := func(ctx context.Context, trial pin.Trial) error {
		if out {
			if err := t.logOutFirst(ctx); err != nil {
				return err
			}
			out = false
		}
		_, err := t.tryLogin(ctx, p, trial, at)
		if err == nil && wanted && !trial.Pad {
			typed, err = trial.PIN.Clone()
		}
		return err
	}
	if err := t.pins.Login(ctx, t.pinLogin(list, k, info, with, always, try)); err != nil {
		typed.Wipe()
		return nil, err
	}
	if with.taken != nil {
		*with.taken = true
	}
	t.reveal(ctx, p)
	if !t.current(k).pair.Always {
		typed.Wipe()
		typed = nil
	}
	return typed, nil
}

// pinLogin describes a login, or a signature that needs a PIN, to package pin. try has the
// token try a PIN.
func (t *Token) pinLogin(list *waiting.List, k *Key, info wire.TokenInfo, with supplied, eachUse bool, try func(context.Context, pin.Trial) error) *pin.Login {
	s := t.module.store
	policy := s.policyOf(k)
	l := &pin.Login{
		Token: t.ID, Info: info, Supplied: with.Supplied, Refusals: s.refusals, Asker: s.opts.PINs, Waiting: list, EachUse: eachUse,
		Pad: info.Flags&wire.CKFProtectedAuthenticationPath != 0,

		ClientTells: with.clientTells,

		UseKept: policy.Remember && (!eachUse || policy.Reuse),
		Keep:    policy.Remember && !policy.Retention.Never,
		Target:  &pinTarget{token: t, key: k, selector: with.selector, try: try},
		Log:     t.module.log,
	}
	if policy.Pad != nil {
		l.Pad = *policy.Pad
	}
	if src := s.source(k); src != nil {
		l.Source = src
	}
	return l
}

// pinTarget makes a token try PINs for a key.
type pinTarget struct {
	token    *Token
	key      *Key
	selector *selection.Selector
	try      func(context.Context, pin.Trial) error
}

var _ pin.Target = (*pinTarget)(nil)

func (x *pinTarget) Try(ctx context.Context, trial pin.Trial) error {
	return x.token.classify(x.try(ctx, trial))
}

func (x *pinTarget) Proved(byPerson bool)        { x.token.proved(byPerson) }
func (x *pinTarget) CheckSupplied() error        { return x.token.checkHome(x.selector) }
func (x *pinTarget) LostToOthers(err error) bool { return lostByOthers(err) }

func (x *pinTarget) Request() pin.Request {
	t, k := x.token, x.key
	r := pin.Request{Key: k.text, Label: k.pair.Label, ID: k.ID(), Reader: t.reader()}
	if r.Home, r.Others = t.claims(); r.Home != "" || len(r.Others) > 0 {
		r.Module = t.module.identity
	}
	return r
}

// logOutFirst ends a login, so that the token tries the PIN that a person gave.
func (t *Token) logOutFirst(ctx context.Context) error {
	t.mu.Lock()
	t.deadline.Clear()
	t.mu.Unlock()
	return t.logout(ctx)
}

// tryLogin makes the token try a PIN on a card. It returns where the card is now.
func (t *Token) tryLogin(ctx context.Context, p *process.Process, trial pin.Trial, at card.Target) (card.Target, error) {
	for n := 0; ; n++ {
		err := t.tryStay(ctx, p, trial, at.Stay)
		if n == card.MaxTargets || !wire.IsReason(err, wire.ReasonOtherToken) {
			return at, err
		}
		ok := false
		if at, ok = t.again(ctx, p, at, trial.Kept); !ok {
			return at, err
		}
	}
}

// tryStay makes the token try a PIN while one stay of a card lasts (wire.TokenInfo.Stay).
func (t *Token) tryStay(ctx context.Context, p *process.Process, trial pin.Trial, stay uint64) error {
	// From here on the process may be logged in, whether or not the answer arrives.
	t.mu.Lock()
	t.logins.Try(p)
	t.mu.Unlock()
	var reply wire.TokenReply
	moves := t.module.readers.Moves()
	request := wire.Login{Token: t.ID, Stay: stay, LastTry: trial.LastTry, Pad: trial.Pad, PIN: trial.PIN}
	err := p.Call(ctx, process.LoginTimeout, wire.TypeLogin, &request, &reply)
	t.module.loginBroke(ctx, p, moves, err)
	info, told := reply.Info, err == nil
	if e, ok := errors.AsType[*wire.Error](err); ok {
		info, told = e.Info, e.HasInfo
	}
	if told { // TokenStatus.Tries comes from here
		t.mu.Lock()
		t.slot.Info = info
		if !info.LoggedIn {
			t.logins.Refused()
		}
		t.mu.Unlock()
	}
	if err == nil {
		t.setLoggedIn(p, true)
	}
	return err
}

// reveal reads the objects that show only after a login, so that the signature that the login
// was for knows what its key wants. It does nothing when all objects have shown before.
func (t *Token) reveal(ctx context.Context, p *process.Process) {
	t.mu.Lock()
	hidden := t.objects.Hides()
	t.mu.Unlock()
	if hidden {
		if err := t.lookAgain(ctx, p); err != nil && ctx.Err() == nil {
			t.module.log.Debug("cannot read the token after the login", "token", t.ID.Label, "reason", err)
		}
		t.module.store.publish()
	}
	p.Notify() // the next look finds keys that were hidden altogether
}

// fresh reads the state of the token. Other programs change the flags, so the agent reads them
// before every login.
func (t *Token) fresh(ctx context.Context, p *process.Process) (wire.TokenInfo, error) {
	var reply wire.TokenReply
	err := p.Call(ctx, process.ListTimeout, wire.TypeToken, &wire.Token{Token: t.ID}, &reply)
	if err != nil {
		return reply.Info, err
	}
	t.mu.Lock()
	t.slot.Info = reply.Info
	t.mu.Unlock()
	return reply.Info, nil
}

// classify makes an error of package pin of an answer of the module, or of its process, about a PIN.
// Every other failure becomes a *pin.LoginError, but for a failure of the operation itself.
func (t *Token) classify(err error) error {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return t.loginFailed(err, errors.Is(err, process.ErrGone) && !errors.Is(err, process.ErrRenewed))
	}
	if refusal := pin.Refusal(t.ID.Label, err); refusal != nil {
		return refusal
	}
	if slices.Contains(operations, e.Function) {
		return err
	}
	return t.loginFailed(err, e.Function == "C_Login")
}

// loginFailed makes a failure one of a login, unless the failure says so itself. attempted
// means that the token may have got a PIN.
func (t *Token) loginFailed(err error, attempted bool) error {
	if err == nil || isLoginError(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := errors.AsType[*ModuleError](err); ok {
		return err
	}
	if _, ok := errors.AsType[*wire.Error](err); ok || errors.Is(err, process.ErrGone) {
		err = t.module.supervisor.Wrap(err)
	}
	return &pin.LoginError{Token: t.ID.Label, Attempted: attempted, Err: err}
}

// operations are the functions of PKCS#11 that do an operation with a key.
var operations = []string{"C_SignInit", "C_Sign", "C_DecryptInit", "C_Decrypt", "C_DeriveKey"}

// isLoginError reports whether an error is about a login and not about an operation.
func isLoginError(err error) bool {
	return pin.IsFailure(err) || errors.Is(err, ErrClosed)
}

// operateWithPIN does an operation with a key that wants its PIN each time. The requests for such
// keys wait for each other: each has its own prompt.
func (t *Token) operateWithPIN(ctx context.Context, p *process.Process, k *Key, req *wire.Operate, with prelude) (answer []byte, err error) {
	// Close does not wait for a request, but every prompt ends with the Store.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.module.store.ctx, cancel)()
	list := waiting.One(ctx)
	err = t.inTurn(ctx, list, false, func(ctx context.Context) error {
		answer, err = t.operateInTurn(ctx, list, p, k, req, with)
		return err
	})
	if err != nil && t.module.store.ctx.Err() != nil {
		err = ErrClosed
	}
	return answer, err
}

// operateInTurn is operateWithPIN. The caller has the turn.
func (t *Token) operateInTurn(ctx context.Context, list *waiting.List, p *process.Process, k *Key, req *wire.Operate, with prelude) ([]byte, error) {
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, err
	}
	if !with.fresh && !info.LoggedIn && info.Flags&wire.CKFLoginRequired != 0 {
		// The token would refuse after the person has typed the PIN.
		return nil, &wire.Error{Function: "C_GetSessionInfo", RV: wire.CKRUserNotLoggedIn}
	}
	at, err := t.settle(ctx, p, info)
	if err != nil {
		return nil, err
	}
	var reply wire.OperateReply
	operate := func(ctx context.Context, kept bool) error {
		for n := 0; ; n++ {
			req.Stay = at.Stay
			err := p.Call(ctx, process.SignTimeout, wire.TypeOperate, req, &reply)
			if n == card.MaxTargets || !wire.IsReason(err, wire.ReasonOtherToken) {
				return err
			}
			ok := false
			if at, ok = t.again(ctx, p, at, kept); !ok {
				return err
			}
		}
	}
	try := func(ctx context.Context, trial pin.Trial) error {
		req.ContextLogin, req.LastTry, req.Pad, req.PIN = true, trial.LastTry, trial.Pad, trial.PIN
		if !trial.Pad { // else the person types first
			defer k.working(ctx)()
		}
		err := operate(ctx, trial.Kept)
		if trial.Pad || !wire.IsReason(err, wire.ReasonNoKey) || !t.hidesKey(p, err) {
			return err
		}
		// The key shows only after a login. Another program may have ended that login, or the
		// wrong PIN before this one: a PIV card drops its login at a wrong PIN.
		if at, err = t.tryLogin(ctx, p, trial, at); err != nil {
			return err
		}
		t.reveal(ctx, p)
		return operate(ctx, trial.Kept)
	}
	typed := supplied{Supplied: pin.Supplied{PIN: with.typed, Typed: true}}
	err = t.pins.Login(ctx, t.pinLogin(list, k, info, typed, true, try))
	return reply.Result, err
}

// logIn logs in to the token of the key. It uses the supplied PIN, or gets one as a signature
// would. When a login lasts already, it logs out first and makes the token try a supplied PIN: a
// PIN that the token did not try may be wrong.
func (k *Key) logIn(ctx context.Context, with supplied) error {
	t := k.token
	defer t.module.supervisor.Use()()
	p, err := t.module.supervisor.Process(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	wanted := t.slot.Info.Flags&wire.CKFLoginRequired != 0
	t.mu.Unlock()
	if !wanted || t.loggedIn(p) && with.PIN.Len() == 0 {
		return nil
	}
	typed, err := t.login(ctx, k, with)
	typed.Wipe()
	if err == nil {
		t.retain(t.module.store.policyOf(k).Retention)
	}
	return err
}

// A loginCheck finds out, for one request at a time, whether a login has been lost.
type loginCheck struct {
	turn chan struct{} // one element: the request that holds it reads the token
	lost uint64        // one more than the number of the last login that was lost; turn guards it
}

func newLoginCheck() loginCheck { return loginCheck{turn: make(chan struct{}, 1)} }
