package knownhosts

import (
	"encoding/binary"
	"slices"
	"strings"
)

// A Fit tells whether a host is among those that a list of patterns means.
type Fit int

// The values, in their order.
const (
	No    Fit = iota // the list means no host that the key is known for
	Maybe            // the list means some of the hosts that the key is known for
	Yes              // the list means all of them
)

// Fit tells whether a list of patterns means the host that has the key (PATTERNS in
// ssh_config(5)). The case of letters does not matter.
//
//   - A key without any name fits no list but a lone "*".
//   - Names without wildcards are names of one host: the list means it when one name
//     fits and no name fits a pattern with !.
//   - A wildcard says that hosts share the key. Then every name has to fit, and every
//     name of each wildcard.
//   - A name that is known only by its hash is compared with the patterns without
//     wildcards. Beyond these it may be any name: Yes does not rest on it, and a
//     pattern with ! may mean it. It makes no Maybe.
func (k Known) Fit(patterns []string) Fit {
	patterns = lower(patterns)
	if len(k.Names) == 0 && len(k.hashes) == 0 {
		if slices.Equal(patterns, []string{"*"}) {
			return Yes
		}
		return No
	}
	var negative, literals []string
	for _, p := range patterns {
		p, negated := strings.CutPrefix(p, "!")
		if negated {
			negative = append(negative, p)
		}
		if !wild(p) {
			literals = append(literals, p)
		}
	}
	inside, outside, excluded, overlaps := false, false, false, false
	count := func(in, negated, overlap bool) {
		inside, outside = inside || in, outside || !in
		excluded, overlaps = excluded || negated, overlaps || overlap
	}
	name := func(name string) {
		in := match(patterns, name)
		count(in, match(negative, name), in)
	}
	sets := slices.Clone(k.sets)
	for _, n := range k.Names {
		switch {
		case !wild(n):
			name(n)
		case !slices.ContainsFunc(sets, func(s set) bool { return s.name == n }):
			sets = append(sets, newSet(n))
		}
	}
	for _, s := range sets {
		in, overlap := relate(s.all, patterns)
		count(in, false, overlap)
	}
	for _, h := range k.hashes {
		if i := slices.IndexFunc(literals, func(p string) bool { return matchHash(h, p) }); i >= 0 {
			name(literals[i])
			continue
		}
		rest := []string{"*"}
		if h != "" {
			for _, p := range literals {
				rest = append(rest, "!"+p)
			}
		}
		in, _ := relate([][]string{rest}, patterns)
		_, negated := relate([][]string{rest}, negative)
		count(in, negated, in)
	}
	switch {
	case inside && !excluded && (!outside || !k.Shared()):
		return Yes
	case overlaps:
		return Maybe
	}
	return No
}

func lower(patterns []string) []string {
	all := make([]string, len(patterns))
	for i, p := range patterns {
		all[i] = strings.ToLower(p)
	}
	return all
}

// These bound what relate does to some ten milliseconds and a few megabytes.
const (
	maxPlaces = 1 << 14 // in all patterns
	maxWork   = 1 << 19 // in words of states, stepCost more for each step
	stepCost  = 8
)

// relate compares the names that fit every list of all with those that fit one more
// list. within says that there are such names and that the list has all of them.
// overlaps says that the list has one of them. Where the answer takes too long to
// find, within is false and overlaps is true.
func relate(all [][]string, list []string) (within, overlaps bool) {
	// Mostly, one pattern settles it: many small comparisons are cheaper than a large
	// one.
	excluded := false
	for _, p := range list {
		p, negated := strings.CutPrefix(p, "!")
		in, overlap := compare(all, []string{p})
		if negated {
			excluded = excluded || overlap
		} else {
			within, overlaps = within || in, overlaps || overlap
		}
	}
	if !overlaps || within && !excluded {
		return within, overlaps
	}
	return compare(all, list)
}

