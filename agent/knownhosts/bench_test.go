package knownhosts

import (
	"path/filepath"
	"strings"
	"testing"
)

// BenchmarkLookup is what naming a host costs each login: a name that is there as it
// is, and one that is there as a hash and that nobody guesses.
func BenchmarkLookup(b *testing.B) {
	const hashed = "|1|Yv5T1yXkB1Zp0kF3l7l0rGmJ1bA=|0Q4WJ8n0dC0d3Z0cW6o8m0h1d2M=" // nobody guesses it
	for _, name := range []string{"example.org", hashed} {
		b.Run(name[:3], func(b *testing.B) {
			key := newSigner(b).PublicKey()
			var text strings.Builder
			for range 500 {
				text.WriteString(line("other.example.org", newSigner(b).PublicKey()))
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
