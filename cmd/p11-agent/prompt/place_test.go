package prompt

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer"
	"p11-agent/agent/peer/terminaltest"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
	"p11-agent/pinentry/waiting"
)

// newTerminal returns the far end of a new terminal, and its name.
func newTerminal(t *testing.T) (far *os.File, name string) {
	t.Helper()
	far, near := terminaltest.New(t)
	if err := near.Close(); err != nil {
		t.Fatal(err)
	}
	return far, near.Name()
}

// A terminal that is known by its name is used as long as it is the same one.
func TestFixedTerminal(t *testing.T) {
	far, name := newTerminal(t)
	f := fixTerminal(name)
	for range 2 {
		tty, err := f.open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tty.WriteString("x"); err != nil { // what is shown does not make it another
			t.Error(err)
		}
		tty.Close()
	}

	// The number is used again for the next one, by anybody. The clock that tells
	// the two apart ticks every few milliseconds.
	far.Close()
	for range 1000 {
		far, again := newTerminal(t)
		if again == name {
			tty, err := f.open()
			if err == nil {
				tty.Close()
				var st unix.Stat_t
				if unix.Stat(name, &st) == nil && st.Ctim == f.state.change {
					far.Close()
					continue
				}
			}
			if err == nil || !strings.Contains(err.Error(), "is another terminal than") {
				t.Errorf("another terminal with that name: %v", err)
			}
			return
		}
		defer far.Close()
	}
	t.Errorf("no new terminal is called %s", name)
}

func TestFixedTerminalIsNone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"/nonexistent": "no such file", "/dev/null": "is not a terminal", file: "is not a terminal",
	} {
		f := fixTerminal(name)
		if _, err := f.open(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

// A prompt goes on to a client only where a person would see it at another place.
func TestPromptTakes(t *testing.T) {
	const display = ":5"
	here, elsewhere := &location{spot: [2]string{display, ""}}, &location{spot: [2]string{":6", ""}}
	for name, test := range map[string]struct {
		own   peer.Environment
		shown *location
		want  bool
	}{
		"another display":       {peer.Environment{Display: display}, elsewhere, true},
		"the same display":      {peer.Environment{Display: display}, here, false},
		"nowhere":               {peer.Environment{}, elsewhere, false},
		"from no place":         {peer.Environment{Display: display}, &location{}, true},
		"between places":        {peer.Environment{Display: display}, nil, false},
		"from no place to none": {peer.Environment{}, &location{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := &prompter{Asker: &Asker{
				pinentry: new(pinentry.Pinentry), own: test.own, log: slog.New(slog.DiscardHandler),
				manager: func(context.Context) ([]string, error) { return nil, errors.New("none") },
			}}
			c.shown.Store(test.shown)
			forwarded := &request.Caller{Forwarded: true}
			if got := c.takes(waiting.Other{Context: forwarded.Context(t.Context())}); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
}
