package pinentry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
)

// A Probed is what a pinentry says about itself at a place.
type Probed struct {
	File string // of the program
	// Flavor is the kind of its dialogue: "curses", "tty", "gtk2", "qt", "gnome3", or a word
	// of another program. "gtk2:curses" says that curses stands in for gtk2, which cannot be
	// used here. Empty means that the program does not say.
	Flavor string
}

// Terminal tells whether the program would ask on the terminal.
func (p Probed) Terminal() bool {
	_, flavor, fallen := strings.Cut(p.Flavor, ":")
	if !fallen {
		flavor = p.Flavor
	}
	return flavor == "curses" || flavor == "tty"
}

// Probe starts the Program as Open does, tells it about the place, asks it for its flavor, and ends
// it. The person sees nothing. The error says why the program cannot ask. Probed.File is set if
// there is such a program.
func (p *Pinentry) Probe(ctx context.Context, place Place) (Probed, error) {
	program := p.settings().program
	if program == "" {
		program = "pinentry"
	}
	file, err := p.find(program)
	if err != nil {
		return Probed{}, err
	}
	probed := Probed{File: file}
	by, err := dial(ctx, p, filepath.Base(file), file, nil, place)
	if err != nil {
		return probed, err
	}
	defer by.close()
	c, ok := by.(*conn)
	if !ok {
		return probed, nil
	}
	err = c.learnFlavor(ctx)
	probed.Flavor = c.flavor
	return probed, err
}

// CheckDisplay returns nil if the X server of the place takes a connection, or if the place has no
// X server. It does not ask whether the server accepts this client. The error says why the server
// cannot be reached.
func (p Place) CheckDisplay(ctx context.Context) error {
	if p.Display == "" {
		return nil
	}
	host, rest, ok := cutLast(p.Display, ':')
	number, _, _ := strings.Cut(rest, ".")
	n, err := strconv.ParseUint(number, 10, 16)
	if !ok || err != nil {
		return errors.New("the name is not a display")
	}
	var d net.Dialer
	// X(7), "DISPLAY NAMES": a path names a socket. Without a host, it is this machine.
	if host == "" || host == "unix" || strings.HasPrefix(host, "/") {
		file := fmt.Sprintf("/tmp/.X11-unix/X%d", n)
		if strings.HasPrefix(host, "/") {
			file = p.Display
		}
		c, err := d.DialContext(ctx, "unix", "@"+file) // abstract, as most servers have it too
		if err != nil {
			c, err = d.DialContext(ctx, "unix", file)
		}
		if err == nil {
			err = c.Close()
		}
		return bare(err)
	}
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.FormatUint(6000+n, 10)))
	if err == nil {
		err = c.Close()
	}
	return bare(err)
}

// CheckWayland does for the Wayland compositor what CheckDisplay does for the X server.
func (p Place) CheckWayland(ctx context.Context) error {
	file := p.WaylandDisplay
	switch {
	case file == "":
		return nil
	case filepath.IsAbs(file):
	case p.RuntimeDir == "":
		return errors.New("XDG_RUNTIME_DIR is not set")
	default:
		file = filepath.Join(p.RuntimeDir, file)
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", file)
	if err == nil {
		err = c.Close()
	}
	return bare(err)
}

// bare leaves the name of the socket out of an error, as the caller knows it.
func bare(err error) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
}

func cutLast(s string, c byte) (before, after string, found bool) {
	if i := strings.LastIndexByte(s, c); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// The smallest terminal in which pinentry-curses 1.2 shows the longest question. In a smaller
// one, pinentry-curses may say "Screen or window too small".
const (
	MinColumns = 60
	MinRows    = 12
)

// The reasons of CheckTerminal. Compare with errors.Is.
var (
	// ErrNoTerminal says that the place has no terminal.
	ErrNoTerminal = errors.New("there is no terminal")
	// ErrTooSmall says that pinentry-curses has too little room.
	ErrTooSmall = errors.New("the terminal is too small for pinentry-curses")
	// ErrTTYType says that pinentry-curses does not know the kind of the terminal, or cannot
	// draw on it.
	ErrTTYType = errors.New("pinentry-curses cannot draw on this kind of terminal")
)

// CheckTerminal returns nil if pinentry-curses can ask on the terminal of the place. The error says
// why it cannot.
func (p Place) CheckTerminal() error {
	if p.TTY == nil {
		return ErrNoTerminal
	}
	size, err := unix.IoctlGetWinsize(int(p.TTY.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return fmt.Errorf("the file is not a terminal: %w", err)
	}
	kind, ok := lookUpTerminal(p.TTYType)
	switch {
	case !ok:
		return fmt.Errorf("%w: it does not know TERM=%s", ErrTTYType, plain.Line(p.TTYType))
	case !kind.cursor:
		return fmt.Errorf("%w (TERM=%s)", ErrTTYType, plain.Line(p.TTYType))
	case size.Col == 0 || size.Row == 0: // the terminal does not say; TERM does
	case size.Col < MinColumns || size.Row < MinRows:
		return fmt.Errorf("%w: it has %d columns and %d rows, and %d and %d are needed", ErrTooSmall, size.Col, size.Row, MinColumns, MinRows)
	}
	return nil
}

// Say writes a line to the terminal of the place, if a question could be asked there now. It never
// waits: if the terminal takes nothing, the line is lost.
func (p Place) Say(text string) error {
	if p.TTY == nil {
		return ErrNoTerminal
	}
	if p.Check != nil {
		if err := p.Check(); err != nil {
			return err
		}
	}
	if err := inLineMode(p.TTY); err != nil {
		return err
	}
	return control(p.TTY, func(fd int) error {
		// Another open file of the terminal: p.TTY blocks, and programs read from it.
		own, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(own) //nolint:errcheck // what was written is with the terminal
		_, err = unix.Write(own, []byte("\r"+plain.Line(text)+"\n"))
		return err
	})
}
