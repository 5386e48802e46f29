package token

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

// maxAttempts is how often one dialogue asks for a PIN.
const maxAttempts = 10

// gate is the way in to a token through one module. It lets one login at a time
// through, and every other request that wants to log in meanwhile shares the outcome:
// fifty signatures on a cold token are one prompt.
//
// A PIN that is kept lies here. So a module never gets a PIN that a person gave for
// the same token through another module.
type gate struct {
	physical *physical // shared with the gates of other modules that show the token
	module   string

	mu      sync.Mutex
	flight  *flight
	kept    *secret.Secret // the PIN that is right, where a Policy has it kept; nil: none
	since   time.Time      // when it was given
	doubted int            // see doubtPIN
	stays   uint64         // counts how often the card has gone

	// doubt is held, by the one element it has room for, by the request that finds out
	// whether there is a login still.
	doubt   chan struct{}
	settled uint64 // one more than the login that was in doubt last

	flights atomic.Int32 // logins that are under way
	trying  atomic.Int32 // 1 while a PIN is asked for or tried through this module
	asking  atomic.Int32 // dialogues that are open
	closed  atomic.Bool  // the token is forgotten, and may have another gate by now
}

func newGate(p *physical, module string) *gate {
	return &gate{physical: p, module: module, doubt: make(chan struct{}, 1)}
}

// flight is one login under way. It goes on while anybody waits for it and is
// called off when the last one has left.
type flight struct {
	done      chan struct{}
	err       error
	waiters   int
	abandoned bool
	cancel    context.CancelFunc
	waiting   waiting.List // the waiters, for whoever asks: one of them is asked

	// pin is what a person gave for a key that wants it for each signature, too. typist,
	// the request whose person gave it, takes it for that one signature.
	pin    *secret.Secret
	typist context.Context
}

// given is a PIN that a person gave for a token in advance, nil for none. It stays the
// caller's.
type given struct {
	pin   *secret.Secret
	typed bool // at a prompt for this token and this module
	// taken is set when the token takes the PIN, and may be nil.
	taken *bool
}

// login logs in to the token for the sake of a key, or waits for somebody
// else's login.
//
// Where the key wants the PIN for the signature as well, what the person has
// typed is returned, for the caller to use and wipe: who was asked once for one
// signature is not to be asked twice.
func (t *Token) login(ctx context.Context, k *Key, with given) (*secret.Secret, error) {
	g := t.gate
	if with.pin.Len() > 0 {
		return t.loginGiven(ctx, g, k, with)
	}
	for {
		f, err := t.board(ctx, g, k)
		if err != nil {
			return nil, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			g.leave(ctx, f)
			f.waiting.Leave(ctx)
			return nil, ctx.Err()
		}
		switch {
		case f.typist == ctx:
			return f.pin, f.err
		case !f.abandoned: // or it was called off just before this one joined
			return nil, f.err
		}
	}
}

// loginGiven logs in with a PIN that was given in advance. It shares nothing with other
// logins but its turn: the PIN is the affair of this request. Nobody else is asked
// whether to use the last try for it, and it is not tried when this request has gone.
func (t *Token) loginGiven(ctx context.Context, g *gate, k *Key, with given) (*secret.Secret, error) {
	g.flights.Add(1)
	defer g.flights.Add(-1)
	defer t.module.use()()
	ctx, cancel := context.WithCancel(context.WithValue(ctx, hasPINKey{}, true))
	defer cancel()
	defer context.AfterFunc(t.module.store.ctx, cancel)()
	typed, err := t.logIn(ctx, g, k, with)
	err = t.loginFailed(err, false)
	if err != nil && t.module.store.ctx.Err() != nil {
		err = ErrClosed
	}
	return typed, err
}

type hasPINKey struct{}

// HasPIN tells whether ctx is of a request that has a PIN already: it waits for its turn
// to have the PIN tried, and nobody is to be asked for another one.
func HasPIN(ctx context.Context) bool { return ctx.Value(hasPINKey{}) != nil }

