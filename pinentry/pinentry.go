// Package pinentry asks a person for a PIN, for yes or no, or to do something with a card. It
// runs a pinentry program (of GnuPG or compatible) or an SSH_ASKPASS program at the place where
// the person is: a terminal or a display.
//
// It promises that
//   - a PIN goes from the program's pipe into a [secret.Secret] and nowhere else. No string,
//     log, error or argument list ever holds it, and the memory in between is locked and
//     wiped;
//   - every call that waits for a person ends with its context. Then the program is gone, its
//     terminal usable again and its process reaped. That takes at most the two seconds that
//     the program gets for leaving by itself;
//   - text is shown as text. Text of a token or another process cannot issue commands, move
//     the cursor or pass for something else by control characters. A long text does not keep
//     the dialogue from appearing;
//   - the program gets an environment of its own, not the agent's, and never the permission
//     to keep a PIN in a password manager;
//   - a prompt appears on a terminal only while the terminal is in line mode before the
//     question, and as long as its Place allows it. Another program that reads from the
//     terminal would get part of the PIN;
//   - it never asks again by itself once a person has answered.
//
// Callers decide what to ask, when and for whom, at which place, which place is next, and what
// a PIN is good for.
package pinentry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPIN is the most bytes that a PIN may have. Tokens take much less. A longer text is a slip of
// the clipboard, which no token should see.
const MaxPIN = 255

// The errors without an answer. Compare with errors.Is.
var (
	// ErrCancelled says that the person closed the dialogue without an answer.
	ErrCancelled = errors.New("the prompt was cancelled")
	// ErrTimeout says that no answer came within the Timeout of the Prompt.
	ErrTimeout = errors.New("the prompt was not answered in time")
	// ErrEmpty says that the person confirmed without typing a PIN.
	ErrEmpty = errors.New("no PIN was typed")
	// ErrNoPrompt says that no program was able to ask at the place. The error lists the
	// programs.
	ErrNoPrompt = errors.New("there is no way to ask here")
	// ErrClosed says that the Dialogue was closed before there was an answer.
	ErrClosed = errors.New("the dialogue was closed")
)

// A Pinentry opens dialogues. Set its fields before the first use, and leave them alone afterwards.
// Any goroutine may call its methods. A terminal or a display shows one dialogue at a time: a
// request waits until those before it are answered.
//
// Path, Home and Askpass say which programs run. They come from the agent's own configuration and
// environment, never from those of a client.
type Pinentry struct {
	// Program is an absolute path, or a name of a program in Path. Empty means "pinentry".
	Program string
	// Askpass is the program for places that want it (SSH_ASKPASS of ssh(1)): a path or a
	// name, as for Program. Empty means none.
	Askpass string
	// Path is the PATH in which programs are looked for, and which they get.
	Path string
	// Home is the HOME that the programs get.
	Home string
	// LinePrompt has the arguments with which this program runs the function [LinePrompt],
	// its name first. Empty means that it does not. Then pinentry-tty asks on terminals
	// that nothing can be drawn on.
	LinePrompt []string
	// NoGrab leaves keyboard and mouse to other windows while the dialogue is open.
	// Otherwise a graphical pinentry grabs them.
	NoGrab bool
	// Log gets a line when a program cannot ask and the next one does. nil discards it.
	Log *slog.Logger

	turns turns
	later atomic.Pointer[settings] // of Configure
}

// settings may change while the program runs.
type settings struct {
	program string
	noGrab  bool
}

// Configure sets Program and NoGrab for later dialogues. Any goroutine may call it.
func (p *Pinentry) Configure(program string, noGrab bool) { p.later.Store(&settings{program, noGrab}) }

func (p *Pinentry) settings() settings {
	if s := p.later.Load(); s != nil {
		return *s
	}
	return settings{p.Program, p.NoGrab}
}

