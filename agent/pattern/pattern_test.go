package pattern

import "testing"

func TestMatchPattern(t *testing.T) {
	for _, test := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"*", "", true},
		{"**", "x", true},
		{"?", "", false},
		{"?", "x", true},
		{"a*b*c", "aXbYc", true},
		{"a*b*c", "abc", true},
		{"a*b*c", "acb", false},
		{"*.example", "a.b.example", true},
		{"*.example", "example", false},
		{"[a]", "a", false},
		{"[a]", "[a]", true},
		{"*a", "aaab", false},
		{"a?c*", "abc", true},
	} {
		if got := Match(test.pattern, test.s); got != test.want {
			t.Errorf("Match(%q, %q) = %v", test.pattern, test.s, got)
		}
	}
}

func FuzzMatchPattern(f *testing.F) {
	f.Add("a*b?c*", "aXbYc")
	f.Add("**", "")
	f.Add("*a*a*a*", "aaaa")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 64 || len(s) > 64 {
			return
		}
		// The definition, character by character.
		var is func(p, s string) bool
		known := make(map[[2]int]bool)
		is = func(p, s string) bool {
			key := [2]int{len(p), len(s)}
			if known[key] {
				return false // it was seen to be
			}
			ok := false
			switch {
			case p == "":
				ok = s == ""
			case p[0] == '*':
				ok = is(p[1:], s) || s != "" && is(p, s[1:])
			default:
				ok = s != "" && (p[0] == '?' || p[0] == s[0]) && is(p[1:], s[1:])
			}
			known[key] = !ok
			return ok
		}
		if got, want := Match(pattern, s), is(pattern, s); got != want {
			t.Errorf("Match(%q, %q) = %v, want %v", pattern, s, got, want)
		}
	})
}
