package token

import (
	"context"
	"slices"
	"sync"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

const (
	// refusalLasts is how long the agent knows a PIN that a token refused. A person who
	// types that PIN again within this time is told so, and keeps the try.
	refusalLasts = time.Minute
	// maxRefusals bounds how many refused PINs the agent knows; the oldest go.
	maxRefusals = 2 * maxAttempts
)

// A physical is what belongs to a token itself, through whichever module it is seen:
// the turn to have a PIN tried, and the PINs that it refused. A login through a second
// module uses the same tries, so modules share both. The agent compares with refused
// PINs and never hands one out.
type physical struct {
	turn chan struct{} // one element: the holder gets a PIN and has it tried
	uses int           // Tokens that share it; physicals.mu guards it

	mu      sync.Mutex
	refused []refusal // the oldest first
	timer   *time.Timer
	asked   *waiting.List     // the requests that a person is asked for now; nil: none
	queue   []context.Context // the requests that wait for the turn meanwhile
}

// asks notes for which requests the holder of the turn asks a person; nil: for none any
// more.
func (p *physical) asks(list *waiting.List) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked != nil {
		p.asked.SetBeside(nil)
	}
	p.asked = list
	if list != nil {
		list.SetBeside(p.queue)
	}
}

// queues changes the queue.
func (p *physical) queues(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	if p.asked != nil {
		p.asked.SetBeside(p.queue)
	}
}

// A refusal is a PIN that the token refused, in locked memory.
type refusal struct {
	pin    *secret.Secret
	module string // that the token was used through
	tries  Tries  // what the token said of them afterwards
}

// physicals finds the physical of a token by what the token says of itself.
type physicals struct {
	mu  sync.Mutex // a leaf: no other lock is taken under it, but that of a physical
	all map[wire.TokenID]*physical
}

// take returns the physical of a token. Each call needs one of drop.
func (ps *physicals) take(id wire.TokenID) *physical {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[id]
	if p == nil {
		p = &physical{turn: make(chan struct{}, 1)}
		ps.all[id] = p
	}
	p.uses++
	return p
}

// drop ends the use of a physical by one Token.
func (ps *physicals) drop(id wire.TokenID) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[id]
	if p.uses--; p.uses == 0 {
		delete(ps.all, id)
		p.forgive(func(refusal) bool { return true })
	}
}

// wipe forgets every refused PIN.
func (ps *physicals) wipe() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.all {
		p.forgive(func(refusal) bool { return true })
	}
}

// refuse remembers for a while that the token refused a PIN, which stays the caller's.
func (p *physical) refuse(pin *secret.Secret, module string, tries Tries) {
	c, err := pin.Clone()
	if err != nil {
		return // the agent does not know it again: the token still refuses it
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused = append(p.refused, refusal{c, module, tries}); len(p.refused) > maxRefusals {
		p.refused[0].pin.Wipe()
		p.refused = p.refused[1:]
	}
	if p.timer != nil {
		p.timer.Stop()
	}
	p.timer = time.AfterFunc(refusalLasts, func() { p.forgive(func(refusal) bool { return true }) })
}

// wasRefused tells whether the token refused a PIN a moment ago. tries is what the
// token says of them now through the module. When that has changed since the last
// refusal through this module, the PINs refused through it may be right by now. What
// one module says never makes the agent forget what was refused through another.
func (p *physical) wasRefused(pin *secret.Secret, module string, tries Tries) bool {
	p.mu.Lock()
	last := -1
	for i, r := range p.refused {
		if r.module == module {
			last = i
		}
	}
	changed := last >= 0 && p.refused[last].tries != tries
	p.mu.Unlock()
	if changed {
		p.forgive(func(r refusal) bool { return r.module == module })
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.refused, func(r refusal) bool { return pin.Equal(r.pin) })
}

// forgive forgets the refused PINs that are meant.
func (p *physical) forgive(meant func(refusal) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = slices.DeleteFunc(p.refused, func(r refusal) bool {
		if !meant(r) {
			return false
		}
		r.pin.Wipe()
		return true
	})
	if len(p.refused) == 0 && p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}
