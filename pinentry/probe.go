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

// A Probed is what a pinentry says of itself at a place.
type Probed struct {
	File string // of the program
	// Flavor is what it would ask with: "curses", "tty", "gtk2", "qt", "gnome3" or
	// another one's own word. With a colon it is what stands in for what cannot be
	// used here: "gtk2:curses". Empty: it does not say.
	Flavor string
}

// Terminal tells whether it would ask on the terminal.
func (p Probed) Terminal() bool {
	_, flavor, fallen := strings.Cut(p.Flavor, ":")
	if !fallen {
		flavor = p.Flavor
	}
	return flavor == "curses" || flavor == "tty"
}

// Probe starts the Program as Open does, tells it about the place, has it say what
// it is, and ends it. Nothing is shown and nobody is asked. The error says what
// keeps it from asking; Probed.File is set if there is such a program.
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

// CheckDisplay says why the X server of the place cannot be reached: it is known
// to be there when it takes a connection. Whether it lets us in is not asked. nil
// also where the place has none.
func (p Place) CheckDisplay(ctx context.Context) error {
	if p.Display == "" {
		return nil
	}
	host, rest, ok := cutLast(p.Display, ':')
	number, _, _ := strings.Cut(rest, ".")
	n, err := strconv.ParseUint(number, 10, 16)
	if !ok || err != nil {
		return errors.New("it names no display")
	}
	var d net.Dialer
	// X(7), "DISPLAY NAMES": a path names a socket, and no host this machine.
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

// CheckWayland is CheckDisplay for the Wayland compositor.
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

// bare leaves out what the caller knows: which socket it was.
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

// The least that pinentry-curses 1.2 shows our longest question in: below that it
// says "Screen or window too small", or may when names are long.
const (
	MinColumns = 60
	MinRows    = 12
)

// The reasons of CheckTerminal. Compare with errors.Is.
var (
	// ErrNoTerminal says that the place has no terminal.
	ErrNoTerminal = errors.New("there is no terminal")
	// ErrTooSmall says that pinentry-curses has too little room.
	ErrTooSmall = errors.New("it is too small for pinentry-curses")
	// ErrTTYType says that pinentry-curses does not know what kind it is, or how to draw
	// on that kind.
	ErrTTYType = errors.New("it is of a kind that pinentry-curses does not know")
)

// CheckTerminal says what keeps pinentry-curses from asking on the terminal of the
// place.
func (p Place) CheckTerminal() error {
	if p.TTY == nil {
		return ErrNoTerminal
	}
	size, err := unix.IoctlGetWinsize(int(p.TTY.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return fmt.Errorf("it is no terminal: %w", err)
	}
	kind, ok := lookUpTerminal(p.TTYType)
	switch {
	case !ok:
		return fmt.Errorf("%w (TERM=%s)", ErrTTYType, plain.Line(p.TTYType))
	case !kind.cursor:
		return fmt.Errorf("%w how to draw on (TERM=%s)", ErrTTYType, plain.Line(p.TTYType))
	case size.Col == 0 || size.Row == 0: // it does not say; TERM does
	case size.Col < MinColumns || size.Row < MinRows:
		return fmt.Errorf("%w: it has %d columns and %d rows, and %d and %d are needed", ErrTooSmall, size.Col, size.Row, MinColumns, MinRows)
	}
	return nil
}

// Say writes a line to the terminal of the place, where a question could be asked now.
// It never waits: a terminal that takes nothing does not show the line.
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
		// A file of its own: the other one blocks, and is read from.
		own, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(own) //nolint:errcheck // what was written is with the terminal
		_, err = unix.Write(own, []byte("\r"+plain.Line(text)+"\n"))
		return err
	})
}
