package token

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// A module that knows smart cards keeps a connection with each of them from when
// it first looks until C_Finalize: neither C_CloseSession nor C_CloseAllSessions
// ends it (measured with OpenSC 0.23 and libykcs11 2.2). Others may share the
// card meanwhile, but who wants it alone is refused, as scdaemon of GnuPG, which
// always does. So the process of a module that is not used is ended, and started
// again when it is needed, or when a card comes or goes, for which pcscd is
// watched.

const (
	// ReleaseIdle is how long a module is kept that nobody is logged in to.
	ReleaseIdle = 30 * time.Second
	// releaseBound is how long it may take to log out of its tokens.
	releaseBound = 5 * time.Second
	// releaseWatch is how often pcscd is asked for cards meanwhile.
	releaseWatch = time.Second
)

// ReleaseNever is a ModuleSpec.Idle that keeps the cards for ever.
const ReleaseNever = time.Duration(-1)

// errReleased is why a process ends that nobody has needed for a while.
var errReleased = errors.New("its cards were let go")

// use notes that somebody is about to need the module and calls the result when
// that is over: its process is not ended in between, however long a person takes
// for a PIN.
func (m *module) use() (done func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.users++
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.users--
		m.lastUse = time.Now()
	}
}

// releaseAfter tells how long the module has to be idle now, and whether it is
// to be let go at all.
func (m *module) releaseAfter(p *process.Process) (idle time.Duration, ok bool) {
	if !m.usesReaders() {
		return 0, false
	}
	if slices.ContainsFunc(m.known(), func(t *Token) bool { return t.loggedIn(p) }) {
		return m.spec.Release, m.spec.Release > 0
	}
	idle = cmp.Or(m.spec.Idle, ReleaseIdle)
	return idle, idle > 0
}

// releaseCheck is how often it is looked whether a module can be let go that
// cannot now.
func (m *module) releaseCheck() time.Duration {
	check := ReleaseIdle
	for _, d := range []time.Duration{m.spec.Release, m.spec.Idle} {
		if d > 0 {
			check = min(check, d)
		}
	}
	return max(check, time.Millisecond)
}

// release ends the process when nobody has used it for long enough, with every
// login. It returns what pcscd said of the readers just before; nil and when to
// ask again, when it is to go on.
func (m *module) release(ctx context.Context, p *process.Process) (watch *readerWatch, again time.Duration) {
	idle, ok := m.releaseAfter(p)
	if !ok {
		return nil, m.releaseCheck()
	}
	m.mu.Lock()
	left := idle - min(time.Since(m.lastUse), time.Since(m.lastLook))
	busy, held, cards := m.users > 0, len(m.held) > 0, m.cards
	m.mu.Unlock()
	switch {
	case busy:
		return nil, m.releaseCheck()
	case left > 0:
		return nil, left
	}
	watch, err := watchReaders(ctx, m.pcscSocket())
	if now := heldReaders(watch.seen); err != nil || len(now) > 0 {
		// Nobody would tell of new cards, or that a reader is free again.
		watch.close()
		return nil, m.releaseCheck()
	}
	if held || !sameCards(watch.seen, cards) {
		// Something has changed that the module has not noticed yet.
		watch.close()
		p.Notify()
		return nil, m.releaseCheck()
	}
	parked := false
	m.change(func() {
		if parked = m.users == 0; parked {
			m.proc, m.err, m.released = nil, nil, true
		}
	})
	if !parked {
		watch.close()
		return nil, idle
	}
	// A module that hangs at the end is killed all the same.
	bounded, cancel := context.WithTimeout(ctx, releaseBound)
	defer cancel()
	for _, t := range m.known() {
		t.endWith(bounded, p)
	}
	p.Kill(errReleased)
	m.log.Debug("the cards are let go until they are needed")
	return watch, 0
}

// endWith logs out of the token before its process ends, as a card may stay
// verified beyond that. What is kept of the PIN stays.
func (t *Token) endWith(ctx context.Context, p *process.Process) {
	defer t.module.store.stir()
	t.mu.Lock()
	in := t.session == p || t.attempted == p
	if t.session == p {
		t.session = nil
	}
	if t.attempted == p {
		t.attempted = nil
	}
	t.mu.Unlock()
	if !in {
		return
	}
	if err := p.Call(ctx, process.LoginTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply)); err != nil {
		t.module.log.Debug("cannot log out", "token", t.ID.Label, "reason", err)
	}
}

// rest waits until the module that was let go is needed again. due is who wants
// it looked at.
func (m *module) rest(ctx context.Context, watch *readerWatch) (due []*lookup) {
	defer func() { watch.close() }()
	tick := time.NewTicker(releaseWatch)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.needed:
			return nil
		case l := <-m.wanted:
			return []*lookup{l}
		case <-tick.C:
			if watch.changed(ctx) {
				return nil
			}
		}
	}
}

// readerWatch sees whether cards have come or gone.
type readerWatch struct {
	socket  string
	service *pcsc.Service // nil when the connection broke
	seen    []pcsc.Reader
}

func watchReaders(ctx context.Context, socket string) (*readerWatch, error) {
	w := &readerWatch{socket: socket}
	var err error
	if w.service, err = pcsc.Dial(ctx, socket); err != nil {
		return w, err
	}
	w.seen, err = w.service.Readers(ctx)
	return w, err
}

// changed tells whether anything has changed since the start. When pcscd was
// away and is back, something has.
func (w *readerWatch) changed(ctx context.Context) bool {
	if w.service == nil {
		service, err := pcsc.Dial(ctx, w.socket)
		if err != nil {
			return false
		}
		w.service = service
		return true
	}
	now, err := w.service.Readers(ctx)
	if err != nil {
		w.close()
		return false
	}
	return !sameCards(now, w.seen)
}

// sameCards tells whether no card has come or gone between two answers of pcscd.
// Who uses a reader is not of interest.
func sameCards(a, b []pcsc.Reader) bool {
	return slices.EqualFunc(a, b, func(a, b pcsc.Reader) bool {
		return a.Name == b.Name && a.Card == b.Card && a.Events == b.Events
	})
}

func (w *readerWatch) close() {
	if w.service != nil {
		_ = w.service.Close()
		w.service = nil
	}
}
