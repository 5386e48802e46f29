package token

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"p11-agent/token/card"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// A module may hang when a card is pulled. OpenSC 0.23 does, in more than half of all pulls and
// with all other cards: its library deadlocks in sc_lock (OpenSC issue 2707). pcscd still answers.
// So the agent learns from pcscd that a card has left. It forgets at once what belongs to the card,
// and looks at the module. If the module does not answer soon, it gets a new process without a
// pause.

const (
	// newcomerTimeout is the time to list the slots if another card has come meanwhile. The module
	// reads that card first, which takes OpenSC 30 commands. arrivalTimeout is the time if a card
	// has come and none has left. The next process has process.ListTimeout for a slow card.
	newcomerTimeout = 2 * time.Second
	arrivalTimeout  = 5 * time.Second
	// backTimeout is how long a request waits for a card that has just left to come back, or for
	// the module to report it.
	backTimeout = 4 * time.Second
	// cardsRedialMin is the pause before the agent connects to a missing pcscd again. It doubles
	// each time, up to cardsRedialMax.
	cardsRedialMin, cardsRedialMax = 500 * time.Millisecond, 10 * time.Second
)

// errNoService ends a process whose pcscd has gone.
var errNoService = errors.New("it lost its readers, because pcscd has gone; the agent starts a new process")

// errAnew ends a process that has failed for one request.
var errAnew = errors.New("it failed; the agent starts a new process")

// pulled reports whether a process ended because it did not answer after a card had come or gone.
func pulled(err error) bool { return errors.Is(err, process.ErrPulled) }

// lostByOthers reports whether a request failed with a process that ended for another card or
// another request.
func lostByOthers(err error) bool { return pulled(err) || errors.Is(err, errAnew) }

// A cardWatch is what pcscd has reported about the readers of a module.
type cardWatch struct {
	started bool          // the goroutine runs
	known   bool          // pcscd is connected, and has listed the readers
	readers []pcsc.Reader // the last list
	moves   uint64        // counts the cards that came and went
	last    time.Time     // the last of the moves
	silent  bool          // a card has left, and the module has not answered since
}

// watchCards starts a goroutine that learns from pcscd of cards that come and go. The goroutine
// lives longer than the processes of the module. So a card cannot change unseen while a new process
// starts.
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
				m.log.Debug("pcscd does not report cards", "reason", err)
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

// hearOfCards learns of cards on one connection to pcscd, until the connection ends.
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

// cardsAre takes in a list of readers from pcscd. It forgets what belongs to cards that have left
// since the last list.
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

// cardsUnknown notes that pcscd has gone, and reports whether pcscd was there. When pcscd is back,
// each card may be another one. Some modules are of no use any more: OpenSC 0.23 signs nothing,
// does not report it for any slot, and may not even notice.
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

// sameStay reports whether a card has stayed in its reader between two lists of pcscd.
func sameStay(before, now pcsc.Reader) bool {
	return before.Name == now.Name && before.Card && now.Card && before.Events == now.Events
}

// anyLeft reports whether a card has left its reader between two lists of pcscd.
func anyLeft(before, now []pcsc.Reader) bool {
	return slices.ContainsFunc(before, func(r pcsc.Reader) bool {
		return r.Card && !slices.ContainsFunc(now, func(n pcsc.Reader) bool { return sameStay(r, n) })
	})
}

// mayHaveLeft reports whether the token may have left its reader between two lists of pcscd, of
// which the second lacks a card.
func (t *Token) mayHaveLeft(before, now []pcsc.Reader) bool {
	t.mu.Lock()
	slot, seen := t.slot, t.card
	t.mu.Unlock()
	if slot.Flags&wire.CKFRemovableDevice == 0 {
		return false
	}
	// The last look may have read a card that has come back before pcscd reports the card here.
	if seen.IsIn(now) {
		return false
	}
	return !slices.ContainsFunc(now, func(n pcsc.Reader) bool {
		return card.InReader(slot, n) && slices.ContainsFunc(before, func(r pcsc.Reader) bool { return sameStay(r, n) })
	})
}

// cardsLeft forgets what belongs to cards that have left, and shortens the time for requests about
// them. listing is the time for the module to list its slots, before requests use it again. 0 means
// that the module has listed them.
func (m *module) cardsLeft(left []*Token, listing time.Duration) {
	gone := func(t *Token) bool { return slices.Contains(left, t) }
	var p *process.Process
	m.change(func() {
		m.order = slices.DeleteFunc(slices.Clone(m.order), gone)
		m.last = slices.DeleteFunc(slices.Clone(m.last), gone)
		p = m.current
		m.watch.silent = m.watch.silent || listing > 0 && p != nil
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

// slotsLeft takes in a report of a process that slots have lost their token. An empty list means
// any slot. slotsLeft ignores the report if pcscd reports cards: a module takes a reader for empty
// while another program uses the reader alone.
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

// logoutLost notes that the login has ended because the card has left.
func (t *Token) logoutLost() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes++
	t.stale = cmp.Or(t.session, t.attempted, t.stale)
	t.session, t.attempted = nil, nil
}

// endStale logs out of a card that was away. libykcs11 2.2 does not notice the pull: it keeps the
// PIN, and gives it to the next card.
func (t *Token) endStale(ctx context.Context, p *process.Process) {
	t.mu.Lock()
	stale := t.stale == p
	t.stale = nil
	t.mu.Unlock()
	if stale {
		_ = p.Call(ctx, process.ListTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply)) // fails if the module has noticed
	}
}

// whileBack bounds ctx for a request whose card has just left. The card may be back soon. The
// module is no reason to wait longer.
func (t *Token) whileBack(ctx context.Context) (context.Context, context.CancelFunc) {
	gone := t.goneSince()
	if t.present() || time.Since(gone) > backTimeout {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, gone.Add(backTimeout))
}

// rescanWhileBack requests a look at the module, and ignores its outcome. The error is that of ctx.
func (t *Token) rescanWhileBack(ctx context.Context) error {
	patience, done := t.whileBack(ctx)
	defer done()
	_ = t.module.rescan(patience)
	return ctx.Err()
}

// expect bounds the time for the module to list its slots, until it has done so.
func (m *module) expect(listing time.Duration) {
	m.mu.Lock()
	p := m.current
	m.mu.Unlock()
	if p != nil {
		p.Expect(listing)
	}
}

// lookSoon requests a look, because cards have come or gone.
func (m *module) lookSoon() {
	select {
	case m.moved <- struct{}{}:
	default:
	}
}

// moves returns the number of cards that have come or gone so far, as pcscd reports.
func (m *module) moves() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.watch.moves
}

// answeredSince notes that the module has answered a look that began after so many moves.
func (m *module) answeredSince(p *process.Process, moves uint64) {
	m.change(func() { // in one step: a card that leaves now makes the module silent again
		if m.watch.moves == moves && m.current == p {
			p.Calm()
			m.watch.silent = false
		}
	})
}

// awaitMove waits, after a failure that a missing card may have caused, until pcscd reports a card
// that has come or gone. moves is the number before the attempt. It reports whether a card did. It
// does not wait if pcscd has reported another move just before.
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
