package pinentry

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
)

func TestCheckDisplay(t *testing.T) {
	abstract, err := net.Listen("unix", fmt.Sprintf("@/tmp/.X11-unix/X%d", os.Getpid()%20000+20000))
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	number := strings.TrimPrefix(abstract.Addr().String(), "@/tmp/.X11-unix/X")
	dir := t.TempDir()
	file, err := net.Listen("unix", filepath.Join(dir, "x:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	wayland, err := net.Listen("unix", filepath.Join(dir, "wayland-7"))
	if err != nil {
		t.Fatal(err)
	}
	defer wayland.Close()
	for _, tt := range []struct {
		name  string
		place Place
		ok    bool
	}{
		{"no display", Place{}, true},
		{"abstract", Place{Display: ":" + number}, true},
		{"with a screen", Place{Display: "unix:" + number + ".0"}, true},
		{"a path", Place{Display: filepath.Join(dir, "x:0")}, true},
		{"no display", Place{Display: ":19999"}, false},
		{"no display at a host", Place{Display: "127.0.0.1:59000"}, false}, // TCP port 65000
		{"no number", Place{Display: ":x"}, false},
		{"no colon", Place{Display: "here"}, false},
		{"too large", Place{Display: ":70000"}, false},
		{"a compositor", Place{WaylandDisplay: "wayland-7", RuntimeDir: dir}, true},
		{"its path", Place{WaylandDisplay: filepath.Join(dir, "wayland-7")}, true},
		{"no such compositor", Place{WaylandDisplay: "wayland-8", RuntimeDir: dir}, false},
		{"no runtime directory", Place{WaylandDisplay: "wayland-7"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := errors.Join(tt.place.CheckDisplay(t.Context()), tt.place.CheckWayland(t.Context()))
			if (err == nil) != tt.ok {
				t.Errorf("got %v, want success: %v", err, tt.ok)
			}
		})
	}
}

func TestCheckTerminal(t *testing.T) {
	master, near := terminaltest.New(t)
	tty := near.Name()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name          string
		tty, kind     string
		columns, rows uint16
		want          error
		text          string
	}{
		{name: "large enough", tty: tty, kind: "xterm", columns: MinColumns, rows: MinRows},
		{name: "without a size", tty: tty, kind: "xterm"},
		{name: "too narrow", tty: tty, kind: "xterm", columns: MinColumns - 1, rows: MinRows, want: ErrTooSmall},
		{name: "too low", tty: tty, kind: "xterm", columns: MinColumns, rows: MinRows - 1, want: ErrTooSmall},
		{name: "unknown kind", tty: tty, kind: "nonsense", columns: 80, rows: 24, want: ErrTTYType},
		{name: "no kind", tty: tty, columns: 80, rows: 24, want: ErrTTYType},
		{name: "a path for a kind", tty: tty, kind: "../x/xterm", columns: 80, rows: 24, want: ErrTTYType},
		{name: "none", want: ErrNoTerminal},
		{name: "a file", tty: file, kind: "xterm", text: "not a terminal"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			size := &unix.Winsize{Col: tt.columns, Row: tt.rows}
			if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, size); err != nil {
				t.Fatal(err)
			}
			place := Place{TTYType: tt.kind}
			if tt.tty != "" {
				f, err := os.OpenFile(tt.tty, os.O_RDWR|unix.O_NOCTTY, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				place.TTY = f
			}
			err := place.CheckTerminal()
			switch {
			case tt.text != "":
				if err == nil || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got %v, want something with %q", err, tt.text)
				}
			case !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil):
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
			t.Fatal(err)
		}
		return file
	}
	const talk = `echo OK
while read -r word rest; do
	echo "$word $rest" >>` + "LOG" + `
	case $word in
	GETINFO) echo "D FLAVOR" ;;
	BYE) echo OK; exit ;;
	esac
	echo OK
done
`
	log := filepath.Join(dir, "log")
	of := func(flavor string) string {
		return script(strings.ReplaceAll(flavor, ":", "-"), strings.NewReplacer("LOG", log, "FLAVOR", flavor).Replace(talk))
	}
	for _, tt := range []struct {
		name, program, flavor string
		terminal              bool
		want                  string // of the error
	}{
		{name: "curses", program: of("curses"), flavor: "curses", terminal: true},
		{name: "windows", program: of("gtk2"), flavor: "gtk2"},
		{name: "windows that cannot be", program: of("gtk2:curses"), flavor: "gtk2:curses", terminal: true},
		{name: "old", program: script("old", "echo OK\nwhile read -r w r; do case $w in GETINFO) echo ERR 536871187 Unknown;; *) echo OK;; esac; done")},
		{name: "dies", program: script("dies", "echo no display >&2; exit 1"), want: "no display"},
		{name: "talks nonsense", program: script("nonsense", "echo Hello\ncat >/dev/null"), want: "malformed line"},
		{name: "none", program: "/no/such/program", want: "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &Pinentry{Program: tt.program, Path: os.Getenv("PATH")}
			got, err := p.Probe(t.Context(), Place{})
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want something with %q", err, tt.want)
				}
				return
			}
			if err != nil || got.File != tt.program || got.Flavor != tt.flavor || got.Terminal() != tt.terminal {
				t.Errorf("got %+v, terminal %v, %v", got, got.Terminal(), err)
			}
		})
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"GETPIN", "CONFIRM", "MESSAGE"} {
		if strings.Contains(string(b), word) {
			t.Errorf("it was asked to show something: %s", b)
		}
	}
}
