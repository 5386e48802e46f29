// Package pinentry asks a person: for a PIN, for yes or no, or to do something
// with a card. It runs a pinentry program (of GnuPG or compatible) or an
// SSH_ASKPASS program at the place where the person is, a terminal or a display.
//
// It promises that
//   - a PIN goes from the program's pipe into a [secret.Secret] and nowhere else:
//     no string, log, error or argument list ever holds it, and the memory it
//     is read through is locked and wiped;
//   - every call that waits for a person ends with its context, and then the
//     program is gone, its terminal usable again and its process reaped. That
//     takes no longer than the two seconds the program gets for leaving by
//     itself;
//   - text is shown as text: what comes from a token or another process cannot
//     issue commands, move the cursor or pass for something else with control
//     characters, and does not keep the dialogue from appearing by its length;
//   - the program gets an environment made for it, not the agent's own, and
//     never the permission to keep a PIN in a password manager;
//   - a terminal is asked on only while it is in line mode before the question,
//     and for as long as its Place says that it may be: another program that
//     reads from it would get part of the PIN;
//   - nothing is asked again by itself once a person has answered.
//
// It leaves to others what is asked, when and by whom, at which place and which
// one is next when a place is of no use, and what a PIN is good for.
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

// MaxPIN is the most bytes a PIN may have. Tokens take much less; what is
// longer is a slip of the clipboard, and no token should see it.
const MaxPIN = 255

// The answers that are not an answer. Compare with errors.Is.
var (
	// ErrCancelled says that the person closed the dialogue without an answer.
	ErrCancelled = errors.New("the prompt was cancelled")
	// ErrTimeout says that nobody answered within the Timeout of the Prompt.
	ErrTimeout = errors.New("nobody answered the prompt in time")
	// ErrEmpty says that the person confirmed without typing a PIN.
	ErrEmpty = errors.New("no PIN was typed")
	// ErrNoPrompt says that no program was able to ask at the place. The error
	// says what was tried.
	ErrNoPrompt = errors.New("there is no way to ask here")
	// ErrClosed says that the Dialogue was closed before there was an answer.
	ErrClosed = errors.New("the dialogue was closed")
)

// A Pinentry opens dialogues. Its fields are set before the first use and not
// changed afterwards; its methods are safe for concurrent use. Only one
// dialogue is shown at a time on a terminal or a display: a request waits until
// those before it are answered.
//
// Path, Home and Askpass say which programs run. They come from the agent's own
// configuration and environment, never from those of a client.
type Pinentry struct {
	// Program is an absolute path, or a name to be found in Path. Empty means
	// "pinentry".
	Program string
	// Askpass is the program for places that want it, a path or a name as Program
	// is (SSH_ASKPASS of ssh(1)). Empty means none.
	Askpass string
	// Path is the PATH for finding programs, and the one they get.
	Path string
	// Home is the HOME the programs get.
	Home string
	// LinePrompt has the arguments with which this very program runs [LinePrompt], its name
	// first. Empty means that it does not; then pinentry-tty alone asks where nothing
	// can be drawn.
	LinePrompt []string
	// NoGrab leaves keyboard and mouse to other windows while the dialogue is
	// open. Otherwise a graphical pinentry keeps them to itself.
	NoGrab bool
	// Log gets a line when one program is given up for the next. Nil means none.
	Log *slog.Logger

	turns turns
	later atomic.Pointer[settings] // of Configure
}

// settings are what may change while the program runs.
type settings struct {
	program string
	noGrab  bool
}

// Configure sets Program and NoGrab for the dialogues that are opened from now on. It may
// be called from any goroutine.
func (p *Pinentry) Configure(program string, noGrab bool) { p.later.Store(&settings{program, noGrab}) }

func (p *Pinentry) settings() settings {
	if s := p.later.Load(); s != nil {
		return *s
	}
	return settings{p.Program, p.NoGrab}
}

