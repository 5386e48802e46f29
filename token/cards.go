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

// A module may hang when a card is pulled. OpenSC 0.23 does, in more than half of all
// pulls, with all of its other cards: its library locks itself out in sc_lock (OpenSC
// issue 2707). So the agent hears of a card that has gone from pcscd, whose answers do
// not depend on the module. It forgets at once what belongs to the card, and looks at the
// module. When the module does not answer soon, it gets a new process without a pause.

const (
	// newcomerTimeout is how long it may take for its slots when another card has come
	// meanwhile: it reads that card first, which takes OpenSC 30 commands. arrivalTimeout is
	// likewise when no card has gone. The next process has process.ListTimeout for a slow card.
	newcomerTimeout = 2 * time.Second
	arrivalTimeout  = 5 * time.Second
	// backTimeout is how long a request waits for a card that has just gone to be back, or
	// for the module to tell of it.
	backTimeout = 4 * time.Second
	// cardsRedialMin is how long to wait before pcscd is called again that is not there.
	// It doubles each time, up to cardsRedialMax.
	cardsRedialMin, cardsRedialMax = 500 * time.Millisecond, 10 * time.Second
)

// errNoService is why a process ends whose pcscd has gone.
var errNoService = errors.New("it lost its readers and is started anew: pcscd has gone")

// errAnew is why the agent ends a process that has failed for one request.
var errAnew = errors.New("it failed and is started anew")

// pulled tells whether a request failed, or a process ended, for that.
func pulled(err error) bool { return errors.Is(err, process.ErrPulled) }

// lostByOthers tells whether a request was lost with a process that ended for another card
// or for another request.
func lostByOthers(err error) bool { return pulled(err) || errors.Is(err, errAnew) }

// A cardWatch is what pcscd has told of the readers that a module uses.
type cardWatch struct {
	started bool          // the goroutine is there
	known   bool          // pcscd is connected, and has told readers
	readers []pcsc.Reader // as it told last
	moves   uint64        // counts the cards that came and went
	last    time.Time     // when one did
	doubt   bool          // a card has gone, and the module has not answered since
}

// watchCards starts a goroutine that hears from pcscd of cards that come and go. It lives
// longer than the processes of the module, so that no card is exchanged unseen while one
// process takes the place of another.
func (m *module) watchCards() {
	m.mu.Lock()
	start := m.pcsc && !m.watch.started
	m.watch.started = m.watch.started || start
	m.mu.Unlock()
	if !start {
		return
	}
	ctx := m.store.ctx
	_ = m.store.start(func() {
		told, wait := "", cardsRedialMin
		for ctx.Err() == nil {
			err := m.hearOfCards(ctx)
			if err != nil && err.Error() != told && ctx.Err() == nil {
				told = err.Error()
				m.log.Debug("pcscd does not tell of cards", "reason", err)
			}
			wait = min(2*wait, cardsRedialMax)
			if ctx.Err() == nil && m.cardsUnknown() {
				wait = cardsRedialMin
			}
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
	})
}

// hearOfCards does so on one connection, until that ends.
func (m *module) hearOfCards(ctx context.Context) error {
	service, err := pcsc.Dial(ctx, m.pcscSocket())
	if err != nil {
		return err
	}
	defer service.Close()
	for {
		readers, err := service.Watch(ctx)
		if err != nil {
			return err
		}
		m.cardsAre(readers)
		if err := service.Changed(ctx); err != nil {
			return err
		}
	}
}

// cardsAre takes note of what pcscd tells, and forgets what belongs to cards that have
// left their reader since it told last.
func (m *module) cardsAre(now []pcsc.Reader) {
	var before []pcsc.Reader
	var left []*Token
	moved := false
	m.change(func() {
		known := m.watch.known
		before = m.watch.readers
		m.watch.readers, m.watch.known = now, true
		if moved = !known || !sameCards(before, now); moved {
			m.watch.moves, m.watch.last = m.watch.moves+1, time.Now()
		}
		if known && anyLeft(before, now) {
			for _, t := range m.last {
				if t.mayHaveLeft(before, now) {
					left = append(left, t)
				}
			}
		}
	})
	if len(left) > 0 {
		listing := process.GoneTimeout
		if slices.ContainsFunc(now, func(r pcsc.Reader) bool {
			return r.Card && !slices.ContainsFunc(before, func(o pcsc.Reader) bool { return sameStay(o, r) })
		}) {
			listing = newcomerTimeout
		}
		m.cardsLeft(left, listing)
	}
	if moved {
		m.expect(arrivalTimeout)
		m.lookSoon()
	}
}

// cardsUnknown takes note that pcscd has gone. Each card may be another one when it is
// back, and some modules are of no use any more: OpenSC 0.23 signs nothing, says so of no
// slot, and may not even notice. It tells whether pcscd was there.
func (m *module) cardsUnknown() (news bool) {
	var left []*Token
	var p *process.Process
	m.change(func() {
		if news = m.watch.known; !news {
			return
		}
		for _, t := range m.last {
			if t.removable() {
				left = append(left, t)
			}
		}
		m.watch.readers, m.watch.known = nil, false
		m.watch.moves, m.watch.last = m.watch.moves+1, time.Now()
		p = m.current
	})
	for _, t := range left {
		t.pins.Wipe()
	}
	if p != nil {
		p.Kill(errNoService)
	}
	return news
}

// sameStay tells whether a card has stayed in its reader between two answers of pcscd.
func sameStay(before, now pcsc.Reader) bool {
	return before.Name == now.Name && before.Card && now.Card && before.Events == now.Events
}

// anyLeft tells whether a card has left its reader between two answers of pcscd.
func anyLeft(before, now []pcsc.Reader) bool {
	return slices.ContainsFunc(before, func(r pcsc.Reader) bool {
		return r.Card && !slices.ContainsFunc(now, func(n pcsc.Reader) bool { return sameStay(r, n) })
	})
}

// mayHaveLeft tells whether the token is not known to have stayed in its reader, between
// two answers of pcscd of which the second is short of a card.
func (t *Token) mayHaveLeft(before, now []pcsc.Reader) bool {
	t.mu.Lock()
	slot, seen := t.slot, t.card
	t.mu.Unlock()
	if slot.Flags&wire.CKFRemovableDevice == 0 {
		return false
	}
	// A look may have met the card that has come back before pcscd tells of it here.
	if seen.reader != "" && slices.ContainsFunc(now, func(n pcsc.Reader) bool { return n.Card && n.Name == seen.reader && n.Events == seen.events }) {
		return false
	}
	return !slices.ContainsFunc(now, func(n pcsc.Reader) bool {
		return inReader(slot, n) && slices.ContainsFunc(before, func(r pcsc.Reader) bool { return sameStay(r, n) })
	})
}

// cardsLeft forgets what belongs to cards that have gone, and has what is under way with
// them answered soon. listing is how long the module may take to list its slots, before it
// is of use again; 0: it has done so.
func (m *module) cardsLeft(left []*Token, listing time.Duration) {
	gone := func(t *Token) bool { return slices.Contains(left, t) }
	var p *process.Process
	m.change(func() {
		m.order = slices.DeleteFunc(slices.Clone(m.order), gone)
		m.last = slices.DeleteFunc(slices.Clone(m.last), gone)
		p = m.current
		m.watch.doubt = m.watch.doubt || listing > 0 && p != nil
	})
	var ids []wire.TokenID
	for _, t := range left {
		t.pins.Wipe()
		t.logoutLost()
		t.left()
		ids = append(ids, t.ID)
	}
	if p != nil {
		p.Hurry(ids, listing)
	}
	m.store.publish()
}

// slotsLeft takes note that a process tells of slots that have lost their token; without
// any, it does not know which. Where pcscd
// tells of cards, it knows better: a module takes a reader for empty that another program
// keeps to itself.
func (m *module) slotsLeft(p *process.Process, slots []wire.SlotID) {
	var left []*Token
	m.mu.Lock()
	if m.current == p && !m.watch.known {
		for _, t := range m.last {
			t.mu.Lock()
			id := t.slot.ID
			t.mu.Unlock()
			if len(slots) == 0 || slices.Contains(slots, wire.SlotID{ID: id}) {
				left = append(left, t)
			}
		}
	}
	m.mu.Unlock()
	if len(left) > 0 {
		m.cardsLeft(left, process.GoneTimeout)
	}
}

// logoutLost takes note that the login has ended, as the card has gone.
func (t *Token) logoutLost() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes++
	t.stale = cmp.Or(t.session, t.attempted, t.stale)
	t.session, t.attempted = nil, nil
}

