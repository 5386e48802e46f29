package token

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

const (
	// sharingPatience is how long a signature waits in all for a reader that
	// another program keeps to itself.
	sharingPatience = 5 * time.Second
	// sharingPause is how often pcscd is asked meanwhile. The card is not: pcscd
	// answers from what it knows.
	sharingPause = 200 * time.Millisecond
	// sharingQuestion bounds one look at who uses the readers.
	sharingQuestion = 3 * time.Second
	// maxLogins is how often a signature logs in again that another program takes
	// the login from each time: one that resets the card again and again.
	maxLogins = 3
)

// An InUseError says that another program keeps the reader of a card to itself
// (SCARD_SHARE_EXCLUSIVE of PC/SC), so that nobody else gets to the card.
type InUseError struct {
	Reader string
	// Holders are the programs that it can be, as "scdaemon (1234)": those that
	// are connected to pcscd and are not ours. Empty: it cannot be seen.
	Holders []string
	// Probably is who it is by their names, though they do not let anybody see it.
	Probably []string
	// Hidden tells that it is none of these, but one that this user may not see.
	Hidden bool
}

func (e *InUseError) Error() string {
	const inUse = "the reader is in use by another program"
	text := inUse
	switch {
	case len(e.Probably) > 0:
		text += ", probably " + strings.Join(e.Probably, " or ")
	case len(e.Holders) == 1:
		text += ": " + e.Holders[0]
	case len(e.Holders) > 1:
		text += ", one of: " + strings.Join(e.Holders, ", ")
	case e.Hidden:
		text += ", which this user may not see"
	default:
		text += ", which is not known"
	}
	if slices.ContainsFunc(slices.Concat(e.Holders, e.Probably), func(s string) bool { return strings.HasPrefix(s, "scdaemon ") }) {
		// scdaemon(1) keeps the reader until it ends.
		return text + `: "gpgconf --kill scdaemon" ends it, and "pcsc-shared" in scdaemon.conf has it share the reader`
	}
	return text + ": end it, or have it share the reader"
}

// Absent tells that another home of the key, if it has one, is to be tried.
func (e *InUseError) Absent() bool { return true }

// Busy tells it from a token that has to be inserted.
func (e *InUseError) Busy() bool { return true }

// readerPatience bounds how long one operation waits for readers that other programs use.
type readerPatience struct{ until time.Time }

// pcscSocket is where the module's process finds pcscd.
func (m *module) pcscSocket() string {
	return pcsc.Socket(registry.Environment(os.Environ(), m.spec.Env))
}

// usesReaders tells whether the module sees smart cards by pcscd.
func (m *module) usesReaders() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pcsc
}

// readers asks pcscd for the readers; none where it does not tell, or where the
// module does not use them.
func (m *module) readers(ctx context.Context) []pcsc.Reader {
	if !m.usesReaders() {
		return nil
	}
	readers, err := pcsc.Readers(ctx, m.pcscSocket())
	if err != nil {
		m.log.Debug("pcscd does not tell of its readers", "reason", err)
	}
	return readers
}

// heldReaders returns the readers with a card that others keep to themselves.
// They cannot be ours, which share.
//
// It asks pcscd and does not go by what the module says: with a reader that was
// taken before, OpenSC 0.23 lists the slot as empty and says CKR_DEVICE_ERROR of
// it, libykcs11 2.2 says CKR_TOKEN_NOT_PRESENT, as of an empty one.
func heldReaders(readers []pcsc.Reader) []pcsc.Reader {
	return slices.DeleteFunc(slices.Clone(readers), func(r pcsc.Reader) bool { return !r.Card || r.Users != pcsc.Exclusive })
}

// inReader tells whether a slot of a module is a reader. Modules name their slots
// so, within the 64 bytes of PKCS#11.
func inReader(slot wire.Slot, r pcsc.Reader) bool {
	return slot.Description != "" && (slot.Description == r.Name || len(slot.Description) >= 63 && strings.HasPrefix(r.Name, slot.Description))
}

// heldReader returns the reader that the token is in, or may be in, if another
// program keeps it to itself.
func (t *Token) heldReader(ctx context.Context) (r pcsc.Reader, held bool) {
	readers := t.module.readers(ctx)
	all := heldReaders(readers)
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	known := func(r pcsc.Reader) bool { return inReader(slot, r) }
	if i := slices.IndexFunc(all, known); i >= 0 {
		return all[i], true
	}
	// The card may have moved on. A reader that it was in and that is free is the
	// better guess.
	if len(all) == 0 || slices.ContainsFunc(readers, func(r pcsc.Reader) bool { return r.Card && known(r) }) {
		return r, false
	}
	return all[0], true
}

