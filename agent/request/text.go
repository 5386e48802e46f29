package request

import (
	"unicode/utf8"

	"p11-agent/pinentry"
)

const (
	// MaxField bounds what is kept of one text that came from outside, in bytes,
	// and MaxReason what is of an error.
	MaxField, MaxReason = 256, 1024
)

// Visible makes a text fit for the log and for lists: printable, and of so many
// bytes at the most.
func Visible(s string, limit int) string {
	const more = "…"
	plain := len(s) <= limit
	for i := 0; plain && i < len(s); i++ {
		plain = s[i] >= ' ' && s[i] < 0x7f
	}
	if plain {
		return s
	}
	if s = pinentry.Visible(s, false); len(s) <= limit {
		return s
	}
	end := limit - len(more)
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + more
}
