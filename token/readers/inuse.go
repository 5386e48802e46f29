package readers

import (
	"context"
	"slices"
	"strings"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

const (
	// patience is how long an operation waits in all for readers that another program uses alone.
	patience = 5 * time.Second
	// pause is how often the agent asks pcscd meanwhile. pcscd does not ask the card.
	pause = 200 * time.Millisecond
	// question bounds one question for the users of a reader.
	question = 3 * time.Second
)

// An InUseError means that another program uses the reader of a card alone (SCARD_SHARE_EXCLUSIVE of PC/SC). No other
// program gets to the card.
type InUseError struct {
	Reader string
	// Holders are the possible programs, as "scdaemon (1234)": those that are connected to pcscd and are not part of
	// the agent. It is empty if the agent cannot see them.
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

// heldOf returns the readers with a card that another program uses alone. The agent's own modules share readers.
//
// It relies on pcscd rather than on the module. If another program took the reader first, OpenSC 0.23 lists the slot as
// empty and returns CKR_DEVICE_ERROR for it. libykcs11 2.2 returns CKR_TOKEN_NOT_PRESENT, as for an empty slot.
func heldOf(list []pcsc.Reader) []pcsc.Reader {
	return slices.DeleteFunc(slices.Clone(list), func(r pcsc.Reader) bool { return !r.Card || r.Users != pcsc.Exclusive })
}

// heldReader returns the reader that a slot is, or may be, if another program uses the reader alone.
func (r *Readers) heldReader(ctx context.Context, slot wire.Slot) (reader pcsc.Reader, held bool) {
	list := r.List(ctx)
	all := heldOf(list)
	known := func(r pcsc.Reader) bool { return Holds(slot, r) }
	if i := slices.IndexFunc(all, known); i >= 0 {
		return all[i], true
	}
	// The card may be in another reader now. A free reader that it was in is the better guess.
	if len(all) == 0 || slices.ContainsFunc(list, func(r pcsc.Reader) bool { return r.Card && known(r) }) {
		return reader, false
	}
	return all[0], true
}

// A Patience bounds how long one operation waits for readers that other programs use. The zero Patience has not waited
// yet.
type Patience struct{ until time.Time }

// Await waits, after a failure, while another program uses the reader of a slot alone, for as long as the patience
// lasts. It returns true if the reader was in use and is free now, and an *InUseError if the patience is over. slot
// returns the slot of the card, which may change meanwhile.
func (p *Patience) Await(ctx context.Context, r *Readers, slot func() wire.Slot) (again bool, err error) {
	reader, held := r.heldReader(ctx, slot())
	if !held {
		return false, nil
	}
	if p.until.IsZero() {
		p.until = time.Now().Add(patience)
	}
	r.log.Debug("waiting for another program to let go of the reader", "reader", reader.Name)
	for held {
		if time.Until(p.until) < pause {
			return false, r.inUse(ctx, reader)
		}
		next := time.NewTimer(pause)
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
			return false, ctx.Err()
		}
		reader, held = r.heldReader(ctx, slot())
	}
	return true, nil
}

// InUse returns an error for each reader that another program uses alone. It leaves out the readers in except.
func (r *Readers) InUse(ctx context.Context, except map[string]bool) (all []*InUseError) {
	for _, reader := range heldOf(r.List(ctx)) {
		if !except[reader.Name] {
			all = append(all, r.inUse(ctx, reader))
		}
	}
	return all
}

// inUse returns an error with the programs that may use a reader. The agent, its children and its modules are not
// among them.
func (r *Readers) inUse(ctx context.Context, reader pcsc.Reader) *InUseError {
	ctx, cancel := context.WithTimeout(ctx, question)
	defer cancel()
	e := &InUseError{Reader: reader.Name}
	all, err := pcsc.Clients(ctx, r.socket)
	if err != nil {
		r.log.Debug("cannot list the programs that use pcscd", "reason", err)
		return e
	}
	own := r.own()
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
