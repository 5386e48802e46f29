package token

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"p11-agent/pinentry/secret"
	"p11-agent/token/wire"
)

// maxAttempts is how often one dialogue asks for a PIN.
const maxAttempts = 10

// gate lets one login at a time through to a token, whichever module it is
// seen through. Everybody else who wants to log in meanwhile shares the outcome:
// fifty signatures on a cold token are one prompt.
type gate struct {
	mu     sync.Mutex
	flight *flight
	use    chan struct{} // one element: held while a PIN is asked for each use
}

// flight is one login under way. It goes on while anybody waits for it and is
// called off when the last one has left.
type flight struct {
	done      chan struct{}
	err       error
	waiters   int
	abandoned bool
	cancel    context.CancelFunc
}

func (s *Store) gate(id wire.TokenID) *gate {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.gates[id]
	if g == nil {
		g = &gate{use: make(chan struct{}, 1)}
		s.gates[id] = g
	}
	return g
}

// login logs in to the token for the sake of a key, or waits for somebody
// else's login. given is a PIN that a person gave for this token in advance; it
// stays the caller's.
func (t *Token) login(ctx context.Context, k *Key, given *secret.Secret) error {
	g := t.module.store.gate(t.ID)
	for {
		f, own, err := t.board(ctx, g, k, given)
		if err != nil {
			return err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			g.leave(f)
			return ctx.Err()
		}
		// A PIN given in advance is no part of somebody else's failed login.
		// Nor is a login that was called off just before this one joined.
		if own || f.err == nil || given.Len() == 0 && !f.abandoned {
			return f.err
		}
	}
}

// board joins the login under way, or starts one.
func (t *Token) board(ctx context.Context, g *gate, k *Key, given *secret.Secret) (f *flight, own bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flight != nil {
		g.flight.waiters++
		return g.flight, false, nil
	}
	// The login outlives the request that started it when others wait too.
	var pin *secret.Secret
	if given.Len() > 0 {
		if pin, err = given.Clone(); err != nil {
			return nil, false, err
		}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f = &flight{done: make(chan struct{}), waiters: 1, cancel: cancel}
	started := t.module.store.goWhileOpen(func() {
		defer pin.Wipe()
		defer cancel()
		defer context.AfterFunc(t.module.store.ctx, cancel)()
		err := t.logIn(ctx, k, pin)
		g.mu.Lock()
		f.err = err
		g.flight = nil
		g.mu.Unlock()
		close(f.done)
	})
	if !started {
		cancel()
		pin.Wipe()
		return nil, false, ErrClosed
	}
	g.flight = f
	return f, true, nil
}

// leave is for those who do not wait any more.
func (g *gate) leave(f *flight) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f.waiters--
	if f.waiters == 0 {
		f.abandoned = true
		f.cancel()
	}
}

// goWhileOpen runs f in a goroutine that Close waits for, unless the Store is
// closed.
func (s *Store) goWhileOpen(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(f)
	return true
}

// logIn is the login itself: one goroutine at a time for each token.
func (t *Token) logIn(ctx context.Context, k *Key, given *secret.Secret) error {
	p, err := t.module.running(ctx)
	if err != nil {
		return err
	}
	info, err := t.fresh(ctx, p)
	if err != nil {
		return err
	}
	if info.LoggedIn {
		t.setLoggedIn(p, true)
		return nil
	}
	return t.withPIN(ctx, k, info, given, false, func(pin *secret.Secret, lastTry, pad bool) error {
		var reply wire.TokenReply
		err := p.call(ctx, loginTimeout, wire.TypeLogin,
			&wire.Login{Token: t.ID, LastTry: lastTry, Pad: pad, PIN: pin}, &reply)
		if err != nil {
			return err
		}
		t.setLoggedIn(p, true)
		select { // private keys that show only now
		case p.events <- struct{}{}:
		default:
		}
		return nil
	})
}

// fresh reads the state of the token. Flags change behind our back, so they are
// read before every login.
func (t *Token) fresh(ctx context.Context, p *process) (wire.TokenInfo, error) {
	var reply wire.TokenReply
	err := p.call(ctx, listTimeout, wire.TypeToken, &wire.Token{Token: t.ID}, &reply)
	if err != nil {
		return reply.Info, err
	}
	t.mu.Lock()
	t.slot.Info = reply.Info
	t.mu.Unlock()
	return reply.Info, nil
}