// A Place is where a person is asked. What is empty is unknown or does not
// exist. All of it may come from the environment of a client.
type Place struct {
	Display        string // DISPLAY
	WaylandDisplay string // WAYLAND_DISPLAY
	XAuthority     string // XAUTHORITY
	DBusAddress    string // DBUS_SESSION_BUS_ADDRESS
	RuntimeDir     string // XDG_RUNTIME_DIR
	// TTY is a terminal, open for reading and writing. It stays the caller's, who
	// keeps it open until the Dialogue is closed. The program inherits it and is
	// told of it by a name that leads to that very file, so that nobody can put
	// another one there.
	TTY     *os.File
	TTYType string // TERM
	// Check tells whether the TTY may be asked on, and is called before each
	// question and all the while it is asked; nil means always. An error, which
	// says what is in the way, has the prompt taken away at once. It is called
	// from several goroutines, and does not wait.
	Check func() error
	// Askpass has Pinentry.Askpass asked in place of Program.
	Askpass bool
	// Locale is the language and encoding of the person: LC_ALL, LC_MESSAGES or
	// LANG. Text is UTF-8 whatever the encoding says.
	Locale string
	// UserData is PINENTRY_USER_DATA, for programs that choose by it.
	UserData string
}

// A Prompt is what the person sees. Newlines count in Description and Error;
// control characters are shown as escapes such as \x1b. A text that is too long
// (above some 990 bytes as pinentry is sent them, three for each newline and
// percent sign) is cut and ends in an ellipsis: what matters comes first.
type Prompt struct {
	Title       string // of the window; a terminal does not show it
	Description string // what is asked for, for whom and why
	Label       string // before the field that is typed into
	Error       string // what was wrong with the last answer
	// OK and Cancel are the texts of the buttons, empty for pinentry's own. An
	// underscore marks the letter that presses the button, a double one is one.
	OK, Cancel string
	// Other is the text of a third button, which only Choose shows.
	Other string
	// Timeout is how long the dialogue stays without an answer, rounded up to
	// seconds. 0 means for as long as the context lasts.
	Timeout time.Duration
}

// withError is the description with the error in it, for programs that have no place
// for an error. The first line stays the first: it says what is asked for. A text
// that is too long loses its end, so the error comes right below.
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

// Open gets a program ready to ask at place. The error is ErrNoPrompt when none
// can be started, or that of ctx. The dialogue outlives ctx; it is to be closed.
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

// environment is everything a program gets to know of the place.
func (p *Pinentry) environment(place Place) []string {
	// Never empty, or the program would inherit the agent's own.
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

// find returns the file of a program: itself when the path is absolute, else
// the first executable of that name in Path.
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

// ctype is the locale that tells the encoding. It is always a UTF-8 one:
// pinentry-curses shows no dialogue at all when a text cannot be converted
// (error 166).
func (p Place) ctype() string {
	_, encoding, _ := strings.Cut(p.Locale, ".")
	encoding, _, _ = strings.Cut(encoding, "@")
	switch strings.ToLower(encoding) {
	case "utf-8", "utf8":
		return p.Locale
	}
	return fallbackCtype
}

// ttyName is what the program is to call the terminal: the first file that it
// inherits beside the usual three. It holds for what the program runs as well, as
// many a pinentry is a script.
func (p Place) ttyName() string {
	if p.TTY == nil {
		return ""
	}
	return "/proc/self/fd/3"
}

// spots names what only one dialogue may have at a time. A terminal is known by
// its device number, as it goes by many names; pseudo-terminals are numbered anew
// in each container.
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

// wait takes all spots at once, or none: nobody waits for one while holding
// another. release gives them back.
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

// ended is the error of a context that has ended.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if cause == ErrTimeout || cause == ErrClosed || errors.Is(cause, ErrNoPrompt) {
		return cause
	}
	return fmt.Errorf("stopped asking: %w", ctx.Err())
}
