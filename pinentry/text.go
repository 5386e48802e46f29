package pinentry

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxText bounds what one text of a Prompt costs to process; far less is shown.
const maxText = 4096

// Visible makes text fit to be shown: what does not print is shown as an escape
// (this includes what reverses the direction of writing or has no width),
// invalid UTF-8 as U+FFFD, and newlines as blanks unless lines is true.
func Visible(text string, lines bool) string {
	if len(text) > maxText {
		text = text[:maxText] // a rune cut in two shows as U+FFFD, and is cut later on
	}
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

const ellipsis = "…"

// appendEscaped appends text to line as Assuan takes it, with %, CR and LF
// escaped. It keeps line within limit bytes (with room for an ellipsis at
// least): a longer text is cut between two characters and ends in an ellipsis.
func appendEscaped(line []byte, text string, limit int) []byte {
	cut := len(line)
	for len(text) > 0 {
		_, size := utf8.DecodeRuneInString(text)
		for _, c := range []byte(text[:size]) {
			switch c {
			case '%', '\r', '\n':
				line = fmt.Appendf(line, "%%%02X", c)
			default:
				line = append(line, c)
			}
		}
		if len(line) > limit {
			return append(line[:cut], ellipsis...)
		}
		if len(line) <= limit-len(ellipsis) {
			cut = len(line)
		}
		text = text[size:]
	}
	return line
}

// unescape decodes the percent escapes of b in place and returns the part of b
// that holds the result. The rest of b is left as it was.
func unescape(b []byte) ([]byte, error) {
	n := 0
	for i := 0; i < len(b); i++ {
		c := b[i]
		if c == '%' {
			if i+2 >= len(b) {
				return nil, errMalformed
			}
			hi, ok1 := unhex(b[i+1])
			lo, ok2 := unhex(b[i+2])
			if !ok1 || !ok2 {
				return nil, errMalformed
			}
			c = hi<<4 | lo
			i += 2
		}
		b[n] = c
		n++
	}
	return b[:n], nil
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