// withPIN gets a PIN from where it is to come from, in this order: the one
// given in advance, the configured source, a person; and has use try it. Only a
// person is asked again when it was wrong, and only the same person decides
// whether the last try is taken.
func (t *Token) withPIN(ctx context.Context, k *Key, info wire.TokenInfo, given *secret.Secret, eachUse bool,
	use func(pin *secret.Secret, lastTry, pad bool) error,
) error {
	tries := triesOf(info.Flags)
	if tries == TriesNone {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("the PIN is locked")}
	}
	pad := info.Flags&wire.CKFProtectedAuthenticationPath != 0
	src := t.module.store.source(k)
	if !pad && given.Len() == 0 && src != nil {
		return t.fromSource(ctx, src, tries, use)
	}

	ask := t.module.store.opts.PINs
	if given.Len() > 0 && !pad && tries != TriesLast {
		return t.judge(use(given, false, false), true)
	}
	if ask == nil {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("nobody can be asked for it")}
	}
	minPIN, maxPIN := pinBounds(info)
	d, err := ask.Ask(ctx, PINRequest{
		Token: t.ID, Key: k.text, Label: k.found.label, EachUse: eachUse, Pad: pad,
		MinPIN: minPIN, MaxPIN: maxPIN, Tries: tries,
	})
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // nothing more is wanted of the dialogue
	var wrong *PINError
	var refused *secret.Secret // the PIN that wrong is about
	defer func() { refused.Wipe() }()
	problem := ""
	for range maxAttempts {
		last := tries == TriesLast
		if last {
			if yes, err := d.LastTry(ctx, problem); err != nil {
				return err
			} else if !yes {
				return &PINError{Token: t.ID.Label, Tries: tries, Err: ErrCancelled}
			}
		}
		if pad {
			return t.judge(t.typedOnReader(ctx, d, func() error { return use(nil, last, true) }), true)
		}
		if given.Len() > 0 {
			return t.judge(use(given, last, false), true)
		}
		pin, err := d.PIN(ctx, problem)
		if err != nil {
			return err
		}
		if n := pin.Len(); n < max(1, minPIN) || maxPIN > 0 && n > maxPIN {
			pin.Wipe()
			problem = fmt.Sprintf("The PIN has %d to %d characters: this one was not tried.", max(1, minPIN), maxPIN)
			continue
		}
		if pin.Equal(refused) {
			// A person would not; a program that answers would lock the token.
			pin.Wipe()
			return wrong
		}
		err = t.judge(use(pin, last, false), true)
		var ok bool
		if wrong, ok = errors.AsType[*PINError](err); !ok || wrong.Tries == TriesNone {
			pin.Wipe()
			return err
		}
		refused.Wipe()
		refused = pin
		tries = wrong.Tries
		problem = "Wrong PIN."
		if tries == TriesLow {
			problem = "Wrong PIN, and fewer tries left."
		}
	}
	if wrong == nil {
		return ErrCancelled // nothing that was typed could be a PIN
	}
	return wrong
}

// pinBounds returns the lengths that the token takes, 0 for one that it does
// not say believably.
func pinBounds(info wire.TokenInfo) (minPIN, maxPIN int) {
	if info.MaxPIN == 0 || info.MaxPIN > wire.MaxPIN || info.MinPIN > info.MaxPIN {
		return 0, 0
	}
	return int(info.MinPIN), int(info.MaxPIN)
}

// typedOnReader shows a notice while call waits for the person at the reader.
func (t *Token) typedOnReader(ctx context.Context, d PINDialogue, call func() error) error {
	ctx, done := context.WithCancel(ctx)
	notice := make(chan error, 1)
	go func() { notice <- d.Notice(ctx) }()
	err := call()
	done()
	if nerr := <-notice; err != nil && nerr != nil && !errors.Is(nerr, context.Canceled) {
		return nerr
	}
	return err
}

// judge makes a *PINError of what the module or its process said of a PIN.
func (t *Token) judge(err error, tried bool) error {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return err
	}
	tries := TriesUnknown
	if e.HasInfo {
		tries = triesOf(e.Info.Flags)
	}
	switch {
	case e.Reason == wire.ReasonPINLocked || isRV(err, wire.CKRPINLocked):
		return &PINError{Token: t.ID.Label, Tries: TriesNone, Tried: tried && e.Reason == wire.ReasonModule, Err: err}
	case e.Reason == wire.ReasonLastTry:
		return &PINError{Token: t.ID.Label, Tries: TriesLast, Err: err}
	case isRV(err, wire.CKRPINIncorrect, wire.CKRPINInvalid, wire.CKRPINLenRange):
		return &PINError{Token: t.ID.Label, Tries: tries, Tried: tried, Err: err}
	case isRV(err, wire.CKRPINExpired):
		return fmt.Errorf("the PIN of token %q has expired and must be changed: %w", t.ID.Label, err)
	case isRV(err, wire.CKRUserPINNotInitialized):
		return fmt.Errorf("token %q has no PIN yet: set one first (pkcs11-tool --init-pin): %w", t.ID.Label, err)
	case isRV(err, wire.CKRFunctionCanceled):
		return ErrCancelled
	}
	return fmt.Errorf("log in to token %q: %w", t.ID.Label, t.module.wrap(err))
}

// signWithPIN makes a signature with a key that wants its PIN each time. The
// requests of such keys queue up: each has its own prompt, one at a time.
func (t *Token) signWithPIN(ctx context.Context, p *process, k *Key, req *wire.Sign) ([]byte, error) {
	g := t.module.store.gate(t.ID)
	select {
	case g.use <- struct{}{}:
		defer func() { <-g.use }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, err
	}
	var reply wire.SignReply
	err = t.withPIN(ctx, k, info, nil, true, func(pin *secret.Secret, lastTry, pad bool) error {
		req.ContextLogin, req.LastTry, req.Pad, req.PIN = true, lastTry, pad, pin
		return p.call(ctx, signTimeout, wire.TypeSign, req, &reply)
	})
	return reply.Signature, err
}

// logIn logs in to the token of the key with a PIN that a person gave for it.
func (k *Key) logIn(ctx context.Context, pin *secret.Secret) error {
	t := k.token
	p, err := t.module.running(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	wanted := t.slot.Info.Flags&wire.CKFLoginRequired != 0
	t.mu.Unlock()
	if !wanted || t.loggedIn(p) {
		return nil
	}
	return t.login(ctx, k, pin)
}
