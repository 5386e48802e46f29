package token

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"p11-agent/token/card"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

const (
	// sharingPatience is how long a signature waits in all for a reader that another program uses
	// alone.
	sharingPatience = 5 * time.Second
	// sharingPause is how often the agent asks pcscd meanwhile. pcscd does not ask the card.
	sharingPause = 200 * time.Millisecond
	// sharingQuestion bounds one question for the users of a reader.
	sharingQuestion = 3 * time.Second
	// maxLogins is how often one signature logs in again, while another program ends the login each
	// time. Such a program resets the card again and again.
	maxLogins = 3
)

// An InUseError means that another program uses the reader of a card alone (SCARD_SHARE_EXCLUSIVE
// of PC/SC). No other program gets to the card.
type InUseError struct {
	Reader string
	// Holders are the possible programs, as "scdaemon (1234)": those that are connected to pcscd
	// and are not part of the agent. It is empty if the agent cannot see them.
	Holders []string
	// Probably are the likely programs by name, which hide their connections.
	Probably []string
	// Hidden means that this user may not see the program.
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

// Absent marks the error as one of an absent token: the keyring then tries another home of the key.
func (e *InUseError) Absent() bool { return true }

// Busy distinguishes the error from that of a missing token.
func (e *InUseError) Busy() bool { return true }

// readerPatience bounds how long one operation waits for readers that other programs use.
type readerPatience struct{ until time.Time }

// pcscSocket returns the socket of pcscd that the module uses.
func (m *module) pcscSocket() string {
	return pcsc.Socket(registry.Environment(os.Environ(), m.spec.Env))
}

// usesReaders reports whether the module sees smart cards through pcscd.
func (m *module) usesReaders() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pcsc
}

// readers asks pcscd for the readers. It returns none if pcscd does not answer, or if the module
// does not use pcscd.
func (m *module) readers(ctx context.Context) []pcsc.Reader {
	if !m.usesReaders() {
		return nil
	}
	readers, err := pcsc.Readers(ctx, m.pcscSocket())
	if err != nil {
		m.log.Debug("cannot get the readers from pcscd", "reason", err)
	}
	return readers
}

// heldReaders returns the readers with a card that another program uses alone. The agent's own
// modules share readers.
//
// It relies on pcscd rather than on the module. If another program took the reader first, OpenSC
// 0.23 lists the slot as empty and returns CKR_DEVICE_ERROR for it. libykcs11 2.2 returns
// CKR_TOKEN_NOT_PRESENT, as for an empty slot.
func heldReaders(readers []pcsc.Reader) []pcsc.Reader {
	return slices.DeleteFunc(slices.Clone(readers), func(r pcsc.Reader) bool { return !r.Card || r.Users != pcsc.Exclusive })
}

// heldReader returns the reader that the token is in, or may be in, if another program uses the
// reader alone.
func (t *Token) heldReader(ctx context.Context) (r pcsc.Reader, held bool) {
	readers := t.module.readers(ctx)
	all := heldReaders(readers)
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	known := func(r pcsc.Reader) bool { return card.InReader(slot, r) }
	if i := slices.IndexFunc(all, known); i >= 0 {
		return all[i], true
	}
	// The card may be in another reader now. A free reader that it was in is the better guess.
	if len(all) == 0 || slices.ContainsFunc(readers, func(r pcsc.Reader) bool { return r.Card && known(r) }) {
		return r, false
	}
	return all[0], true
}

// awaitReader waits, after a failure, while another program uses the reader alone, for as long as
// patience allows. It returns true if the reader was in use and is free now, and an *InUseError if
// patience is over.
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

// inUse returns an error with the programs that may use a reader. The agent, its children and its
// modules are not among them.
func (m *module) inUse(ctx context.Context, r pcsc.Reader) *InUseError {
	ctx, cancel := context.WithTimeout(ctx, sharingQuestion)
	defer cancel()
	e := &InUseError{Reader: r.Name}
	all, err := pcsc.Clients(ctx, m.pcscSocket())
	if err != nil {
		m.log.Debug("cannot list the programs that use pcscd", "reason", err)
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
	// The module processes of the agent are hidden as well.
	e.Hidden = all.Hidden > 0 && len(e.Holders)+len(e.Probably) == 0
	return e
}

// inUse returns an error for each reader that another program uses alone, as one module sees it, or
// any module if only is nil.
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

// pids returns the processes of the agent.
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

// keepHeld adds tokens to the tokens of a look: those that were present and whose reader another
// program uses alone, or did just before. They have not left. It logs each reader once.
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
		if !slices.Contains(order, t) && slices.ContainsFunc(held, func(r pcsc.Reader) bool { return card.InReader(slot, r) }) {
			order = append(order, t)
		}
	}
	return order
}

// loginBroke ends the process of a module whose login failed because it could not reach the card,
// so that the next login has a new process. The agent does not try the PIN again.
//
// If another program has selected its application, libykcs11 2.2 does not select its own again:
// C_Login returns CKR_DEVICE_ERROR until C_Finalize.
//
// A login that failed because the card was pulled needs no new process. moves is the number of
// moves before the login.
func (m *module) loginBroke(ctx context.Context, p *process.Process, moves uint64, err error) {
	if e, ok := errors.AsType[*wire.Error](err); ok && e.Function == "C_Login" && wire.IsRV(err, wire.CKRDeviceError, wire.CKRGeneralError) && !m.awaitMove(ctx, moves) {
		p.Kill(fmt.Errorf("%w: %w", errAnew, err))
	}
}
