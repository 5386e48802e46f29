package knownhosts

import (
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/agent/sshkey/keytest"
)

// BenchmarkLookup measures what the name of a host costs each login: a plain name, and a
// hashed name that no guess has.
func BenchmarkLookup(b *testing.B) {
	const hashed = "|1|Yv5T1yXkB1Zp0kF3l7l0rGmJ1bA=|0Q4WJ8n0dC0d3Z0cW6o8m0h1d2M=" // no guess has it
	for _, name := range []string{"example.org", hashed} {
		b.Run(name[:3], func(b *testing.B) {
			key := keytest.New(b).Public
			var text strings.Builder
			for range 500 {
				text.WriteString(line("other.example.org", keytest.New(b).Public))
			}
			text.WriteString(line(name, key))
			f := New(write(b, filepath.Join(b.TempDir(), "known_hosts"), text.String()))
			words := strings.Fields(strings.Repeat("Host a.example.org HostName 192.0.2.1 User me Port 22 ", 50))
			b.ReportAllocs()
			for b.Loop() {
				f.Lookup(key, func() []string { return Guesses(words) })
			}
		})
	}
}

// BenchmarkFit measures what a wildcard costs each login, and the most that a wildcard can
// cost.
func BenchmarkFit(b *testing.B) {
	usual := []string{"*.example.org", "*.example.com", "!test.example.org"}
	for _, test := range []struct {
		name, pattern string
		patterns      []string
	}{
		{"usual", "*.example.org", usual},
		{"worst", "*a" + strings.Repeat("?", 60) + "b*", append(usual, "*b"+strings.Repeat("?", 50)+"a*")},
	} {
		b.Run(test.name, func(b *testing.B) {
			k := Known{Names: []string{test.pattern}}
			for b.Loop() {
				k.Fit(test.patterns)
			}
		})
	}
}
