// Package plain makes text from outside safe to show: labels of tokens, names of programs,
// output of modules, answers of other agents. Such a text must not control a terminal, start
// a line of its own, reverse the direction of writing, or pass for something else.
//
// Each function names the place that the text is for. Limits count bytes, unless the name of
// the function says runes. The functions are pure and keep nothing. They take any bytes,
// valid UTF-8 or not. How a text is encoded for a protocol is left to the protocol's package.
package plain

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxText is the most bytes of a text that Line and Lines read. A person is shown far less.
const maxText = 4096

// ellipsis marks where a text was cut.
const ellipsis = "…"

// Line returns text for a line of a terminal, a prompt or a list. A character that does not
// print becomes an escape such as \x1b. So does a character without width, or one that
// reverses the direction of writing. Line breaks and tabs become blanks, and invalid UTF-8
// becomes U+FFFD. Line leaves out all text after the first 4096 bytes. Line of its result is
// the same.
func Line(text string) string { return escape(text[:min(len(text), maxText)], false) }

// Lines does the same as Line and keeps line breaks.
func Lines(text string) string { return escape(text[:min(len(text), maxText)], true) }

// LineWithin returns text as Line does, in at most limit bytes, for a log or a prompt. A
// longer text ends in an ellipsis. The limit is at least 3.
func LineWithin(text string, limit int) string {
	if isASCII(text) && len(text) <= limit { // as most are
		return text
	}
	// No escape is shorter than what it stands for, so the result needs no more.
	text = text[:min(len(text), limit+utf8.UTFMax)]
	return Shorten(escape(text, false), limit)
}

// LineWithinRunes returns text as Line does, in at most limit runes, for a notification. A
// longer text ends in an ellipsis.
func LineWithinRunes(text string, limit int) string {
	line := Line(text)
	if utf8.RuneCountInString(line) <= limit {
		return line
	}
	n := 0
	for i := range line {
		if n == limit-1 {
			return line[:i] + ellipsis
		}
		n++
	}
	return line
}

// isASCII tells whether a text has only printable ASCII and blanks.
func isASCII(text string) bool {
	for i := range len(text) {
		if text[i] < ' ' || text[i] >= 0x7f {
			return false
		}
	}
	return true
}

func escape(text string, lines bool) string {
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '\n' && lines:
			b.WriteByte('\n')
		case r == '\n' || r == '\t':
			b.WriteByte(' ')
		case unicode.IsGraphic(r):
			b.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	return b.String()
}

// Output returns a line that another program printed, for a log or an error. Each character
// that does not print, and each invalid byte, becomes a question mark. Blanks at both ends go.
// Programs print whole escape sequences: with Line, a reader would see more escapes than words.
func Output[T string | []byte](line T) string {
	return strings.TrimSpace(replace(string(line), '?'))
}

// Comment returns the comment that another agent gives a key, in at most limit bytes. Each
// character that does not print, and each invalid byte, becomes U+FFFD. A longer comment is
// cut without a mark: the comment is passed on to clients, which compare it.
func Comment(comment []byte, limit int) string {
	return Cut(replace(string(comment), utf8.RuneError), limit)
}

// replace puts by in the place of each rune that does not print and of each invalid byte.
func replace(text string, by rune) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return by
		}
		return r
	}, text)
}

// Program returns the name of a program for a chain of programs such as "ssh ← git", in at
// most limit bytes. A character that does not print becomes an escape, and so do a backslash,
// an invalid byte and the arrow of the chain. A longer name ends in an ellipsis. An empty
// name becomes a question mark.
func Program[T string | []byte](name T, limit int) string {
	rest := []byte(name)
	var b strings.Builder
	cut := 0 // where the name can be cut with room for the ellipsis
	for len(rest) > 0 && b.Len() <= limit {
		if b.Len() <= limit-len(ellipsis) {
			cut = b.Len()
		}
		r, size := utf8.DecodeRune(rest)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, rest[0])
		case r == '\\':
			b.WriteString(`\\`)
		case !unicode.IsPrint(r) || r == '←':
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		default:
			b.WriteRune(r)
		}
		rest = rest[size:]
	}
	switch {
	case b.Len() == 0:
		return "?"
	case b.Len() > limit || len(rest) > 0:
		return b.String()[:cut] + ellipsis
	}
	return b.String()
}

// Name returns a label, a name or a comment for a prompt. The name stays as it is if it can
// pass for nothing else, and is quoted otherwise. A name of several words is quoted if it has
// punctuation of the prompt, and a name with more than single blanks is quoted as well: a
// terminal breaks lines, so that what follows enough blanks looks like another line. A name
// of more than limit bytes is cut first, and ends in an ellipsis.
func Name(name string, limit int) string {
	cut := name
	if len(name) > limit {
		cut = Cut(name, limit) + ellipsis
	}
	words := strings.Fields(cut)
	odd := func(r rune) bool {
		return !unicode.IsGraphic(r) || strings.ContainsRune(`"\\←`, r) || len(words) > 1 && strings.ContainsRune(":(),", r)
	}
	if cut != strings.Join(words, " ") || !utf8.ValidString(cut) || strings.ContainsFunc(cut, odd) {
		return strconv.Quote(cut)
	}
	return cut
}

// QuotedName returns a label or a name in quotes, for the middle of a sentence of a prompt.
// The text between the quotes has at most limit bytes, escapes included, and cannot end the
// quotes. A longer name ends in an ellipsis.
func QuotedName(name string, limit int) string {
	if q := strconv.Quote(name); len(q) <= limit+2 {
		return q
	}
	cut := name[:min(len(name), limit)]
	for {
		_, size := utf8.DecodeLastRuneInString(cut)
		cut = cut[:len(cut)-size]
		if q := strconv.Quote(cut + ellipsis); len(q) <= limit+2 {
			return q
		}
	}
}

// HostName returns the name of a host or a user for a prompt or a log. The name stays as it
// is if it consists of what such names consist of. Otherwise it is quoted in ASCII, as letters
// of other scripts look like those of another host. Only the first limit bytes are shown.
func HostName(name string, limit int) string {
	odd := func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && !strings.ContainsRune("._-@+:[]$\\*?", r)
	}
	switch {
	case name == "":
		return `""`
	case len(name) > limit:
		return strconv.QuoteToASCII(name[:limit]) + "..."
	case strings.IndexFunc(name, odd) >= 0:
		return strconv.QuoteToASCII(name)
	}
	return name
}

// Quoted returns a text in quotes, for a log or the description of a request. Only the first
// limit bytes are shown, with dots behind the quotes if there are more.
func Quoted[T string | []byte](text T, limit int) string {
	if len(text) > limit {
		return strconv.Quote(string(text[:limit])) + "..."
	}
	return strconv.Quote(string(text))
}

// Shorten returns a text in at most limit bytes, cut between two characters. A longer text
// ends in an ellipsis. The limit is at least 3.
func Shorten(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return Cut(text, limit-len(ellipsis)) + ellipsis
}

// Cut returns the first limit bytes of a text at most, cut between two characters, without a
// mark.
func Cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	end := limit
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end]
}

// Prints tells whether a text is valid UTF-8 and all of it prints. Of blanks, only the
// ordinary one prints.
func Prints[T string | []byte](text T) bool {
	s := string(text)
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// PrintsASCII tells whether a text is printable ASCII without blanks, as names of hosts are.
func PrintsASCII(text string) bool {
	return isASCII(text) && strings.IndexByte(text, ' ') < 0
}
