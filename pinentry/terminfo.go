package pinentry

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// A terminalKind has the abilities of a kind of terminal, by terminfo(5).
type terminalKind struct {
	cursor bool // programs can move the cursor, which is what drawing needs
	colors int  // how many it shows; 0: none
}

// maxTerminfo is the most bytes of a description (term(5)).
const maxTerminfo = 32768

// lookUpTerminal reads the description of a kind of terminal. It looks in the directory of the
// first letter of its name, and of the number of that letter. ok tells whether there is a
// description.
func lookUpTerminal(name string) (kind terminalKind, ok bool) {
	if name == "" || strings.ContainsRune(name, '/') {
		return kind, false
	}
	dirs := []string{os.Getenv("TERMINFO"), filepath.Join(os.Getenv("HOME"), ".terminfo"), "/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"}
	for _, dir := range dirs {
		if !filepath.IsAbs(dir) {
			continue
		}
		for _, letter := range []string{name[:1], fmt.Sprintf("%x", name[0])} {
			f, err := os.Open(filepath.Join(dir, letter, name))
			if err != nil {
				continue
			}
			b, err := io.ReadAll(io.LimitReader(f, maxTerminfo))
			_ = f.Close()
			if err == nil {
				return parseTerminfo(b)
			}
		}
	}
	return kind, false
}

// The magic numbers of term(5): numbers have 16 bits, or 32.
const (
	terminfoShort = 0o432
	terminfoLong  = 0o1036
)

// The places of the capabilities among the numbers and strings (term.h of ncurses).
const (
	maxColors     = 13
	cursorAddress = 10
)

// parseTerminfo reads a compiled description as term(5) describes it.
func parseTerminfo(b []byte) (kind terminalKind, ok bool) {
	short := func(at int) int {
		if at < 0 || at+2 > len(b) {
			return -1
		}
		return int(int16(binary.LittleEndian.Uint16(b[at:])))
	}
	magic, names, booleans, numbers, strs := short(0), short(2), short(4), short(6), short(8)
	size := map[int]int{terminfoShort: 2, terminfoLong: 4}[magic]
	if size == 0 || len(b) < 12 || names < 0 || booleans < 0 || numbers < 0 || strs < 0 {
		return kind, false
	}
	at := 12 + names + booleans
	at += at % 2
	if at+numbers*size+strs*2 > len(b) {
		return kind, false
	}
	if numbers > maxColors {
		if size == 2 {
			kind.colors = short(at + maxColors*size)
		} else {
			kind.colors = int(int32(binary.LittleEndian.Uint32(b[at+maxColors*size:])))
		}
		kind.colors = max(kind.colors, 0) // negative: it has none, or does not say
	}
	kind.cursor = strs > cursorAddress && short(at+numbers*size+cursorAddress*2) >= 0
	return kind, true
}

// canDraw tells whether a full-screen program can draw on a kind of terminal. It is true for a kind
// without a description here: the program may know better.
func canDraw(name string) bool {
	kind, ok := lookUpTerminal(name)
	return kind.cursor || !ok && name != "" && name != "dumb"
}

// HasColor tells whether a kind of terminal, as TERM names it, shows colours. It is true for a kind
// without a description here, as such kinds are newer than the descriptions.
func HasColor(name string) bool {
	kind, ok := lookUpTerminal(name)
	return kind.colors > 0 || !ok && name != "" && name != "dumb"
}