// compare is relate in one step. A list of patterns is a regular language: compare
// runs the automata of all patterns side by side over every text there is, and looks
// at each state of theirs once. To the automata, all bytes that no pattern has are the
// same.
func compare(all [][]string, list []string) (within, overlaps bool) {
	m := newMachine(append(slices.Clone(all), list))
	if m == nil {
		return false, true
	}
	sets, in := m.lists[:len(all)], m.lists[len(all)]
	states := [][]uint64{m.start}
	seen := make(map[string]bool)
	work, some := 0, false
	within = true
	for len(states) > 0 && (within || !overlaps) {
		state := states[len(states)-1]
		states = states[:len(states)-1]
		for _, letter := range m.letters {
			if work += stepCost + m.words; work > maxWork {
				return false, true
			}
			next := m.step(state, letter)
			key := keyOf(next)
			if seen[key] || slices.ContainsFunc(sets, func(l machineList) bool { return !l.alive(next) }) {
				continue
			}
			seen[key] = true
			states = append(states, next)
			switch {
			case slices.ContainsFunc(sets, func(l machineList) bool { return !l.accepts(next) }):
			case in.accepts(next):
				some, overlaps = true, true
			default:
				some, within = true, false
			}
		}
	}
	return within && some, overlaps
}

// A machine is the automata of patterns. Each pattern has a bit for each place in it
// where its automaton may be, and one for its end.
type machine struct {
	words   int           // of a state
	start   []uint64      // before the first byte
	stars   []uint64      // places of a *
	letters [][]uint64    // places that a byte leads on from: for each byte that some pattern has, and for the others
	lists   []machineList // as they were given
}

// A machineList is a list of patterns in a machine.
type machineList struct {
	live               []uint64 // places of its patterns without !
	positive, negative []int    // ends
}

// newMachine returns nil where the patterns are too long.
func newMachine(lists [][]string) *machine {
	places := 0
	for _, list := range lists {
		for _, p := range list {
			places += len(p) + 1
		}
	}
	if places > maxPlaces {
		return nil
	}
	m := &machine{words: places/64 + 1}
	m.start, m.stars = make([]uint64, m.words), make([]uint64, m.words)
	others := make([]uint64, m.words)
	var bytes [256][]uint64
	place := 0
	for _, list := range lists {
		l := machineList{live: make([]uint64, m.words)}
		for _, p := range list {
			p, negated := strings.CutPrefix(p, "!")
			for strings.Contains(p, "**") {
				p = strings.ReplaceAll(p, "**", "*")
			}
			mark(m.start, place)
			for i := range len(p) {
				switch c := p[i]; c {
				case '*':
					mark(m.stars, place+i)
				case '?':
					mark(others, place+i)
				default:
					if bytes[c] == nil {
						bytes[c] = make([]uint64, m.words)
					}
					mark(bytes[c], place+i)
				}
			}
			end := place + len(p)
			if negated {
				l.negative = append(l.negative, end)
			} else {
				l.positive = append(l.positive, end)
				for i := place; i <= end; i++ {
					mark(l.live, i)
				}
			}
			place = end + 1
		}
		m.lists = append(m.lists, l)
	}
	m.letters = append(m.letters, others)
	for _, b := range bytes {
		for i := range b {
			b[i] |= others[i]
		}
		if b != nil {
			m.letters = append(m.letters, b)
		}
	}
	m.passStars(m.start)
	return m
}

// step returns the state after one more byte.
func (m *machine) step(state, letter []uint64) []uint64 {
	next := make([]uint64, m.words)
	carry := uint64(0)
	for i, s := range state {
		moved := s & letter[i]
		next[i] = moved<<1 | carry | s&m.stars[i]
		carry = moved >> 63
	}
	m.passStars(next)
	return next
}

// passStars adds the places behind each *, which may stand for nothing. No * follows
// another one.
func (m *machine) passStars(state []uint64) {
	carry := uint64(0)
	for i := range state {
		state[i] |= carry
		moved := state[i] & m.stars[i]
		state[i] |= moved << 1
		carry = moved >> 63
	}
}

// accepts tells whether the text so far fits the list.
func (l machineList) accepts(state []uint64) bool {
	fits := func(end int) bool { return state[end/64]>>(end%64)&1 == 1 }
	return slices.ContainsFunc(l.positive, fits) && !slices.ContainsFunc(l.negative, fits)
}

// alive tells whether the text so far, or one that goes on from it, may fit the list.
func (l machineList) alive(state []uint64) bool {
	for i, s := range state {
		if s&l.live[i] != 0 {
			return true
		}
	}
	return false
}

func mark(b []uint64, i int) { b[i/64] |= 1 << (i % 64) }

func keyOf(state []uint64) string {
	b := make([]byte, 0, 8*len(state))
	for _, s := range state {
		b = binary.LittleEndian.AppendUint64(b, s)
	}
	return string(b)
}
