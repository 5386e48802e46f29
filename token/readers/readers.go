// Package readers knows the smart card readers of one module, as pcscd reports them: which cards come and go, and
// which readers another program uses alone.
//
// A module cannot tell a card that another program uses from an empty reader, and may hang when a card is pulled.
// pcscd still answers then, and it does not ask the card. So this package asks pcscd. It touches no card, and
// guesses nothing: if pcscd does not answer, there are no readers.
//
// What a card that has left means for its token, and for the module process, is the business of package token.
package readers

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/wire"
)

// redialMin is the pause before Follow connects to a missing pcscd again. The pause doubles each time, up to redialMax.
const redialMin, redialMax = 500 * time.Millisecond, 10 * time.Second

// Readers are the readers of one module. Methods may be called from any goroutine.
type Readers struct {
	socket string
	own    func() []int
	log    *slog.Logger

	// mu is held for moments only: nothing else is locked under it.
	mu    sync.Mutex
	state chan struct{} // closed and replaced when known or moves changes
	used  bool          // the module sees smart cards through pcscd

	// What Follow has learned.
	followed bool          // Follow was called
	known    bool          // pcscd is connected, and has listed the readers
	list     []pcsc.Reader // the last list
	moves    uint64        // counts the cards that came and went
	last     time.Time     // the last of the moves

	// What the last look at the module has met.
	seen []pcsc.Reader // the readers just before the look
	held []string      // the readers that other programs used alone at that time
}

// New returns the readers that a module with this environment sees. own returns the processes of the agent, which are
// no other programs.
func New(environ []string, own func() []int, log *slog.Logger) *Readers {
	return &Readers{socket: pcsc.Socket(environ), own: own, log: log, state: make(chan struct{})}
}

// SetUsed notes whether the module sees smart cards through pcscd. If it does not, all other methods know no reader.
func (r *Readers) SetUsed(used bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used = used
}

// Used reports whether the module sees smart cards through pcscd.
func (r *Readers) Used() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used
}

// List asks pcscd for the readers. It returns none if pcscd does not answer, or if the module does not use pcscd.
func (r *Readers) List(ctx context.Context) []pcsc.Reader {
	if !r.Used() {
		return nil
	}
	list, err := pcsc.Readers(ctx, r.socket)
	if err != nil {
		r.log.Debug("cannot get the readers from pcscd", "reason", err)
	}
	return list
}

// Looked notes the readers just before a look at the module that has ended. It returns those that another program uses
// alone, or did just before the look. It logs each of them once.
func (r *Readers) Looked(ctx context.Context, before []pcsc.Reader) (held []pcsc.Reader) {
	held = heldOf(r.List(ctx))
	for _, h := range heldOf(before) {
		if !slices.ContainsFunc(held, func(o pcsc.Reader) bool { return o.Name == h.Name }) {
			held = append(held, h)
		}
	}
	var names []string
	for _, h := range held {
		names = append(names, h.Name)
	}
	r.mu.Lock()
	complained := r.held
	r.seen, r.held = before, names
	r.mu.Unlock()
	for _, h := range held {
		if !slices.Contains(complained, h.Name) {
			r.log.Warn("a card cannot be looked at", "reader", h.Name, "reason", r.inUse(ctx, h))
		}
	}
	return held
}

// Holds reports whether a slot of a module is a reader. Modules name their slots after readers, within the 64 bytes of
// PKCS#11.
func Holds(slot wire.Slot, r pcsc.Reader) bool {
	return slot.Description != "" && (slot.Description == r.Name || len(slot.Description) >= 63 && strings.HasPrefix(r.Name, slot.Description))
}

// A Follower learns of the cards of a module.
type Follower interface {
	// CardsMoved gives the lists of pcscd before and after a card has come or gone.
	CardsMoved(before, now []pcsc.Reader)
	// ServiceLost says that pcscd has gone. When it is back, each card may be another one.
	ServiceLost()
}

// Follow has run start a goroutine that tells a Follower of cards that come and go, until ctx ends. The goroutine lives
// longer than the processes of the module, so that no card changes unseen while a new process starts. Follow does
// nothing if the module does not use pcscd, or if the goroutine was started before.
func (r *Readers) Follow(ctx context.Context, f Follower, run func(work func())) {
	r.mu.Lock()
	start := r.used && !r.followed
	r.followed = r.followed || start
	r.mu.Unlock()
	if start {
		run(func() { r.follow(ctx, f) })
	}
}

