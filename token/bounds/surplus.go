package bounds

import (
	"cmp"
	"slices"
	"time"

	"p11-agent/token/wire"
)

// An Absent is a token that is not present, and that the agent may forget.
type Absent struct {
	ID   wire.TokenID
	Size Size
	Home bool      // the token has its lasting home at the module
	Left time.Time // when the token was present last
}

// Surplus returns the tokens of a module to forget: tokens without keys at once, and then those that left first,
// until there is room. Tokens that have their home at the module go last. tokens is the number of all tokens of the
// module, with those that are present.
func Surplus(absent []Absent, tokens int) (surplus []wire.TokenID) {
	absent = slices.SortedFunc(slices.Values(absent), func(a, b Absent) int {
		if a.Home != b.Home {
			if a.Home {
				return 1
			}
			return -1
		}
		return cmp.Or(a.Left.Compare(b.Left), a.ID.Compare(b.ID))
	})
	var held Size
	for _, t := range absent {
		held = held.Plus(t.Size)
	}
	for _, t := range absent {
		full := tokens > MaxTokens || held.Keys > MaxKeys/2 || held.KeyBytes > MaxKeyBytes/2 || held.OtherBytes > MaxOtherBytes/2
		if t.Size.Keys == 0 && !t.Home || full {
			surplus = append(surplus, t.ID)
			tokens--
			held = Size{held.Keys - t.Size.Keys, held.KeyBytes - t.Size.KeyBytes, held.OtherBytes - t.Size.OtherBytes}
		}
	}
	return surplus
}
