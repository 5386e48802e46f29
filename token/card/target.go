package card

// MaxTargets is how often a login continues with a new stay of the same card.
const MaxTargets = 5

// A Target is the card that a PIN is for.
type Target struct {
	Stay     uint64 // wire.TokenInfo.Stay
	shown    Shown
	removals uint64
}

// Target returns the Target of a PIN for the card. removals is the number of cards that have left
// (pin.State.Removals), from before the look that has found the card.
func (s Stay) Target(removals uint64) Target {
	return Target{Stay: s.Number, shown: s.Shown, removals: removals}
}

// Again returns the new Target after the module process has refused to try the PIN, because another stay has begun. A
// look for new tokens begins another stay as well. now is the card of a new look, and removals the number of cards
// that have left by now. ok is true for the same card only. If a user has put the card in again, a typed PIN still
// counts, and a kept PIN does not.
func (t Target) Again(now Stay, removals uint64, kept bool) (again Target, ok bool) {
	if removals != t.removals && (kept || !t.shown.Overlaps(now.Shown)) {
		return t, false
	}
	return Target{Stay: now.Number, shown: t.shown, removals: removals}, true
}
