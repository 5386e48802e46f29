package pinentry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/proctest"
	"p11-agent/agent/peer/terminaltest"
)

// linePromptTest is the argument that makes this test the program of LinePrompt.
const linePromptTest = "plain-test"

// A person sees what is written to the terminal, and types.
type person struct {
	t   *testing.T
	far *os.File

	mu   sync.Mutex
	seen bytes.Buffer
}

func newPerson(t *testing.T, far *os.File) *person {
	p := &person{t: t, far: far}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 256)
		for {
			n, err := far.Read(b)
			p.mu.Lock()
			p.seen.Write(b[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { _ = far.Close(); <-done })
	return p
}

func (p *person) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.String()
}

// types waits for a text to be shown after what was seen so far, and types an answer.
func (p *person) types(after, answer string) {
	p.t.Helper()
	proctest.Until(p.t, after, func() bool { return strings.HasSuffix(p.text(), after) })
	p.mu.Lock()
	p.seen.Reset()
	p.mu.Unlock()
	if _, err := p.far.WriteString(answer); err != nil {
		p.t.Error(err)
	}
}

// plainStage is a place with a terminal that nothing can be drawn on, a pinentry that
// would draw, and no pinentry-tty.
func plainStage(t *testing.T) (*stage, *person) {
	t.Helper()
	s := newStage(t, "three-ok")
	if err := os.Remove(filepath.Join(s.dir, "pinentry-tty")); err != nil {
		t.Fatal(err)
	}
	s.LinePrompt = []string{"pinentry.test", linePromptTest}
	far, _ := terminaltest.New(t)
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", must(unix.IoctlGetInt(int(far.Fd()), unix.TIOCGPTN))), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	s.place.TTY = tty
	fd := must(unix.FcntlInt(far.Fd(), unix.F_DUPFD_CLOEXEC, 0))
	if err := unix.SetNonblock(fd, true); err != nil { // a read ends with the test
		t.Fatal(err)
	}
	s.place.TTYType = "dumb"
	return s, newPerson(t, os.NewFile(uintptr(fd), "far"))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestLinePromptPIN(t *testing.T) {
	s, person := plainStage(t)
	before := must(unix.IoctlGetTermios(int(s.place.TTY.Fd()), unix.TCGETS))
	d := s.open(t.Context())
	prompt := Prompt{Title: "p11-agent", Description: "Enter the PIN\nToken: 100% \x1b[2J", Label: "PIN:"}
	for _, want := range []string{"123456", "12%34 ü", strings.Repeat("x", MaxPIN)} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			person.types("PIN: ", want+"\n")
		}()
		pin, err := d.PIN(t.Context(), prompt)
		if err != nil {
			t.Fatal(err)
		}
		<-done
		if got := string(pin.Bytes()); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		pin.Wipe()
		prompt.Error = "Wrong PIN."
	}
	_, err := answered(person, "PIN: ", "\x04", func() (bool, error) {
		pin, err := d.PIN(t.Context(), prompt)
		pin.Wipe()
		return false, err
	})
	if !errors.Is(err, ErrCancelled) {
		t.Errorf("Ctrl-D: %v", err)
	}
	noSecret(t, "the terminal", strings.ReplaceAll(person.text(), "100%", ""))
	if after := must(unix.IoctlGetTermios(int(s.place.TTY.Fd()), unix.TCGETS)); *after != *before {
		t.Errorf("the terminal was %+v and is %+v", before, after)
	}
}

// answered calls ask, and types the answer of a person.
func answered(p *person, after, text string, ask func() (bool, error)) (bool, error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.types(after, text)
	}()
	yes, err := ask()
	<-done
	return yes, err
}

func TestLinePromptConfirm(t *testing.T) {
	s, person := plainStage(t)
	d := s.open(t.Context())
	prompt := Prompt{Description: "Allow it?", OK: "Allow _once", Cancel: "_Deny__", Other: "_Other"}
	for typed, want := range map[string]bool{"y\n": true, "YES\n": true, "n\n": false, "\x04": false} {
		yes, err := answered(person, "Allow once (y), Deny_ (n)? ", typed, func() (bool, error) { return d.Confirm(t.Context(), prompt) })
		if yes != want || err != nil {
			t.Errorf("%q: %v, %v", typed, yes, err)
		}
	}
	if choice, err := d.Choose(t.Context(), Prompt{Description: "x", Other: "y", Timeout: time.Second}); choice != ChoiceCancel || !errors.Is(err, ErrTimeout) {
		t.Errorf("no answer: %v, %v", choice, err)
	}
	if _, err := answered(person, "Press Enter. ", "\n", func() (bool, error) { return true, d.Message(t.Context(), prompt) }); err != nil {
		t.Errorf("a message: %v", err)
	}
	yes, err := answered(person, "Allow once (y), Deny_ (n)? ", "maybe\n?\n1\n", func() (bool, error) { return d.Confirm(t.Context(), prompt) })
	if yes || err != nil {
		t.Errorf("neither yes nor no: %v, %v", yes, err)
	}
}

// When the agent takes a question back, the terminal is as before.
func TestLinePromptTakenBack(t *testing.T) {
	s, person := plainStage(t)
	before := must(unix.IoctlGetTermios(int(s.place.TTY.Fd()), unix.TCGETS))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		person.types("PIN: ", "12")
		cancel()
	}()
	pin, err := s.open(t.Context()).PIN(ctx, Prompt{Description: "x", Label: "PIN:"})
	pin.Wipe()
	<-done
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if after := must(unix.IoctlGetTermios(int(s.place.TTY.Fd()), unix.TCGETS)); *after != *before {
		t.Errorf("the terminal was %+v and is %+v", before, after)
	}
}
