package pinentry

import "golang.org/x/sys/unix"

// terminal is what a terminal was like before a program asked on it.
// pinentry-tty leaves it without echo when it is ended by a signal, and every
// program leaves it raw when it is killed.
type terminal struct {
	fd    int
	modes unix.Termios
}

// rememberTerminal returns nil when there is no terminal of that name.
func rememberTerminal(name string) *terminal {
	if name == "" {
		return nil
	}
	// Opened now, as the name may lead through a process that is gone by the time
	// it is needed. Not blocking, as it may be anything.
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	modes, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		_ = unix.Close(fd)
		return nil
	}
	return &terminal{fd, *modes}
}

// isNoTerminal tells whether name leads to something that is not a terminal.
func isNoTerminal(name string) bool {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false // pinentry says what is wrong with it
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	_, err = unix.IoctlGetTermios(fd, unix.TCGETS)
	return err != nil
}

// restore undoes what the program has changed. gently leaves a terminal alone
// that is not in line mode, as by now it may be a shell that edits its next line
// there, unless it is in the very mode that pinentry-tty reads a single key in: a
// shell changes more than that.
func (t *terminal) restore(gently bool) {
	if t == nil {
		return
	}
	now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil || *now == t.modes {
		return
	}
	key := t.modes
	key.Lflag &^= unix.ICANON | unix.ECHO
	if gently && now.Lflag&unix.ICANON == 0 && *now != key {
		return
	}
	// Setting modes from the background of one's own terminal stops the process
	// (SIGTTOU). Other terminals do not even tell who is in the foreground.
	if fg, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP); err == nil && fg != unix.Getpgrp() {
		return
	}
	_ = unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.modes)
}

func (t *terminal) close() {
	if t != nil {
		_ = unix.Close(t.fd)
	}
}
