package token

import (
	"time"

	"p11-agent/pinentry/secret"
)

// keep remembers a PIN that was right, for this token through this module. It does nothing
// when the card has changed since card was counted. The PIN stays the caller's.
func (g *gate) keep(pin *secret.Secret, card uint64) error {
	c, err := pin.Clone()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.cards.Load() != card {
		c.Wipe()
		return nil
	}
	if g.kept == nil {
		g.since = time.Now()
	}
	g.kept.Wipe()
	g.kept = c
	return nil
}

// keptPIN returns a copy of the PIN that is kept, which the caller wipes; nil
// when there is none.
func (g *gate) keptPIN() (*secret.Secret, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.kept == nil {
		return nil, nil
	}
	return g.kept.Clone()
}

// keptSince tells when the PIN that is kept was given; zero when there is none.
func (g *gate) keptSince() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.kept == nil {
		return time.Time{}
	}
	return g.since
}

// forgetPIN wipes the PIN that is kept.
func (g *gate) forgetPIN() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.kept.Wipe()
	g.kept = nil
}

// refuse remembers that the token refused a PIN, and forgets the one that is kept: the
// two are the same, or the kept one is out of date.
func (g *gate) refuse(pin *secret.Secret, tries Tries) {
	g.forgetPIN()
	g.physical.refuse(pin, g.module, tries)
}

// wasRefused tells whether the token refused a PIN a moment ago, through any module.
func (g *gate) wasRefused(pin *secret.Secret, tries Tries) bool {
	return g.physical.wasRefused(pin, g.module, tries)
}

// forgive forgets what was refused through this module: a PIN was right, or the token
// was away.
func (g *gate) forgive() {
	g.physical.forgive(func(r refusal) bool { return r.module == g.module })
}

// wipe forgets every PIN of the token through this module: its card has gone.
func (g *gate) wipe() {
	g.cards.Add(1)
	g.forgetPIN()
	g.forgive()
}