// endStale logs out of a card that was away, where its module may not have noticed:
// libykcs11 2.2 keeps the PIN, and gives it to the card that is there.
func (t *Token) endStale(ctx context.Context, p *process.Process) {
	t.mu.Lock()
	stale := t.stale == p
	t.stale = nil
	t.mu.Unlock()
	if stale {
		_ = p.Call(ctx, process.ListTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply)) // mostly it has noticed
	}
}

// whileBack bounds ctx for a request whose card has just gone: the card may be back soon,
// and what the module does is no reason to wait for longer.
func (t *Token) whileBack(ctx context.Context) (context.Context, context.CancelFunc) {
	gone := t.goneSince()
	if t.present() || time.Since(gone) > backTimeout {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, gone.Add(backTimeout))
}

// rescanWhileBack has the module looked at again, whatever comes of it. The error is that
// of ctx.
func (t *Token) rescanWhileBack(ctx context.Context) error {
	patience, done := t.whileBack(ctx)
	defer done()
	_ = t.module.rescan(patience)
	return ctx.Err()
}

// expect bounds how long the module may take to list its slots, until it has done so.
func (m *module) expect(listing time.Duration) {
	m.mu.Lock()
	p := m.current
	m.mu.Unlock()
	if p != nil {
		p.Expect(listing)
	}
}

// lookSoon has the module looked at, as cards have come or gone.
func (m *module) lookSoon() {
	select {
	case m.moved <- struct{}{}:
	default:
	}
}

// moves counts the cards that came and went, as far as pcscd has told.
func (m *module) moves() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.watch.moves
}

// answeredSince takes note that the module has answered a look that began after so many
// moves: it is of use still.
func (m *module) answeredSince(p *process.Process, moves uint64) {
	m.mu.Lock()
	latest := m.watch.moves == moves && m.current == p
	doubt := m.watch.doubt
	m.mu.Unlock()
	if !latest {
		return
	}
	p.Calm()
	if doubt {
		m.change(func() { m.watch.doubt = false })
	}
}

// awaitMove waits, after a failure that may come of a card that is gone, until pcscd tells
// of a card that has come or gone since there were so many moves. It tells whether that
// was so. It does not wait where pcscd told of one just before, and so has looked.
func (m *module) awaitMove(ctx context.Context, moves uint64) bool {
	late := time.NewTimer(process.NoticeTime)
	defer late.Stop()
	for {
		m.mu.Lock()
		moved, state := m.watch.moves != moves, m.state
		told := !m.watch.known || time.Since(m.watch.last) < process.NoticeTime
		m.mu.Unlock()
		if moved || told {
			return moved
		}
		select {
		case <-state:
		case <-late.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
