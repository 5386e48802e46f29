package pkcs11uri

import "strings"

// former holds names that other programs and old drafts of the RFC use.
var former = map[string]string{
	"objecttype":  "type",
	"object-type": "type",
	"pinfile":     "pin-source",
	"label":       "object",
}

// Suggest returns the attribute of RFC 7512 that a person probably meant. name comes from
// Unrecognized or Ignored. Suggest returns "" when no attribute is near. It returns ""
// also for a name that starts with "x-", because its author meant that name.
func Suggest(name string) string {
	name = strings.ToLower(name)
	if strings.HasPrefix(name, "x-") {
		return ""
	}
	if known, ok := former[name]; ok {
		return known
	}
	best, least := "", 3
	for _, a := range attributes {
		// Two edits turn any short name into any other.
		if d := distance(name, a.name, least); d < least && 2*d < len(name) {
			best, least = a.name, d
		}
	}
	return best
}

// Nearest returns the name that a mistyped name is nearest to. Upper and lower case are
// the same. Nearest returns "" when every name is more than two edits away, and more than
// a third of the length.
func Nearest(name string, names []string) string {
	name = strings.ToLower(name)
	best, least := "", max(2, len(name)/3)+1
	for _, n := range names {
		if d := distance(name, strings.ToLower(n), least); d < least {
			best, least = n, d
		}
	}
	return best
}

// distance returns how many insertions, deletions, replacements and swaps of neighbours
// turn a into b. It returns limit when the lengths alone require that many.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	var before, above []int // the two rows over the current one
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before, above, row = above, row, make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(above[j]+cost, above[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
	}
	return row[len(b)]
}
