package token

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"p11-agent/token/operation"
	"p11-agent/token/pin"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/wire"
)

// A task is work that a token does with a key.
type task struct {
	function operation.Function
	// attempt does the work once, after a login if mustLogin is set or the key needs a login. It returns the number of
	// the login that it worked with.
	attempt func(p *process.Process, mustLogin bool) (login uint64, err error)
	// adapt reports whether the task can try something else after an error, such as another mechanism.
	adapt func(err error) bool
}

// heal does a task, and repairs what may have broken since the last use of the key: the module process, the
// session, the login. It attempts the task again after each repair. The cures limit how often that happens.
func (k *Key) heal(ctx context.Context, do task) error {
	t := k.token
	defer t.module.supervisor.Use()()
	var h *healing // made for the first failure: most operations need none
	for {
		moves := t.module.readers.Moves()
		p, err := k.running(ctx)
		if err != nil {
			return err
		}
		login, err := do.attempt(p, h != nil && h.mustLogin)
		if err == nil {
			p.NoteUse()
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if do.adapt(err) {
			continue
		}
		if h == nil {
			h = newHealing(k, do.function)
		}
		if err := h.cure(ctx, newFailure(err, p, login, moves)); err != nil {
			return err
		}
	}
}

// running returns the module process. It waits for a card that has just left to come back.
func (k *Key) running(ctx context.Context) (*process.Process, error) {
	t := k.token
	patience, done := t.whileBack(ctx)
	p, err := t.module.supervisor.Process(patience)
	done()
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		err = k.explain(ErrAbsent, operation.Sign)
	}
	return p, err
}

// A failure is a failed attempt of an operation.
type failure struct {
	err     error
	process *process.Process
	login   uint64 // the number of the login
	moves   uint64 // Readers.Moves before the attempt
	// broken means that something broke since the last use, and that the attempt has given no PIN to the token.
	broken  bool
	atLogin bool // a login failed
}

func newFailure(err error, p *process.Process, login, moves uint64) failure {
	f := failure{err: err, process: p, login: login, moves: moves}
	e, atLogin := errors.AsType[*pin.LoginError](err)
	f.atLogin = atLogin
	f.broken = broken(err) && (!atLogin || !e.Attempted)
	return f
}

func (f failure) isRV(rvs ...uint64) bool { return wire.IsRV(f.err, rvs...) }

// A cure repairs one cause of a failure.
type cure struct {
	most    int // the most repairs for one operation
	applies func(f failure) bool
	// repair returns false if the failure has another cause, and an error to give up.
	repair func(ctx context.Context, f failure) (repaired bool, err error)
}

// A healing holds the cures of one operation. Its goroutine uses it alone.
type healing struct {
	key       *Key
	function  operation.Function
	cures     []cure
	used      []int // the repairs of each cure
	mustLogin bool  // the next attempt starts with a login
	reader    readers.Patience
}

// unlimited is the number of repairs of a cure that limits its own time.
const unlimited = 1 << 30

// maxLogins is how often one signature logs in again, while another program ends the login each
// time. Such a program resets the card again and again.
const maxLogins = 3

// maxReplaced is how many new processes one operation survives while it is not their cause.
const maxReplaced = 5

func newHealing(k *Key, f operation.Function) *healing {
	h := &healing{key: k, function: f}
	h.cures = []cure{
		{unlimited, h.mayBeInUse, h.awaitReader},
		{maxLogins, h.loggedOut, h.logInAgain},
		{maxReplaced, h.lostByOthers, h.tryAgain},
		{1, h.isBroken, h.lookAgain},
		{1, h.cardFails, h.restart},
	}
	h.used = make([]int, len(h.cures))
	return h
}

// cure repairs the cause of a failure with the first cure that applies. It returns an error for the user if none does.
func (h *healing) cure(ctx context.Context, f failure) error {
	for i, c := range h.cures {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if h.used[i] == c.most || !c.applies(f) {
			continue
		}
		h.used[i]++
		if repaired, err := c.repair(ctx, f); repaired || err != nil {
			return err
		}
	}
	return h.key.explain(f.err, h.function)
}

func (h *healing) mayBeInUse(f failure) bool { return f.broken }

// awaitReader waits while another program uses the reader alone.
func (h *healing) awaitReader(ctx context.Context, _ failure) (repaired bool, err error) {
	again, err := h.reader.Await(ctx, h.key.token.module.readers, h.key.token.slotNow)
	if !again || err != nil {
		return false, err
	}
	return true, h.key.token.rescanWhileBack(ctx)
}

// loggedOut applies if another program has logged the token out, or if the token showed the key without a login and
// does not sign with it. It also applies if the key wants its PIN for each signature and did not say so.
func (h *healing) loggedOut(f failure) bool {
	return f.isRV(wire.CKRUserNotLoggedIn) || h.key.token.hidesKey(f.process, f.err)
}

// logInAgain has the next attempt log in. If the token still says that it is logged in, one more attempt is enough.
func (h *healing) logInAgain(ctx context.Context, f failure) (repaired bool, err error) {
	before := h.mustLogin
	h.mustLogin = true
	if lost := h.key.token.checkLogin(ctx, f.process, h.key, f.login); !lost && before {
		return false, h.key.explain(f.err, h.function)
	}
	return true, nil
}

