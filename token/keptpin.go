package token

import (
	"slices"
	"time"

	"p11-agent/pinentry/secret"
)

const (
	// refusalLasts is how long a PIN that a token refused is known again. Whoever
	// types it once more within that time is told, and keeps the try.
	refusalLasts = time.Minute
	// maxRefusals bounds how many are known; the oldest go.
	maxRefusals = 2 * maxAttempts
)

// pinMemory is what is known of the PIN of one token: the one that is right,
// where a Policy has it kept, and those that were refused a moment ago, which are
// compared with and never tried. All of it is in locked memory. The gate's mu
// guards it; the gate's prompt is held by whoever has a PIN tried.
type pinMemory struct {
	kept    *secret.Secret // nil when none is
	since   time.Time      // when it was given
	refused []*secret.Secret
	tries   Tries // after the last refusal: when it changes, what was refused may be right
	timer   *time.Timer
}

// keep remembers a PIN that was right. It stays the caller's.
func (g *gate) keep(pin *secret.Secret) error {
	c, err := pin.Clone()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pins.kept == nil {
		g.pins.since = time.Now()
	}
	g.pins.kept.Wipe()
	g.pins.kept = c
	return nil
}

// keptPIN returns a copy of the PIN that is kept, which the caller wipes; nil
// when there is none.
func (g *gate) keptPIN() (*secret.Secret, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pins.kept == nil {
		return nil, nil
	}
	return g.pins.kept.Clone()
}

// keptSince tells when the PIN that is kept was given; zero when there is none.
func (g *gate) keptSince() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pins.kept == nil {
		return time.Time{}
	}
	return g.pins.since
}

// forgetPIN wipes the PIN that is kept.
func (g *gate) forgetPIN() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pins.kept.Wipe()
	g.pins.kept = nil
}

// refuse remembers for a while that the token refused a PIN, and what it says of
// its tries since. One that was kept is forgotten: it is the one, or out of date.
func (g *gate) refuse(pin *secret.Secret, tries Tries) {
	g.forgetPIN()
	c, err := pin.Clone()
	if err != nil {
		return // it is not known again: as it was before there was this
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	m := &g.pins
	m.tries = tries
	if m.refused = append(m.refused, c); len(m.refused) > maxRefusals {
		m.refused[0].Wipe()
		m.refused = m.refused[1:]
	}
	if m.timer != nil {
		m.timer.Stop()
	}
	m.timer = time.AfterFunc(refusalLasts, g.forgive)
}

// wasRefused tells whether the token refused a PIN a moment ago. tries is what it
// says now.
func (g *gate) wasRefused(pin *secret.Secret, tries Tries) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if tries != g.pins.tries {
		g.pins.forgive()
	}
	return slices.ContainsFunc(g.pins.refused, pin.Equal)
}

// forgive forgets what was refused: a PIN was right, the time is over, or the
// token was away.
func (g *gate) forgive() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pins.forgive()
}

func (m *pinMemory) forgive() {
	for _, pin := range m.refused {
		pin.Wipe()
	}
	m.refused = nil
	if m.timer != nil {
		m.timer.Stop()
		m.timer = nil
	}
}

// wipe forgets everything.
func (g *gate) wipe() {
	g.forgetPIN()
	g.forgive()
}
