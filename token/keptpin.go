package token

import (
	"time"

	"p11-agent/pinentry/secret"
)

// stay numbers the stays of the token's card.
func (g *gate) stay() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stays
}

// keep remembers a PIN that was right, for this token through this module, unless its card
// has gone since that stay. The PIN stays the caller's.
func (g *gate) keep(pin *secret.Secret, stay uint64) error {
	c, err := pin.Clone()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stays != stay {
		c.Wipe()
		return nil
	}
	if g.kept == nil {
		g.since = time.Now()
	}
	g.kept.Wipe()
	g.kept, g.doubted = c, 0
	return nil
}

// keptPIN returns a copy of the PIN that is kept, which the caller wipes; nil
// when there is none, or when it is in doubt and the token tells of a wrong try.
func (g *gate) keptPIN(tries Tries) (*secret.Secret, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.kept == nil || g.doubted > 0 && tries != TriesUnknown {
		return nil, nil
	}
	return g.kept.Clone()
}

// maxDoubts is how often a kept PIN is tried again of which nobody knows whether the token
// got it. A pull and the return of that card may each cost a login of another card.
const maxDoubts = 2

// doubtPIN takes note that the PIN that is kept was sent to a module process that ended for
// another card or request: the token may have got the PIN. It tells whether the PIN may be
// tried again, which is so a few times until it is right again.
func (g *gate) doubtPIN() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.doubted++
	return g.kept != nil && g.doubted <= maxDoubts
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

// wipe forgets every PIN of the token through this module, as its card has gone.
func (g *gate) wipe() {
	g.mu.Lock()
	g.stays++
	g.mu.Unlock()
	g.forgetPIN()
	g.forgive()
}