// awaitReader waits, after a failure, while another program keeps the reader to
// itself, until patience is over. It returns whether that was so and it is worth
// trying again, or an *InUseError.
func (t *Token) awaitReader(ctx context.Context, patience *readerPatience) (again bool, err error) {
	reader, held := t.heldReader(ctx)
	if !held {
		return false, nil
	}
	if patience.until.IsZero() {
		patience.until = time.Now().Add(sharingPatience)
	}
	t.module.log.Debug("waiting for another program to let go of the reader", "reader", reader.Name)
	for held {
		if time.Until(patience.until) < sharingPause {
			return false, t.module.inUse(ctx, reader)
		}
		pause := time.NewTimer(sharingPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return false, ctx.Err()
		}
		reader, held = t.heldReader(ctx)
	}
	return true, nil
}

// inUse names those who may hold a reader. The process that asks, its children
// and the other modules are none of them.
func (m *module) inUse(ctx context.Context, r pcsc.Reader) *InUseError {
	ctx, cancel := context.WithTimeout(ctx, sharingQuestion)
	defer cancel()
	e := &InUseError{Reader: r.Name}
	all, err := pcsc.Clients(ctx, m.pcscSocket())
	if err != nil {
		m.log.Debug("it cannot be seen who is connected to pcscd", "reason", err)
		return e
	}
	own := m.store.pids()
	for _, c := range all.Clients {
		if !slices.Contains(own, c.PID) {
			e.Holders = append(e.Holders, c.String())
		}
	}
	for _, c := range all.Suspects {
		e.Probably = append(e.Probably, c.String())
	}
	// Our module processes are among the hidden ones: they keep to themselves, too.
	e.Hidden = all.Hidden > 0 && len(e.Holders)+len(e.Probably) == 0
	return e
}

// inUse tells of each reader that others keep to themselves, as seen by a module,
// or by any when it is nil.
func (s *Store) inUse(ctx context.Context, only *module) (all []error) {
	var seen []string
	for _, m := range s.modulesNow() {
		if only != nil && m != only {
			continue
		}
		for _, r := range heldReaders(m.readers(ctx)) {
			if !slices.Contains(seen, r.Name) {
				seen = append(seen, r.Name)
				all = append(all, m.inUse(ctx, r))
			}
		}
	}
	return all
}

// pids returns the processes that are ours.
func (s *Store) pids() []int {
	pids := []int{os.Getpid()}
	for _, m := range s.modulesNow() {
		m.mu.Lock()
		if m.pid != 0 {
			pids = append(pids, m.pid)
		}
		m.mu.Unlock()
	}
	return pids
}

// keepHeld adds to the tokens of a look those that were there and whose reader
// another program keeps to itself, or did just before: they have not gone. It
// complains of each reader once.
func (m *module) keepHeld(ctx context.Context, order []*Token, before []pcsc.Reader) []*Token {
	held := heldReaders(m.readers(ctx))
	for _, r := range heldReaders(before) {
		if !slices.ContainsFunc(held, func(o pcsc.Reader) bool { return o.Name == r.Name }) {
			held = append(held, r)
		}
	}
	m.mu.Lock()
	last, complained := m.last, m.held
	m.held = nil
	for _, r := range held {
		m.held = append(m.held, r.Name)
	}
	m.mu.Unlock()
	for _, r := range held {
		if !slices.Contains(complained, r.Name) {
			m.log.Warn("a card cannot be looked at", "reader", r.Name, "reason", m.inUse(ctx, r))
		}
	}
	for _, t := range last {
		t.mu.Lock()
		slot := t.slot
		t.mu.Unlock()
		if !slices.Contains(order, t) && slices.ContainsFunc(held, func(r pcsc.Reader) bool { return inReader(slot, r) }) {
			order = append(order, t)
		}
	}
	return order
}

// loginBroke ends the process of a module whose login failed for want of the
// card, so that the next one starts anew: the PIN is not tried again.
//
// libykcs11 2.2 does not select its application again when another program has
// selected one: C_Login says CKR_DEVICE_ERROR until C_Finalize.
//
// One that failed as the card was pulled needs no new process. moves is how many cards had
// come and gone before.
func (m *module) loginBroke(ctx context.Context, p *process.Process, moves uint64, err error) {
	if e, ok := errors.AsType[*wire.Error](err); ok && e.Function == "C_Login" && wire.IsRV(err, wire.CKRDeviceError, wire.CKRGeneralError) && !m.awaitMove(ctx, moves) {
		p.Kill(fmt.Errorf("%w: %w", errAnew, err))
	}
}
