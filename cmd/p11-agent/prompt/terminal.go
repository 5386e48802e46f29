package prompt

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A terminalID is equal for one terminal.
type terminalID struct{ dev, rdev uint64 }

// A terminalState is a terminal at a time. When a new terminal gets the number of a former one,
// the time of the change differs.
type terminalState struct {
	terminal terminalID
	change   unix.Timespec
}

func statTerminal(tty *os.File) (terminalState, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(tty.Fd()), &st); err != nil {
		return terminalState{}, err
	}
	return terminalState{terminalID{st.Dev, st.Rdev}, st.Ctim}, nil
}

// A fixedTerminal is the terminal that had a name when the agent started.
type fixedTerminal struct {
	name  string
	state terminalState
	err   error
}

// open opens the terminal, unless another terminal has the name now.
func (f *fixedTerminal) open() (*os.File, error) {
	if f.err != nil {
		return nil, f.err
	}
	tty, err := openTerminal(f.name)
	if err != nil {
		return nil, err
	}
	state, err := statTerminal(tty)
	if err == nil && state != f.state {
		err = fmt.Errorf("%s is another terminal than when the agent started", f.name)
	}
	if err != nil {
		_ = tty.Close()
		return nil, err
	}
	return tty, nil
}

// fixTerminal notes which terminal has a name now.
func fixTerminal(name string) fixedTerminal {
	f := fixedTerminal{name: name}
	if name == "" {
		return f
	}
	tty, err := openTerminal(name)
	if err == nil {
		defer tty.Close()
		f.state, err = statTerminal(tty)
	}
	f.err = err
	return f
}

// openTerminal opens a terminal without waiting, for the carrier of a serial line for example.
func openTerminal(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s is not a terminal", name)
	}
	_ = unix.SetNonblock(fd, false) // the poller has no use for it
	return os.NewFile(uintptr(fd), name), nil
}
