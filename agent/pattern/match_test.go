package pattern

import (
	"strings"
	"testing"
)

func TestMatch(t *testing.T) {
	tests := []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"a", "a", true},
		{"a", "A", false},
		{"a", "ab", false},
		{"b", "ab", false},
		{"*", "", true},
		{"**", "", true},
		{"*", "/usr/lib/a.so", true},
		{"?", "", false},
		{"?", "/", true},
		{"?", "ab", false},
		{"?*", "", false},
		{"?*", "abc", true},
		{"*?", "a", true},
		{"a*b", "ab", true},
		{"a*b", "aXbXb", true},
		{"a*b", "aXbX", false},
		{"*ab*", "aab", true},
		{"*.so", "x.so.1", false},
		{"*.so*", "x.so.1", true},
		{"[ab]", "a", false}, // no classes, unlike those of a shell
		{"[ab]", "[ab]", true},
		{`\*`, "*", false}, // and nothing to take a star for itself
		{`\*`, `\x`, true},
		{"/usr/lib*/**", "/usr/lib/p11.so", true},
		{"/usr/lib*/**", "/usr/lib64/p11.so", true},
		{"/usr/lib*/**", "/usr/lib/a/b/c/p11.so", true},
		{"/usr/lib*/**", "/usr/libexec/p11.so", true},
		{"/usr/lib*/**", "/usr/lib/", true},
		{"/usr/lib*/**", "/usr/lib", false},
		{"/usr/lib*/**", "/usr/local/lib/p11.so", false},
		{"/usr/lib*/**", "/home/usr/lib/p11.so", false},
		{"/usr/lib*/*", "/usr/lib/a/b/p11.so", true},
		{"/usr/lib/?.so", "/usr/lib/é.so", false}, // bytes, as in OpenSSH
		{"/usr/lib/??.so", "/usr/lib/é.so", true},
		// A clever client, and time in proportion to the product of both lengths.
		{strings.Repeat("a*", 500) + "b", strings.Repeat("a", 4000), false},
		{strings.Repeat("*a", 500), strings.Repeat("a", 4000), true},
	}
	for _, tt := range tests {
		if got := Match(tt.pattern, tt.s); got != tt.want {
			t.Errorf("Match(%.40q, %.40q) = %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}
}

// matchesTable says the same as Match, by a table of all the answers there are.
func matchesTable(pattern, s string) bool {
	table := make([][]bool, len(pattern)+1) // [i][j]: pattern[i:] matches s[j:]
	for i := len(pattern); i >= 0; i-- {
		table[i] = make([]bool, len(s)+1)
		for j := len(s); j >= 0; j-- {
			switch {
			case i == len(pattern):
				table[i][j] = j == len(s)
			case pattern[i] == '*':
				table[i][j] = table[i+1][j] || j < len(s) && table[i][j+1]
			default:
				table[i][j] = j < len(s) && (pattern[i] == '?' || pattern[i] == s[j]) && table[i+1][j+1]
			}
		}
	}
	return table[0][0]
}

func FuzzMatch(f *testing.F) {
	seeds := [][2]string{
		{"", ""},
		{"*", ""},
		{"/usr/lib*/**", "/usr/lib/x86_64-linux-gnu/p11.so"},
		{"/usr/lib*/*", "/usr/lib"},
		{"*a*b?c*", "aabbcabxc"},
		{"**?**", "a"},
		{"a*a*a*b", "aaaaaaaaaa"},
		{"?\xff*", "é\xff"},
	}
	yes := 0
	for _, s := range seeds {
		f.Add(s[0], s[1])
		if matchesTable(s[0], s[1]) {
			yes++
		}
	}
	if yes == 0 || yes == len(seeds) {
		f.Fatal("the seeds have one answer only")
	}
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 200 || len(s) > 1000 {
			return
		}
		if got, want := Match(pattern, s), matchesTable(pattern, s); got != want {
			t.Errorf("Match(%q, %q) = %v, want %v", pattern, s, got, want)
		}
		if !Match("*"+pattern, "x"+pattern) || !Match(strings.Repeat("?", len(s))+"*", s) {
			t.Errorf("a pattern of %q does not match what it was made of", s)
		}
	})
}