// board joins the login under way, or starts one.
func (t *Token) board(ctx context.Context, g *gate, k *Key) (f *flight, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flight != nil {
		g.flight.waiters++
		g.flight.waiting.Add(ctx)
		return g.flight, nil
	}
	// The login outlives the request that started it when others wait too.
	f = &flight{done: make(chan struct{}), waiters: 1}
	f.waiting.Add(ctx)
	starter := ctx
	ctx, cancel := context.WithCancel(waiting.NewContext(context.WithoutCancel(ctx), &f.waiting))
	f.cancel = cancel
	g.flights.Add(1)
	started := t.module.store.goWhileOpen(func() {
		defer g.flights.Add(-1)
		defer t.module.use()()
		defer cancel()
		defer context.AfterFunc(t.module.store.ctx, cancel)()
		typed, err := t.logIn(ctx, g, k, given{})
		err = t.loginFailed(err, false)
		if err != nil && t.module.store.ctx.Err() != nil {
			err = ErrClosed
		}
		g.mu.Lock()
		f.err, f.pin = err, typed
		if f.typist = waiting.Asked(ctx); f.typist == nil {
			f.typist = starter // the PIN was kept
		}
		if f.typist.Err() != nil {
			f.pin.Wipe() // nobody will take it
		}
		g.flight = nil
		g.mu.Unlock()
		close(f.done)
	})
	if !started {
		g.flights.Add(-1)
		cancel()
		return nil, ErrClosed
	}
	g.flight = f
	return f, nil
}

// leave is for requests that do not wait any more.
func (g *gate) leave(ctx context.Context, f *flight) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f.typist == ctx {
		f.pin.Wipe()
	}
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

// logIn is the login itself: one goroutine at a time for each token. It returns
// what a person has typed when the key wants it again for its signature.
func (t *Token) logIn(ctx context.Context, g *gate, k *Key, with given) (typed *secret.Secret, err error) {
	err = g.inTurn(ctx, func(ctx context.Context) error {
		typed, err = t.logInNow(ctx, g, k, with)
		return err
	})
	return typed, err
}

