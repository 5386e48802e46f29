package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

var (
	errNotLocked   = errors.New("the agent is not locked")
	errNoPhrase    = errors.New("a lock needs a passphrase")
	errWrongPhrase = errors.New("wrong passphrase")
)

const (
	// Each wrong try makes the next try wait longer by unlockPause, as in ssh-agent.
	unlockPause    = 100 * time.Millisecond
	maxUnlockPause = 10 * time.Second
)

// A lock refuses all requests while it has a passphrase. The passphrase is in locked
// memory. A hash would not be safer: a program that reads this memory reads the keys, too.
type lock struct {
	open atomic.Pointer[period] // nil: locked
	turn chan struct{}          // one element, of the request that tries to unlock

	mu     sync.Mutex
	phrase *secret.Secret // nil: open
	wrong  int
	next   time.Time // when the next try may come
}

// A period is the time from one unlocking to the next locking.
type period struct {
	mu     sync.Mutex
	over   bool
	inside map[*inside]struct{} // the requests that end with the period
}

func newLock() *lock {
	l := &lock{turn: make(chan struct{}, 1)}
	l.opened()
	return l
}

func (l *lock) opened() { l.open.Store(&period{inside: make(map[*inside]struct{})}) }

func (l *lock) locked() bool { return l.open.Load() == nil }

// inside is a request that the lock has let in.
type inside struct {
	request.Served
	period *period
}

// reason returns why the request is refused. If the agent itself has ended the request, the
// reason is not err.
func (r *inside) reason(err error) error {
	if err == nil {
		return nil
	}
	cause := context.Cause(r)
	if _, paused := errors.AsType[*approval.PausedError](cause); paused || errors.Is(cause, request.ErrLocked) {
		return cause
	}
	return err
}

// enter lets in a request of c, or returns ErrLocked. The result is the context of the
// request. It ends with ctx and with the next locking, and carries use, which may be nil.
// The caller calls leave.
func (l *lock) enter(ctx context.Context, c *request.Caller, use *request.Use) (*inside, error) {
	p := l.open.Load()
	if p == nil {
		return nil, request.ErrLocked
	}
	r := &inside{period: p}
	r.Begin(ctx, c, use)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		r.End(request.ErrLocked)
		return nil, request.ErrLocked
	}
	p.inside[r] = struct{}{}
	return r, nil
}

// leave ends the context.
func (r *inside) leave() {
	r.period.mu.Lock()
	delete(r.period.inside, r)
	r.period.mu.Unlock()
	r.End(nil)
}

// end ends all requests of the period.
func (p *period) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	for r := range p.inside {
		r.End(request.ErrLocked)
	}
}

// close locks the agent.
func (l *lock) close(phrase *secret.Secret) error {
	if phrase.Len() == 0 {
		return errNoPhrase
	}
	own, err := secret.From(phrase.Bytes())
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.open.Swap(nil)
	if p == nil {
		own.Wipe()
		return request.ErrLocked
	}
	l.phrase = own
	p.end()
	return nil
}

// unlock opens the lock again. It takes one try after the other. After each wrong try comes
// a longer pause.
func (l *lock) unlock(ctx context.Context, phrase *secret.Secret) error {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	l.mu.Lock()
	pause := time.Until(l.next)
	l.mu.Unlock()
	if pause > 0 {
		t := time.NewTimer(pause)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.phrase == nil {
		return errNotLocked
	}
	if !l.phrase.Equal(phrase) {
		l.wrong++
		l.next = time.Now().Add(min(time.Duration(l.wrong)*unlockPause, maxUnlockPause))
		return fmt.Errorf("%w (attempt %d)", errWrongPhrase, l.wrong)
	}
	l.phrase.Wipe()
	l.phrase, l.wrong, l.next = nil, 0, time.Time{}
	l.opened()
	return nil
}

// Lock locks the agent with a passphrase. Until Unlock, the agent refuses every request, and
// lists nothing. Lock logs out of every token. It forgets the PINs that came with added
// URIs, and the approvals of persons. Signatures that have begun fail.
func (k *Keyring) Lock(ctx context.Context, c *request.Caller, phrase *secret.Secret) error {
	rec := k.begin(c, request.ActionLock)
	err := mayLock(c)
	if err == nil {
		err = k.lock.close(phrase)
	}
	if err == nil {
		k.approver.ForgetAll()
		k.mu.Lock()
		for _, a := range k.added {
			k.opts.Tokens.Drop(a.selection)
		}
		k.mu.Unlock()
		// The client does not learn of an error of a token.
		if err := k.opts.Tokens.LogoutAll(ctx); err != nil {
			rec.Note = "not logged out of every token: " + plain.LineWithin(err.Error(), request.MaxReason)
		}
	}
	k.audit.End(rec, err)
	return err
}

// Unlock unlocks the agent if the passphrase is that of Lock.
func (k *Keyring) Unlock(ctx context.Context, c *request.Caller, phrase *secret.Secret) error {
	rec := k.begin(c, request.ActionUnlock)
	err := mayLock(c)
	if err == nil {
		err = k.lock.unlock(ctx, phrase)
	}
	k.audit.End(rec, err)
	return err
}
