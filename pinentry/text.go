package pinentry

import (
	"fmt"
	"unicode/utf8"
)

const ellipsis = "…"

// appendEscaped appends text to line in Assuan's form, with %, CR and LF escaped. It keeps line
// within limit bytes, which must leave room for an ellipsis. A longer text is cut between two
// characters and ends in an ellipsis.
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

// unescape decodes the percent escapes of b in place. It returns the part of b that holds the
// result, and leaves the rest alone.
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