// lostByOthers applies if the request is not the cause: another request had looked for tokens, the card has left and
// come back, the module hung when a card was pulled, or the module failed for another request.
func (h *healing) lostByOthers(f failure) bool {
	return f.broken && (errors.Is(f.err, process.ErrRenewed) || lostByOthers(f.err) || f.atLogin && wire.IsReason(f.err, wire.ReasonOtherToken))
}

func (h *healing) tryAgain(context.Context, failure) (repaired bool, err error) { return true, nil }

func (h *healing) isBroken(f failure) bool { return f.broken }

// lookAgain reads the tokens of the module again. A module that has lost its reader service needs a new process.
func (h *healing) lookAgain(ctx context.Context, f failure) (repaired bool, err error) {
	t := h.key.token
	if f.isRV(wire.CKRDeviceRemoved, wire.CKRTokenNotPresent, wire.CKRTokenNotRecognized) {
		t.pins.Wipe() // the card was taken out
	}
	if f.isRV(wire.CKRGeneralError) && !t.module.readers.AwaitMove(ctx, f.moves) {
		f.process.Kill(fmt.Errorf("%w: %w", errAnew, f.err))
		return true, nil
	}
	return true, t.rescanWhileBack(ctx)
}

func (h *healing) cardFails(f failure) bool { return f.broken && f.isRV(wire.CKRDeviceError) }

// restart replaces the process. Another program may have selected another application of the card. libykcs11 2.2 then
// fails even after a look.
func (h *healing) restart(ctx context.Context, f failure) (repaired bool, err error) {
	t := h.key.token
	if !t.module.readers.AwaitMove(ctx, f.moves) {
		f.process.Kill(fmt.Errorf("%w: %w", errAnew, f.err))
		return true, nil
	}
	return true, t.rescanWhileBack(ctx)
}

// hidesKey reports whether the token may hide the private key because it is logged out.
func (t *Token) hidesKey(p *process.Process, err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	return ok && e.Reason == wire.ReasonNoKey && (!t.loggedIn(p) || e.HasInfo && !e.Info.LoggedIn)
}

// checkLogin handles a token that says that it is logged out while the agent knows of a login. It
// reads the token again. If the module still says that there is a login, and the key asks for no
// PIN of its own, checkLogin logs out, because the token knows better. It leaves alone a login that
// another request has made since. It reports whether the token and its module say that the login
// has been lost.
func (t *Token) checkLogin(ctx context.Context, p *process.Process, k *Key, login uint64) (lost bool) {
	select {
	case t.check.turn <- struct{}{}:
		defer func() { <-t.check.turn }()
	case <-ctx.Done():
		return false
	}
	if t.lastLogin() != login || t.check.lost == login+1 && !t.loggedIn(p) {
		return true
	}
	was := t.loggedIn(p)
	if err := t.lookAgain(ctx, p); err != nil {
		t.setLoggedIn(p, false)
		return false // the next attempt fails in the same way
	}
	if was && t.loggedIn(p) && t.lastLogin() == login && !t.current(k).pair.Always {
		_ = t.logout(ctx) // the next attempt reports a failure
	} else {
		lost = !t.loggedIn(p)
	}
	if !t.loggedIn(p) {
		t.check.lost = login + 1 // other requests need no look
	}
	return lost
}

// broken reports whether a failure may have its cause in the token or module rather than in the
// request.
func broken(err error) bool {
	return errors.Is(err, ErrAbsent) || errors.Is(err, process.ErrGone) ||
		wire.IsReason(err, wire.ReasonNoToken, wire.ReasonOtherToken, wire.ReasonNoKey) ||
		wire.IsRV(err, wire.CKRDeviceRemoved, wire.CKRDeviceError, wire.CKRGeneralError, wire.CKRTokenNotPresent,
			wire.CKRTokenNotRecognized, wire.CKRSessionHandleInvalid, wire.CKRSessionClosed, wire.CKRSlotIDInvalid,
			wire.CKRObjectHandleInvalid, wire.CKRKeyHandleInvalid, wire.CKRCryptokiNotInitialized,
			wire.CKROperationActive, wire.CKROperationNotInitialized) // another session has got the handle
}

// explain returns the error of an operation for a person. f is what the token was to do.
func (k *Key) explain(err error, f operation.Function) error {
	t := k.token.ID
	switch {
	case isLoginError(err):
		return err
	case errors.Is(err, ErrAbsent) || wire.IsReason(err, wire.ReasonNoToken, wire.ReasonOtherToken):
		return fmt.Errorf("%w: insert token %s", ErrAbsent, k.token.name())
	case wire.IsReason(err, wire.ReasonNoKey):
		return fmt.Errorf("token %q holds a public key or certificate for ID %s, but no private key", t.Label, hex.EncodeToString(k.pair.ID))
	case wire.IsRV(err, wire.CKRKeyTypeInconsistent, wire.CKRKeyFunctionNotPermitted):
		return fmt.Errorf("the token does not let this key %v: %w", f, err)
	case wire.IsReason(err, wire.ReasonCiphertext):
		err = operation.ErrCiphertext
	case errors.Is(err, operation.ErrNotPermitted):
	default:
		err = k.token.module.supervisor.Wrap(err)
	}
	return fmt.Errorf("%v with token %q: %w", f, t.Label, err)
}
