package token

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/readers"
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
)

// errNoService ends a process whose pcscd has gone.
var errNoService = errors.New("it lost its readers, because pcscd has gone; the agent starts a new process")

// errAnew ends a process that has failed for one request.
var errAnew = errors.New("it failed; the agent starts a new process")

// lostByOthers reports whether a request failed with a process that ended for another card or
// another request.
func lostByOthers(err error) bool {
	return errors.Is(err, process.ErrPulled) || errors.Is(err, errAnew)
}

// CardsMoved implements readers.Follower. It forgets what belongs to cards that have left.
func (m *moduleState) CardsMoved(before, now []pcsc.Reader) {
	var left []*Token
	if readers.AnyLeft(before, now) {
		for _, t := range m.lastFound() {
			if t.mayHaveLeft(before, now) {
				left = append(left, t)
			}
		}
	}
	if len(left) > 0 {
		listing := process.GoneTimeout
		if readers.AnyLeft(now, before) {
			listing = newcomerTimeout
		}
		m.cardsLeft(left, listing)
	}
	m.supervisor.CardsMoved(arrivalTimeout)
}

// ServiceLost implements readers.Follower. Some modules are of no use any more: OpenSC 0.23 signs
// nothing, does not report it for any slot, and may not even notice.
func (m *moduleState) ServiceLost() {
	for _, t := range m.lastFound() {
		if t.removable() {
			t.pins.Wipe()
		}
	}
	m.supervisor.Kill(errNoService)
}

// slotNow returns the slot of the last look.
func (t *Token) slotNow() wire.Slot {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slot
}

// lastFound returns the tokens as the last look found them.
func (m *moduleState) lastFound() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// mayHaveLeft reports whether the token may have left its reader between two lists of pcscd, of
// which the second lacks a card.
func (t *Token) mayHaveLeft(before, now []pcsc.Reader) bool {
	t.mu.Lock()
	slot, seen := t.slot, t.card
	t.mu.Unlock()
	// The last look may have read a card that has come back before pcscd reports the card here.
	if seen.IsIn(now) {
		return false
	}
	return readers.MayHaveLeft(slot, before, now)
}

// cardsLeft forgets what belongs to cards that have left, and shortens the time for requests about
// them. listing is the time for the module to list its slots, before requests use it again. 0 means
// that the module has listed them.
func (m *moduleState) cardsLeft(left []*Token, listing time.Duration) {
	gone := func(t *Token) bool { return slices.Contains(left, t) }
	m.mu.Lock()
	m.order = slices.DeleteFunc(slices.Clone(m.order), gone)
	m.last = slices.DeleteFunc(slices.Clone(m.last), gone)
	for _, t := range left {
		t.visits.Leave()
	}
	p := m.supervisor.CardsLeft(listing > 0)
	m.mu.Unlock()
	var ids []wire.TokenID
	for _, t := range left {
		t.pins.Wipe()
		t.logoutLost()
		ids = append(ids, t.ID)
	}
	if p != nil {
		p.Hurry(ids, listing)
	}
	m.store.publish()
}

// SlotsLeft implements supervise.Host. It ignores the report if pcscd reports cards: a module takes
// a reader for empty while another program uses the reader alone.
func (m *moduleState) SlotsLeft(slots []wire.SlotID) {
	if m.readers.Known() {
		return
	}
	var left []*Token
	for _, t := range m.lastFound() {
		if len(slots) == 0 || slices.Contains(slots, wire.SlotID{ID: t.slotNow().ID}) {
			left = append(left, t)
		}
	}
	if len(left) > 0 {
		m.cardsLeft(left, process.GoneTimeout)
	}
}

// withHeldLocked adds tokens to the tokens of a look: those that were present and whose reader
// another program uses alone, or did just before. They have not left.
func (m *moduleState) withHeldLocked(order []*Token, held []pcsc.Reader) []*Token {
	for _, t := range m.last {
		slot := t.slotNow()
		if !slices.Contains(order, t) && slices.ContainsFunc(held, func(r pcsc.Reader) bool { return readers.Holds(slot, r) }) {
			order = append(order, t)
		}
	}
	return order
}

// inUse returns an error for each reader that another program uses alone, as one module sees it, or
// any module if only is nil.
func (s *Store) inUse(ctx context.Context, only *moduleState) (all []error) {
	seen := make(map[string]bool)
	for _, m := range s.modulesNow() {
		if only != nil && m != only {
			continue
		}
		for _, e := range m.readers.InUse(ctx, seen) {
			seen[e.Reader] = true
			all = append(all, e)
		}
	}
	return all
}

// pids returns the processes of the agent.
func (s *Store) pids() []int {
	pids := []int{os.Getpid()}
	for _, m := range s.modulesNow() {
		if pid := m.supervisor.PID(); pid != 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// endWith logs out of the token before its process ends, because a card may stay verified after
// that. The agent keeps the PIN.
func (t *Token) endWith(ctx context.Context, p *process.Process) {
	defer t.module.store.stir()
	t.mu.Lock()
	in := t.logins.EndWith(p)
	t.mu.Unlock()
	if !in {
		return
	}
	if err := p.Call(ctx, process.LoginTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply)); err != nil {
		t.module.log.Debug("cannot log out", "token", t.ID.Label, "reason", err)
	}
}

// logoutLost notes that the login has ended because the card has left.
func (t *Token) logoutLost() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logins.CardLeft()
}

// endStale logs out of a card that was away. libykcs11 2.2 does not notice the pull: it keeps the
// PIN, and gives it to the next card.
func (t *Token) endStale(ctx context.Context, p *process.Process) {
	t.mu.Lock()
	stale := t.logins.TakeStale(p)
	t.mu.Unlock()
	if stale {
		_ = p.Call(ctx, process.ListTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply)) // fails if the module has noticed
	}
}

// whileBack bounds ctx for a request whose card has just left. The card may be back soon. The
// module is no reason to wait longer.
func (t *Token) whileBack(ctx context.Context) (context.Context, context.CancelFunc) {
	gone := t.visits.Left()
	if t.present() || time.Since(gone) > backTimeout {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, gone.Add(backTimeout))
}

// rescanWhileBack requests a look at the module, and ignores its outcome. The error is that of ctx.
func (t *Token) rescanWhileBack(ctx context.Context) error {
	patience, done := t.whileBack(ctx)
	defer done()
	_ = t.module.supervisor.Rescan(patience)
	return ctx.Err()
}

// loginBroke ends the process of a module whose login failed because it could not reach the card,
// so that the next login has a new process. The agent does not try the PIN again.
//
// If another program has selected its application, libykcs11 2.2 does not select its own again:
// C_Login returns CKR_DEVICE_ERROR until C_Finalize.
//
// A login that failed because the card was pulled needs no new process. moves is the number of
// moves before the login.
func (m *moduleState) loginBroke(ctx context.Context, p *process.Process, moves uint64, err error) {
	if e, ok := errors.AsType[*wire.Error](err); ok && e.Function == "C_Login" && wire.IsRV(err, wire.CKRDeviceError, wire.CKRGeneralError) && !m.readers.AwaitMove(ctx, moves) {
		p.Kill(fmt.Errorf("%w: %w", errAnew, err))
	}
}
