package pinentry

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// terminal is what a terminal was like before a program asked on it.
// pinentry-tty leaves it without echo when it is ended by a signal, and every
// program leaves it raw when it is killed.
type terminal struct {
	fd int

	mu    sync.Mutex
	modes *unix.Termios // nil: nothing was asked yet
}

// newTerminal returns nil when tty is no good.
func newTerminal(tty *os.File) *terminal {
	t := new(terminal)
	err := control(tty, func(fd int) (err error) {
		// A descriptor of its own, as the file is closed by others.
		t.fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil
	}
	return t
}

// remember is called when the program is about to ask, and nobody else asks at
// the terminal.
func (t *terminal) remember() {
	if t == nil {
		return
	}
	modes, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.modes = modes
}

// control calls do with the descriptor of a file, which may be nil.
func control(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = raw.Control(func(fd uintptr) { doErr = do(int(fd)) })
	return errors.Join(err, doErr)
}

func isTerminal(f *os.File) bool {
	return control(f, func(fd int) error {
		_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		return err
	}) == nil
}

// errNotLineMode says that the terminal is in use: shells that edit a line,
// editors and pagers read each key by themselves.
var errNotLineMode = errors.New("another program is reading from the terminal")

// inLineMode tells whether keys typed at the terminal wait for the end of a line,
// so that a program that turns this off gets them and no other does.
func inLineMode(f *os.File) error {
	return control(f, func(fd int) error {
		modes, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return fmt.Errorf("the terminal cannot be looked at: %w", err)
		}
		if modes.Lflag&unix.ICANON == 0 {
			return errNotLineMode
		}
		return nil
	})
}

// restore undoes what the program has changed. gently leaves a terminal alone
// that is not in line mode, as by now it may be a shell that edits its next line
// there, unless it is in the very mode that pinentry-tty reads a single key in: a
// shell changes more than that.
func (t *terminal) restore(gently bool) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.modes == nil {
		return
	}
	now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil || *now == *t.modes {
		return
	}
	key := *t.modes
	key.Lflag &^= unix.ICANON | unix.ECHO
	if gently && now.Lflag&unix.ICANON == 0 && *now != key {
		return
	}
	// Setting modes from the background of one's own terminal stops the process
	// (SIGTTOU). Other terminals do not even tell who is in the foreground.
	if fg, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP); err == nil && fg != unix.Getpgrp() {
		return
	}
	_ = unix.IoctlSetTermios(t.fd, unix.TCSETS, t.modes)
}

func (t *terminal) close() {
	if t != nil {
		_ = unix.Close(t.fd)
	}
}