func (r *Readers) follow(ctx context.Context, f Follower) {
	told, wait := "", redialMin
	for ctx.Err() == nil {
		err := r.hear(ctx, f)
		if err != nil && err.Error() != told && ctx.Err() == nil {
			told = err.Error()
			r.log.Debug("pcscd does not report cards", "reason", err)
		}
		wait = min(2*wait, redialMax)
		if ctx.Err() == nil && r.lose() {
			f.ServiceLost()
			wait = redialMin
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// hear learns of cards on one connection to pcscd, until the connection ends.
func (r *Readers) hear(ctx context.Context, f Follower) error {
	service, err := pcsc.Dial(ctx, r.socket)
	if err != nil {
		return err
	}
	defer service.Close()
	for {
		now, err := service.Watch(ctx)
		if err != nil {
			return err
		}
		if before, moved := r.take(now); moved {
			f.CardsMoved(before, now)
		}
		if err := service.Changed(ctx); err != nil {
			return err
		}
	}
}

// take notes a list of pcscd. It returns the last list, and whether a card has come or gone since.
func (r *Readers) take(now []pcsc.Reader) (before []pcsc.Reader, moved bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before = r.list
	if moved = !r.known || !sameCards(before, now); moved {
		r.moves, r.last = r.moves+1, time.Now()
	}
	r.list, r.known = now, true
	r.wakeLocked()
	return before, moved
}

// lose notes that pcscd has gone. It reports whether pcscd was there.
func (r *Readers) lose() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		return false
	}
	r.list, r.known = nil, false
	r.moves, r.last = r.moves+1, time.Now()
	r.wakeLocked()
	return true
}

// wakeLocked wakes the goroutines that wait for a change.
func (r *Readers) wakeLocked() {
	close(r.state)
	r.state = make(chan struct{})
}

// Known reports whether pcscd reports the cards of the module now.
func (r *Readers) Known() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known
}

// Moves returns the number of cards that have come or gone so far, as pcscd reports.
func (r *Readers) Moves() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.moves
}

// AwaitMove waits, after a failure that a missing card may have caused, until pcscd reports a card that has come or
// gone. moves is Moves before the attempt. AwaitMove reports whether a card did. It does not wait if pcscd has reported
// another move just before.
func (r *Readers) AwaitMove(ctx context.Context, moves uint64) bool {
	late := time.NewTimer(pcsc.NoticeTime)
	defer late.Stop()
	for {
		r.mu.Lock()
		moved, state := r.moves != moves, r.state
		told := !r.known || time.Since(r.last) < pcsc.NoticeTime
		r.mu.Unlock()
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

// sameCards reports whether no card has come or gone between two lists of pcscd. It ignores the users of a reader.
func sameCards(a, b []pcsc.Reader) bool {
	return slices.EqualFunc(a, b, func(a, b pcsc.Reader) bool {
		return a.Name == b.Name && a.Card == b.Card && a.Events == b.Events
	})
}

// sameStay reports whether a card has stayed in its reader between two lists of pcscd.
func sameStay(before, now pcsc.Reader) bool {
	return before.Name == now.Name && before.Card && now.Card && before.Events == now.Events
}

// AnyLeft reports whether a card has left its reader between two lists of pcscd. AnyLeft(now, before) reports whether
// a card has come.
func AnyLeft(before, now []pcsc.Reader) bool {
	return slices.ContainsFunc(before, func(r pcsc.Reader) bool {
		return r.Card && !slices.ContainsFunc(now, func(n pcsc.Reader) bool { return sameStay(r, n) })
	})
}

// MayHaveLeft reports whether the card in a slot may have left its reader between two lists of pcscd. A slot that is
// not removable keeps its token.
func MayHaveLeft(slot wire.Slot, before, now []pcsc.Reader) bool {
	return slot.Flags&wire.CKFRemovableDevice != 0 && AnyLeft(before, now) && !slices.ContainsFunc(now, func(n pcsc.Reader) bool {
		return Holds(slot, n) && slices.ContainsFunc(before, func(r pcsc.Reader) bool { return sameStay(r, n) })
	})
}
