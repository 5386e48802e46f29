package main

import "testing"

func TestCount(t *testing.T) {
	lines, comments := count([]byte(`// Package p is short.
package p

/* Two
lines. */
const text = ` + "`a\n\nb`" + ` // not a line of its own
`))
	if lines != 7 || comments != 3 {
		t.Errorf("got %d lines and %d comments, want 7 and 3", lines, comments)
	}
}

func TestBack(t *testing.T) {
	to := func(files ...string) map[string]bool {
		all := make(map[string]bool)
		for _, f := range files {
			all[f] = true
		}
		return all
	}
	for _, test := range []struct {
		name   string
		arrows map[string]map[string]bool
		want   int
	}{
		{"one way", map[string]map[string]bool{"a": to("b", "c"), "b": to("c"), "c": to()}, 0},
		{"both ways", map[string]map[string]bool{"a": to("b"), "b": to("a")}, 1},
		{"one of three", map[string]map[string]bool{"a": to("b", "c"), "b": to("c"), "c": to("a")}, 1},
		{"two circles", map[string]map[string]bool{"a": to("b"), "b": to("a", "c"), "c": to("d"), "d": to("c")}, 2},
	} {
		if got := back(test.arrows); got != test.want {
			t.Errorf("%s: got %d, want %d", test.name, got, test.want)
		}
	}
}