// logInNow is logIn in its turn.
func (t *Token) logInNow(ctx context.Context, g *gate, k *Key, with given) (typed *secret.Secret, err error) {
	p, err := t.module.running(ctx)
	if err != nil {
		return nil, err
	}
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, err
	}
	if info.LoggedIn {
		t.setLoggedIn(p, true)
		if with.pin.Len() == 0 {
			return nil, nil
		}
	}
	// Whether a key wants its PIN each time may show only after the login. What a
	// configured source gives, it gives again.
	now := t.current(k)
	always := now.pair.Always
	wanted := (always || !now.pair.Visible) && t.module.store.source(k) == nil
	at, err := t.settle(ctx, p, info)
	if err != nil {
		return nil, err
	}
	err = t.withPIN(ctx, g, k, info, with, always, func(ctx context.Context, pin *secret.Secret, lastTry, pad bool) error {
		if info.LoggedIn { // the module would look at no PIN
			if err := t.logOutFirst(ctx); err != nil {
				return err
			}
			info.LoggedIn = false
		}
		_, err := t.tryLogin(ctx, p, pin, at, lastTry, pad)
		if err == nil && wanted && !pad {
			typed, err = pin.Clone()
		}
		return err
	})
	if err != nil {
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

// logOutFirst ends a login, for a PIN that a person gave to be tried.
func (t *Token) logOutFirst(ctx context.Context) error {
	t.mu.Lock()
	t.retained.forget()
	t.mu.Unlock()
	return t.logout(ctx)
}

// tryLogin has a PIN tried on a card. It returns where the card is now.
func (t *Token) tryLogin(ctx context.Context, p *process, pin *secret.Secret, at target, lastTry, pad bool) (target, error) {
	for n := 0; ; n++ {
		err := t.tryStay(ctx, p, pin, at.stay, lastTry, pad)
		if n == maxTargets || !wire.IsReason(err, wire.ReasonOtherToken) {
			return at, err
		}
		ok := false
		if at, ok = t.again(ctx, p, at); !ok {
			return at, err
		}
	}
}

// tryStay has a PIN tried on the card of one stay.
func (t *Token) tryStay(ctx context.Context, p *process, pin *secret.Secret, stay uint64, lastTry, pad bool) error {
	// From here on it may be logged in, whether or not the answer is waited for.
	t.mu.Lock()
	t.attempted = p
	t.mu.Unlock()
	var reply wire.TokenReply
	moves := t.module.moves()
	err := p.call(ctx, loginTimeout, wire.TypeLogin, &wire.Login{Token: t.ID, Stay: stay, LastTry: lastTry, Pad: pad, PIN: pin}, &reply)
	t.module.loginBroke(ctx, p, moves, err)
	info, told := reply.Info, err == nil
	if e, ok := errors.AsType[*wire.Error](err); ok {
		info, told = e.Info, e.HasInfo
	}
	if told { // for those who ask how many tries are left
		t.mu.Lock()
		t.slot.Info = info
		if !info.LoggedIn {
			t.attempted = nil // it was refused
		}
		t.mu.Unlock()
	}
	if err == nil {
		t.setLoggedIn(p, true)
	}
	return err
}

// reveal reads the objects that show only after a login, so that the signature
// that it was for knows what its key wants. Without hidden ones it does nothing.
func (t *Token) reveal(ctx context.Context, p *process) {
	t.mu.Lock()
	hidden := slices.ContainsFunc(t.keys, func(k *Key) bool { return !k.pair.Visible })
	t.mu.Unlock()
	if hidden {
		if err := t.lookAgain(ctx, p); err != nil && ctx.Err() == nil {
			t.module.log.Debug("token cannot be read after the login", "token", t.ID.Label, "reason", err)
		}
		t.module.store.publish()
	}
	select { // keys that were not known at all
	case p.events <- struct{}{}:
	default:
	}
}

// inTurn calls do when it is its turn to ask for a PIN. Where a person was asked in
// vain and the prompt has moved to a request that waits for its own turn, do is called
// again after that one.
func (g *gate) inTurn(ctx context.Context, do func(context.Context) error) error {
	for {
		if err := g.take(ctx); err != nil {
			return err
		}
		err := g.during(ctx, do)
		if !errors.Is(err, waiting.ErrMoved) {
			return err
		}
	}
}

// during calls do with a list of those who wait in its context, and gives the turn back.
func (g *gate) during(ctx context.Context, do func(context.Context) error) error {
	list := waiting.FromContext(ctx)
	if list == nil { // who asks for itself alone
		list = new(waiting.List)
		list.Add(ctx)
		ctx = waiting.NewContext(ctx, list)
	}
	defer g.give()
	g.physical.asks(list)
	defer g.physical.asks(nil)
	return do(ctx)
}

// take waits for the token's turn to get a PIN and have it tried, give ends that. There
// is one turn for all modules that show the token.
func (g *gate) take(ctx context.Context) error {
	p := g.physical
	select {
	case p.turn <- struct{}{}:
	default:
		p.queues(func() { p.queue = append(p.queue, ctx) })
		defer p.queues(func() {
			p.queue = slices.DeleteFunc(p.queue, func(c context.Context) bool { return c == ctx })
		})
		select {
		case p.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if g.closed.Load() {
		<-p.turn
		return ErrAbsent
	}
	g.trying.Store(1)
	return nil
}

func (g *gate) give() {
	g.trying.Store(0)
	<-g.physical.turn
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

// usePIN has a PIN tried, or has it typed on the reader when pad is set. pin
// stays the caller's.
type usePIN func(ctx context.Context, pin *secret.Secret, lastTry, pad bool) error

// withPIN gets a PIN from where it is to come from, in this order: the one
// given in advance, the configured source, the one that is kept, a person; and has
// use try it. Only a person is asked again when it was wrong, and only the same
// person decides whether the last try is taken. The caller holds the gate's
// prompt. eachUse tells that the key wants the PIN for each signature.
func (t *Token) withPIN(ctx context.Context, g *gate, k *Key, info wire.TokenInfo, with given, eachUse bool, use usePIN) error {
	tries := triesOf(info.Flags)
	if tries == TriesNone {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("the PIN is locked")}
	}
	policy := t.module.store.policyOf(k)
	pad := info.Flags&wire.CKFProtectedAuthenticationPath != 0
	if policy.Pad != nil {
		pad = *policy.Pad
	}
	src := t.module.store.source(k)
	if !pad && with.pin.Len() == 0 && src != nil {
		return t.fromSource(ctx, src, tries, t.proving(use, false))
	}
	use = t.noting(g, policy, t.proving(use, false))
	if with.pin.Len() > 0 && !with.typed {
		if err := t.checkHome(ctx); err != nil {
			return &PINError{Token: t.ID.Label, Tries: tries, Err: err}
		}
	}
	if with.pin.Len() > 0 && !pad {
		switch {
		case g.wasRefused(with.pin, tries):
			return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New(refusedBefore)}
		case tries != TriesLast:
			return t.judge(use(ctx, with.pin, false, false))
		}
	}
	problem, first := "", error(nil)
	if with.pin.Len() == 0 && !pad && tries != TriesLast && policy.Remember && (!eachUse || policy.Reuse) {
		kept, err := g.keptPIN(tries)
		if err != nil {
			return err
		}
		if kept != nil {
			err := t.judge(use(context.WithValue(ctx, keptKey{}, true), kept, false, false))
			kept.Wipe()
			switch {
			case lostByOthers(err) && g.doubtPIN():
				return &loginError{token: t.ID.Label, err: err} // it may be tried again
			case mayBeTried(err):
				// Nobody knows whether it was right: a person is to say so.
				g.forgetPIN()
			}
			e, refused := errors.AsType[*PINError](err)
			if !refused || e.Tries == TriesNone {
				return err
			}
			tries, problem, first = e.Tries, "The PIN that was kept is not right any more.", e
		}
	}

	ask := t.module.store.opts.PINs
	if ask == nil {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("nobody can be asked for it")}
	}
	minPIN, maxPIN := pinBounds(info)
	g.asking.Add(1)
	defer g.asking.Add(-1)
	request := PINRequest{
		Token: t.ID, Key: k.text, Label: k.pair.Label, ID: k.ID(), EachUse: eachUse, Pad: pad,
		MinPIN: minPIN, MaxPIN: maxPIN, Tries: tries, Given: with.pin.Len() > 0,
	}
	request.Reader = t.reader()
	if request.Home, request.Others = t.claims(); request.Home != "" || len(request.Others) > 0 {
		request.Module = t.module.identity
	}
	d, err := ask.Ask(ctx, request)
	if err != nil {
		return withFirst(first, err)
	}
	defer d.Close() //nolint:errcheck // nothing more is wanted of the dialogue
	if tries == TriesLast && (pad || with.pin.Len() > 0) {
		if err := t.lastTry(ctx, d, ""); err != nil {
			return err
		}
	}
	switch {
	case pad:
		use = t.proving(use, true)
		err := t.judge(typedOnReader(ctx, d, func(ctx context.Context) error { return use(ctx, nil, tries == TriesLast, true) }))
		if d, ok := d.(ReaderObserver); ok {
			d.TypedOnReader(err)
		}
		return err
	case with.pin.Len() > 0:
		return t.judge(use(ctx, with.pin, true, false))
	default:
		return t.fromPerson(ctx, g, d, tries, minPIN, maxPIN, problem, first, t.proving(use, true))
	}
}

// withFirst puts the reason before err for which a person was asked, as the two have
// one cause often. A person who cancels, or a request that ends, needs no reason. What
// became of the PIN that was refused first has been dealt with: err alone is wrapped.
func withFirst(first, err error) error {
	switch {
	case first == nil, errors.Is(err, ErrCancelled), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fmt.Errorf("%v; then: %w", first, err) //nolint:errorlint // see above
}

// proving makes a usePIN note that the token took a PIN through its module.
func (t *Token) proving(use usePIN, byPerson bool) usePIN {
	return func(ctx context.Context, pin *secret.Secret, lastTry, pad bool) error {
		err := use(ctx, pin, lastTry, pad)
		if err == nil {
			t.proved(byPerson)
		}
		if err == nil && byPerson {
			waiting.Accepted(ctx)
		}
		return err
	}
}

// mayBeTried tells whether a login that failed may have used up a try. err is
// what judge made of it.
func mayBeTried(err error) bool {
	if e, ok := errors.AsType[*PINError](err); ok {
		return e.Tried
	}
	if e, ok := errors.AsType[*loginError](err); ok {
		return e.attempted
	}
	// Whoever hangs up does not hear what becomes of the PIN that was sent.
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// refusedBefore is what is said of a PIN that is not tried a second time.
const refusedBefore = "this PIN was refused a moment ago"

// noting makes a usePIN remember what became of the PINs that it tries.
func (t *Token) noting(g *gate, policy Policy, use usePIN) usePIN {
	return func(ctx context.Context, pin *secret.Secret, lastTry, pad bool) error {
		stay := g.stay()
		err := use(ctx, pin, lastTry, pad)
		if pad {
			return err
		}
		e, refused := errors.AsType[*PINError](t.judge(err))
		switch {
		case refused && e.Tried:
			g.refuse(pin, e.Tries)
		case err == nil:
			g.forgive()
			if policy.Remember && !policy.Never {
				if err := g.keep(pin, stay); err != nil {
					t.module.log.Warn("the PIN cannot be kept", "token", t.ID.Label, "reason", err)
				}
			}
		}
		return err
	}
}

// lastTry asks whether to go on although one try is left.
func (t *Token) lastTry(ctx context.Context, d PINDialogue, problem string) error {
	yes, err := d.LastTry(ctx, problem)
	if err == nil && !yes {
		err = &PINError{Token: t.ID.Label, Tries: TriesLast, Err: ErrCancelled}
	}
	return err
}

// fromPerson has a person give PINs until one is right, or they decline. problem
// is what there is to say before the first, and first is the error that says so. A PIN that was refused is not tried
// again in the same dialogue, nor for a while in the next, and nor is any more
// after maxAttempts: a person stops, a program that answers for one would lock the
// token.
func (t *Token) fromPerson(ctx context.Context, g *gate, d PINDialogue, tries Tries, minPIN, maxPIN int, problem string, first error, use usePIN) error {
	var given []*secret.Secret // in this dialogue, and not right
	defer func() {
		for _, pin := range given {
			pin.Wipe()
		}
	}()
	wrong := &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("nothing that was typed can be its PIN")}
	for range maxAttempts {
		last := tries == TriesLast
		if last {
			if err := t.lastTry(ctx, d, problem); err != nil {
				return withFirst(first, err)
			}
			problem = strings.TrimSpace(problem + " This is the last try.")
		}
		pin, err := d.PIN(ctx, problem)
		if err != nil {
			pin.Wipe()
			return withFirst(first, err)
		}
		if problem = badLength(pin.Len(), minPIN, maxPIN); problem != "" {
			pin.Wipe()
			continue
		}
		if slices.ContainsFunc(given, pin.Equal) {
			pin.Wipe()
			return wrong
		}
		if g.wasRefused(pin, tries) {
			given = append(given, pin)
			wrong = &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New(refusedBefore)}
			problem = "This PIN was refused a moment ago: it was not tried again."
			continue
		}
		err = t.judge(use(ctx, pin, last, false))
		e, ok := errors.AsType[*PINError](err)
		if !ok || e.Tries == TriesNone {
			pin.Wipe()
			return err
		}
		wrong, tries, first = e, e.Tries, e
		if !e.Tried { // the flags changed since they were read
			pin.Wipe()
			problem = "The PIN was not tried yet."
			continue
		}
		given = append(given, pin)
		problem = "Wrong PIN."
		if tries == TriesLow {
			problem = "Wrong PIN, and fewer tries left."
		}
	}
	return wrong
}

// badLength says what is wrong with the length of a PIN, or nothing.
func badLength(n, minPIN, maxPIN int) string {
	switch {
	case n == 0:
		return "The PIN is empty: this was not tried."
	case n < minPIN || maxPIN > 0 && n > maxPIN:
		return fmt.Sprintf("The PIN has %d to %d characters: this one was not tried.", max(1, minPIN), maxPIN)
	}
	return ""
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
// Whoever declines it is not made to wait for the reader.
func typedOnReader(ctx context.Context, d PINDialogue, call func(ctx context.Context) error) error {
	ctx, done := context.WithCancel(ctx)
	defer done()
	notice := make(chan error, 1)
	go func() {
		err := d.Notice(ctx)
		if err != nil {
			done()
		}
		notice <- err
	}()
	err := call(ctx)
	done()
	if nerr := <-notice; err != nil && nerr != nil && !errors.Is(nerr, context.Canceled) {
		return nerr
	}
	return err
}

// judge makes a *PINError of what the module or its process said of a PIN that
// it was to try, and a *loginError of what it said of something else.
func (t *Token) judge(err error) error {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return t.loginFailed(err, errors.Is(err, errGone) && !errors.Is(err, errRenewed))
	}
	tries := TriesUnknown
	if e.HasInfo {
		tries = triesOf(e.Info.Flags)
	}
	tried := e.Function == "C_Login"
	switch {
	case e.Reason == wire.ReasonPINLocked || tried && wire.IsRV(err, wire.CKRPINLocked):
		return &PINError{Token: t.ID.Label, Tries: TriesNone, Tried: tried, Err: err}
	case e.Reason == wire.ReasonLastTry:
		return &PINError{Token: t.ID.Label, Tries: TriesLast, Err: errors.New("one try is left")}
	case tried && wire.IsRV(err, wire.CKRPINIncorrect, wire.CKRPINInvalid, wire.CKRPINLenRange):
		return &PINError{Token: t.ID.Label, Tries: tries, Tried: true, Err: err}
	case wire.IsRV(err, wire.CKRPINExpired):
		return fmt.Errorf("the PIN of token %q has expired and must be changed: %w", t.ID.Label, err)
	case wire.IsRV(err, wire.CKRUserPINNotInitialized):
		return fmt.Errorf("token %q has no PIN yet: set one first (pkcs11-tool --init-pin): %w", t.ID.Label, err)
	case wire.IsRV(err, wire.CKRFunctionCanceled):
		return ErrCancelled
	case e.Function == "C_Sign" || e.Function == "C_SignInit":
		return err // no failure of the PIN
	}
	return t.loginFailed(err, tried)
}

// loginFailed makes a failure one of a login, unless it says so by itself.
// attempted tells that a PIN may have reached the token.
func (t *Token) loginFailed(err error, attempted bool) error {
	if err == nil || isLoginError(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := errors.AsType[*ModuleError](err); ok {
		return err
	}
	if _, ok := errors.AsType[*wire.Error](err); ok || errors.Is(err, errGone) {
		err = t.module.wrap(err)
	}
	return &loginError{token: t.ID.Label, attempted: attempted, err: err}
}

// isLoginError tells whether an error speaks of a login and of no signature.
func isLoginError(err error) bool {
	_, refused := errors.AsType[*PINError](err)
	_, failed := errors.AsType[*loginError](err)
	return refused || failed || errors.Is(err, ErrCancelled) || errors.Is(err, ErrClosed)
}

// signWithPIN makes a signature with a key that wants its PIN each time. The
// requests of such keys queue up: each has its own prompt, one at a time.
func (t *Token) signWithPIN(ctx context.Context, p *process, k *Key, req *wire.Sign, with prelude) (signature []byte, err error) {
	g := t.gate
	// Close waits for no request, but no prompt is to outlive it.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.module.store.ctx, cancel)()
	err = g.inTurn(ctx, func(ctx context.Context) error {
		signature, err = t.signInTurn(ctx, g, p, k, req, with)
		return err
	})
	if err != nil && t.module.store.ctx.Err() != nil {
		err = ErrClosed
	}
	return signature, err
}

// signInTurn is signWithPIN in its turn.
func (t *Token) signInTurn(ctx context.Context, g *gate, p *process, k *Key, req *wire.Sign, with prelude) ([]byte, error) {
	info, err := t.fresh(ctx, p)
	if err != nil {
		return nil, err
	}
	if !with.fresh && !info.LoggedIn && info.Flags&wire.CKFLoginRequired != 0 {
		// It would refuse after the person has typed the PIN.
		return nil, &wire.Error{Function: "C_GetSessionInfo", RV: wire.CKRUserNotLoggedIn}
	}
	at, err := t.settle(ctx, p, info)
	if err != nil {
		return nil, err
	}
	var reply wire.SignReply
	sign := func(ctx context.Context) error {
		for n := 0; ; n++ {
			req.Stay = at.stay
			err := p.call(ctx, signTimeout, wire.TypeSign, req, &reply)
			if n == maxTargets || !wire.IsReason(err, wire.ReasonOtherToken) {
				return err
			}
			ok := false
			if at, ok = t.again(ctx, p, at); !ok {
				return err
			}
		}
	}
	err = t.withPIN(ctx, g, k, info, given{pin: with.typed, typed: true}, true, func(ctx context.Context, pin *secret.Secret, lastTry, pad bool) error {
		req.ContextLogin, req.LastTry, req.Pad, req.PIN = true, lastTry, pad, pin
		if !pad { // there a person is at work first
			defer k.working(ctx)()
		}
		err := sign(ctx)
		if pad || !wire.IsReason(err, wire.ReasonNoKey) || !t.hidesKey(p, err) {
			return err
		}
		// The key shows only after a login, which another program may have ended, or
		// the wrong PIN before this one: a PIV card forgets by it who was verified.
		if at, err = t.tryLogin(ctx, p, pin, at, lastTry, pad); err != nil {
			return err
		}
		t.reveal(ctx, p)
		return sign(ctx)
	})
	return reply.Signature, err
}

// logIn logs in to the token of the key with a PIN that a person gave for it, or with
// one from where a signature would get it. A PIN that a person gave is tried also
// where somebody is logged in, after a logout: a PIN that was not tried is not right.
func (k *Key) logIn(ctx context.Context, with given) error {
	t := k.token
	defer t.module.use()()
	p, err := t.module.running(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	wanted := t.slot.Info.Flags&wire.CKFLoginRequired != 0
	t.mu.Unlock()
	if !wanted || t.loggedIn(p) && with.pin.Len() == 0 {
		return nil
	}
	typed, err := t.login(ctx, k, with)
	typed.Wipe()
	if err == nil {
		t.retain(k)
	}
	return err
}