// A Place is where a person is asked. An empty field is unknown or does not exist. All of it may
// come from the environment of a client.
type Place struct {
	Display        string // DISPLAY
	WaylandDisplay string // WAYLAND_DISPLAY
	XAuthority     string // XAUTHORITY
	DBusAddress    string // DBUS_SESSION_BUS_ADDRESS
	RuntimeDir     string // XDG_RUNTIME_DIR
	// TTY is a terminal, open for reading and writing. The caller keeps it open until the
	// Dialogue is closed, and closes it. The program inherits the file, and gets a name
	// that leads to that very file. So no other process can put another file there.
	TTY     *os.File
	TTYType string // TERM
	// Check returns nil if a prompt may appear on the TTY. Dialogue calls it before each
	// question and all the while the prompt is there. An error says what is in the way,
	// and ends the prompt at once. Several goroutines call Check. It does not wait. nil
	// allows prompts always.
	Check func() error
	// Askpass runs Pinentry.Askpass in place of Program.
	Askpass bool
	// Locale is the language and encoding of the person: LC_ALL, LC_MESSAGES or
	// LANG. Text is UTF-8, even if the locale has another encoding.
	Locale string
	// UserData is PINENTRY_USER_DATA, for programs that choose by it.
	UserData string
}

// A Prompt is what the person sees. Description and Error may have newlines. Control characters
// become escapes such as \x1b. A long text is cut and ends in an ellipsis, so put the important
// words first. The limit is some 990 bytes, in which each newline and percent sign counts as three.
type Prompt struct {
	Title       string // of the window; a terminal does not show it
	Description string // the question, with the client and the reason
	Label       string // before the input field
	Error       string // the fault of the last answer
	// OK and Cancel are the texts of the buttons. Empty means pinentry's own texts. An
	// underscore marks the letter that presses the button. A double underscore shows as one.
	OK, Cancel string
	// Other is the text of a third button, which only Choose shows.
	Other string
	// Timeout is how long the dialogue waits for an answer, rounded up to seconds. 0 means
	// as long as the context lasts.
	Timeout time.Duration
}

// withError returns the description with the error in it, for programs that show no error by
// itself. The first line stays the first: it says what is asked for. The error comes right below,
// as a long text loses its end.
func (p *Prompt) withError() string {
	if p.Error == "" {
		return p.Description
	}
	first, rest, more := strings.Cut(p.Description, "\n")
	text := strings.TrimPrefix(first+"\n"+p.Error, "\n")
	if more {
		text += "\n" + rest
	}
	return text
}

// Open makes a program ready to ask at place. The error is ErrNoPrompt if no program can start, or
// the error of ctx. The Dialogue outlives ctx. The caller closes it.
func (p *Pinentry) Open(ctx context.Context, place Place) (*Dialogue, error) {
	if place.TTY != nil && !isTerminal(place.TTY) {
		place.TTY = nil // pinentry-curses would read from it for ever
	}
	d := &Dialogue{p: p, place: place, turn: make(chan struct{}, 1)}
	d.way = d.first()
	d.ctx, d.cancel = context.WithCancelCause(context.Background())
	if err := d.open(ctx); err != nil {
		d.cancel(nil)
		return nil, err
	}
	return d, nil
}

// environment returns the environment of a program.
func (p *Pinentry) environment(place Place) []string {
	// It is never empty: then the program would inherit the agent's environment.
	env := []string{"LC_CTYPE=" + place.ctype()}
	for _, v := range []struct{ name, value string }{
		{"PATH", p.Path},
		{"HOME", p.Home},
		{"LANG", place.Locale},
		{"DISPLAY", place.Display},
		{"WAYLAND_DISPLAY", place.WaylandDisplay},
		{"XAUTHORITY", place.XAuthority},
		{"DBUS_SESSION_BUS_ADDRESS", place.DBusAddress},
		{"XDG_RUNTIME_DIR", place.RuntimeDir},
		{"GPG_TTY", place.ttyName()},
		{"TERM", place.TTYType},
		{"PINENTRY_USER_DATA", place.UserData},
	} {
		if v.value != "" {
			env = append(env, v.name+"="+v.value)
		}
	}
	return env
}

