package prompt

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// terminalID tells a terminal from another.
type terminalID struct{ dev, rdev uint64 }

// terminalState is a terminal at a time: when it is gone and another one has its
// number, the change is another.
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

// fixedTerminal is a terminal that is known by its name, and by what was there
// when the agent started.
type fixedTerminal struct {
	name  string
	state terminalState
	err   error
}

// open opens the terminal if it is still the same.
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
		err = fmt.Errorf("%s is not the terminal any more that it was when the agent started", f.name)
	}
	if err != nil {
		_ = tty.Close()
		return nil, err
	}
	return tty, nil
}

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

// openTerminal opens a terminal without waiting for anything, such as a serial
// line's carrier.
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
