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

// A module for smart cards keeps a connection to each card from its first look until C_Finalize.
// Neither C_CloseSession nor C_CloseAllSessions ends the connection (measured with OpenSC 0.23 and
// libykcs11 2.2). Other programs may share the card meanwhile. A program that wants the card alone
// is refused, as GnuPG's scdaemon, which always does. So the agent ends the process of an unused
// module. It starts the process again for a request, or when a card comes or goes. pcscd reports
// that.

const (
	// ReleaseIdle is how long the agent keeps an unused module without a login.
	ReleaseIdle = 30 * time.Second
	// releaseBound is the time to log out of the tokens of the module.
	releaseBound = 5 * time.Second
	// releaseWatch is how often the agent asks pcscd for cards meanwhile.
	releaseWatch = time.Second
)

// ReleaseNever is a ModuleSpec.Idle that keeps the cards for ever.
const ReleaseNever = time.Duration(-1)

// errReleased ends a process that no request has needed for a while.
var errReleased = errors.New("the agent released its cards")

// use notes that a request needs the module, until the caller calls done. The agent does not end
// the process in between, even while a prompt is open for long.
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

// releaseAfter returns how long the module must be idle, and whether the agent may release the
// module at all.
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

// releaseCheck returns when to look again whether the agent can release the module.
func (m *module) releaseCheck() time.Duration {
	check := ReleaseIdle
	for _, d := range []time.Duration{m.spec.Release, m.spec.Idle} {
		if d > 0 {
			check = min(check, d)
		}
	}
	return max(check, time.Millisecond)
}

// release ends the process with every login after it was unused for long enough. It returns a watch
// of the readers from just before. If the process goes on, release returns nil and when to call it
// again.
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
		// The agent would not learn of new cards, or of a free reader.
		watch.close()
		return nil, m.releaseCheck()
	}
	if held || !sameCards(watch.seen, cards) {
		// The module has not noticed a change yet.
		watch.close()
		p.Notify()
		return nil, m.releaseCheck()
	}
	parked := false
	m.change(func() {
		if parked = m.users == 0; parked {
			select {
			case <-m.needed: // from a request that met the start after an earlier release
			default:
			}
			m.proc, m.err, m.released = nil, nil, true
		}
	})
	if !parked {
		watch.close()
		return nil, idle
	}
	// Kill ends a module that hangs.
	bounded, cancel := context.WithTimeout(ctx, releaseBound)
	defer cancel()
	for _, t := range m.known() {
		t.endWith(bounded, p)
	}
	p.Kill(errReleased)
	m.log.Debug("released the cards until a request needs them")
	return watch, 0
}

// endWith logs out of the token before its process ends, because a card may stay verified after
// that. The agent keeps the PIN.
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

// rest waits until a request needs the released module. due are the requests for a look.
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

// A readerWatch notices cards that come or go.
type readerWatch struct {
	socket  string
	service *pcsc.Service // nil: the connection is broken
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

// changed reports whether a card has come or gone since the start. If pcscd was away and is back,
// changed returns true.
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

// sameCards reports whether no card has come or gone between two lists of pcscd. It ignores the
// users of a reader.
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