// find returns the file of a program: program itself if it is an absolute path, or else the first
// executable of that name in Path.
func (p *Pinentry) find(program string) (string, error) {
	if filepath.IsAbs(program) {
		return program, nil
	}
	if strings.ContainsRune(program, filepath.Separator) {
		return "", fmt.Errorf("%q is neither an absolute path nor a name", program)
	}
	for _, dir := range filepath.SplitList(p.Path) {
		if !filepath.IsAbs(dir) {
			continue
		}
		file := filepath.Join(dir, program)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%q is not in the agent's PATH %q", program, p.Path)
}

// fallbackCtype is the one UTF-8 locale that is installed everywhere.
const fallbackCtype = "C.UTF-8"

// ctype returns the locale of the encoding, which is always UTF-8. pinentry-curses shows no
// dialogue when it cannot convert a text (error 166).
func (p Place) ctype() string {
	_, encoding, _ := strings.Cut(p.Locale, ".")
	encoding, _, _ = strings.Cut(encoding, "@")
	switch strings.ToLower(encoding) {
	case "utf-8", "utf8":
		return p.Locale
	}
	return fallbackCtype
}

// ttyName returns the name of the terminal for the program: the first file that it inherits after
// the standard three. The name is right for a child of the program as well, as many a pinentry is a
// script.
func (p Place) ttyName() string {
	if p.TTY == nil {
		return ""
	}
	return "/proc/self/fd/3"
}

// spots names the terminal and the displays: a single dialogue uses each at a time. A
// terminal has many names, so spots takes its device number. Each container numbers its
// pseudo-terminals anew.
func (p Place) spots() []string {
	var spots []string
	if p.TTY != nil {
		tty := "terminal " + p.TTY.Name()
		if st, err := p.TTY.Stat(); err == nil {
			if sys, ok := st.Sys().(*syscall.Stat_t); ok {
				tty = fmt.Sprintf("terminal %d", sys.Rdev)
				if major := unix.Major(sys.Rdev); major >= 136 && major <= 143 {
					tty += fmt.Sprintf(" of %d", sys.Dev)
				}
			}
		}
		spots = append(spots, tty)
	}
	if p.WaylandDisplay != "" {
		spots = append(spots, "wayland "+p.RuntimeDir+"/"+p.WaylandDisplay)
	}
	if p.Display != "" {
		spots = append(spots, "x11 "+p.Display)
	}
	return spots
}

// turns hands out spots. The zero value is ready to use.
type turns struct {
	mu sync.Mutex
	// taken holds for each spot in use a channel that is closed when it is free.
	taken map[string]chan struct{}
}

// wait takes all spots at once, or none: no dialogue holds one spot while it waits for another.
// release gives the spots back.
func (t *turns) wait(ctx context.Context, spots []string) (release func(), err error) {
	for {
		t.mu.Lock()
		i := slices.IndexFunc(spots, func(s string) bool { return t.taken[s] != nil })
		if i < 0 {
			if t.taken == nil {
				t.taken = make(map[string]chan struct{})
			}
			free := make(chan struct{})
			for _, s := range spots {
				t.taken[s] = free
			}
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				for _, s := range spots {
					delete(t.taken, s)
				}
				close(free)
			}, nil
		}
		free := t.taken[spots[i]]
		t.mu.Unlock()
		select {
		case <-free:
		case <-ctx.Done():
			return nil, ended(ctx)
		}
	}
}

// ended returns the error for a context that has ended.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if cause == ErrTimeout || cause == ErrClosed || errors.Is(cause, ErrNoPrompt) {
		return cause
	}
	return fmt.Errorf("stopped asking: %w", ctx.Err())
}
