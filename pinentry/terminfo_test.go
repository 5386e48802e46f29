package pinentry

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTerminalKinds(t *testing.T) {
	t.Setenv("HOME", "/nonexistent")
	t.Setenv("TERMINFO", "/nonexistent")
	if _, ok := lookUpTerminal("xterm"); !ok {
		if os.Getenv("CI") == "true" {
			t.Fatal("there is no terminfo")
		}
		t.Skip("there is no terminfo")
	}
	for name, want := range map[string]struct{ draws, color bool }{
		"xterm": {true, true}, "xterm-256color": {true, true}, "linux": {true, true},
		"vt100": {true, false}, "dumb": {false, false}, "": {false, false},
		"of-the-future": {true, true}, // unknown here: the program is to find out
	} {
		if got := canDraw(name); got != want.draws {
			t.Errorf("%q: can be drawn on: %v", name, got)
		}
		if got := HasColor(name); got != want.color {
			t.Errorf("%q: has colours: %v", name, got)
		}
	}
	if _, ok := lookUpTerminal("../x/xterm"); ok {
		t.Error("a name is a path")
	}
}

func FuzzTerminfo(f *testing.F) {
	for _, name := range []string{"/lib/terminfo/d/dumb", "/lib/terminfo/x/xterm-256color", "/usr/share/terminfo/x/xterm-256color"} {
		if b, err := os.ReadFile(filepath.Clean(name)); err == nil {
			f.Add(b)
		}
	}
	f.Add([]byte("\x1e\x02\x05\x00\x01\x00\x0e\x00\x0b\x00\x00\x00dumb\x00\x00"))
	f.Add([]byte("\x1a\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, ok := parseTerminfo(b)
		if !ok && kind != (terminalKind{}) || kind.colors < 0 {
			t.Errorf("%+v, %v", kind, ok)
		}
	})
}
