package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// spread is what was measured in each round. Empty: nothing.
type spread []float64

func (s spread) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	n := len(sorted)
	if n == 0 {
		return math.NaN()
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// String has the median, with the least and the greatest in brackets.
func (s spread) String() string {
	switch len(s) {
	case 0:
		return "-"
	case 1:
		return number(s[0])
	}
	return fmt.Sprintf("%s (%s..%s)", number(s.median()), number(slices.Min(s)), number(slices.Max(s)))
}

// short has the median alone.
func (s spread) short() string {
	if len(s) == 0 {
		return "-"
	}
	return number(s.median())
}

// number prints what a person reads of a number: three digits of it, or all before
// the point.
func number(x float64) string {
	decimals := 2
	switch a := math.Abs(x); {
	case a >= 100:
		decimals = 0
	case a >= 10:
		decimals = 1
	case a < 0.1 && a > 0:
		decimals = 3
	}
	return strconv.FormatFloat(x, 'f', decimals, 64)
}

// table is one in Markdown.
type table [][]string

func (t *table) add(cells ...string) { *t = append(*t, cells) }

func (t table) String() string {
	widths := make([]int, len(t[0]))
	for _, cells := range t {
		for i, c := range cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(c), 3)
		}
	}
	var b strings.Builder
	for n, cells := range t {
		for i, c := range cells {
			fmt.Fprintf(&b, "| %s%s ", c, strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)))
		}
		b.WriteString("|\n")
		if n == 0 {
			for _, w := range widths {
				b.WriteString("| " + strings.Repeat("-", w) + " ")
			}
			b.WriteString("|\n")
		}
	}
	return b.String()
}

// show prints a table that has more than its head, and what it is about.
func (b *bench) show(about string, t table) {
	if len(t) < 2 {
		return
	}
	if about != "" {
		b.print("\n%s", about)
	}
	b.print("\n%s", strings.TrimSuffix(t.String(), "\n"))
}

// goal is what was to be reached.
type goal struct{ what, want, got, verdict string }

// atLeast notes a goal, if it was measured.
func (b *bench) atLeast(what string, got spread, want float64) {
	b.note(what, "at least "+number(want), got, (want-got.median())/want)
}

// atMost notes a goal, if it was measured.
func (b *bench) atMost(what string, got spread, want float64) {
	b.note(what, "at most "+number(want), got, (got.median()-want)/want)
}

// notSlower notes the goal that a ratio of times is at most 1, or the greater one of
// rates at least. What differs less than the rounds do among each other is the same.
func (b *bench) notSlower(what string, times spread) {
	missed := times.median() - 1
	if len(times) > 1 && slices.Min(times) <= 1 {
		missed = min(missed, 0)
	}
	b.note(what, "at most 1, within the spread", times, missed)
}

func (b *bench) note(what, want string, got spread, missed float64) {
	if len(got) == 0 {
		return
	}
	g := goal{what, want, got.String(), "reached"}
	if !(missed <= 0) {
		g.verdict = fmt.Sprintf("missed by %s %%", number(100*missed))
	}
	b.goals = append(b.goals, g)
}

func (b *bench) printGoals() {
	if len(b.goals) == 0 {
		return
	}
	t := table{{"goal", "wanted", "measured", ""}}
	for _, g := range b.goals {
		t.add(g.what, g.want, g.got, g.verdict)
	}
	b.print("\n### Goals")
	b.show("", t)
}
