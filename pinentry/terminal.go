package pinentry

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// terminal has the modes of a terminal from before a program asked on it. pinentry-tty leaves the
// terminal without echo when a signal ends it, and every program leaves it raw when it is killed.
type terminal struct {
	fd int

	mu    sync.Mutex
	modes *unix.Termios // nil: no program has asked yet
}

// newTerminal returns nil if tty cannot be used.
func newTerminal(tty *os.File) *terminal {
	t := new(terminal)
	err := control(tty, func(fd int) (err error) {
		// A descriptor of its own, as the caller closes the file.
		t.fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil
	}
	return t
}

// remember keeps the modes. It is called when the program is about to ask, and no other program
// asks at the terminal.
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

// errNotLineMode says that another program uses the terminal. Shells that edit a line, editors and
// pagers read each key by themselves.
var errNotLineMode = errors.New("another program is reading from the terminal")

// inLineMode returns nil if keys typed at the terminal wait for the end of a line. Then a program
// that turns line mode off gets the keys, and no other program does.
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

// restore undoes the changes of the program. With gently, restore leaves a terminal alone that is
// not in line mode: a shell may edit its next line there. The exception is the very mode in which
// pinentry-tty reads a single key, as a shell changes more than that.
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
	// A process that sets modes from the background of its own terminal is stopped
	// (SIGTTOU). Other terminals do not tell which process is in the foreground.
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
