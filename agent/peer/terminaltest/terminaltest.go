// Package terminaltest runs tests without a controlling terminal, and makes terminals. It is for
// tests.
//
// Programs such as ssh-add and pinentry open /dev/tty, even if their standard input is
// another file. From a terminal they would ask the developer, and the test would wait
// for an answer. In CI they find no terminal and fail at once. Tests have to see the
// same in both places. A test that needs a terminal makes one.
package terminaltest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// M is a [testing.M], or stands in for one.
type M interface{ Run() int }

// Without returns an M that gives up the controlling terminal before it runs the
// tests of m. Programs that TestMain runs in place of the tests keep theirs.
func Without(m M) M { return without{m} }

type without struct{ tests M }

func (w without) Run() int {
	if err := leave(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return w.tests.Run()
}

// leave gives up the controlling terminal of this process, and so of every process
// that it starts later. The process stays in its session and process group: Ctrl-C
// ends it as before.
func leave() error {
	f, err := os.OpenFile("/dev/tty", os.O_RDWR|syscall.O_NOCTTY, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) {
		return nil // there is none
	}
	if err != nil {
		return fmt.Errorf("open the controlling terminal: %w", err)
	}
	defer f.Close()
	// When the leader of a session gives up the terminal, the kernel hangs up the
	// foreground process group (ioctl_tty(2), TIOCNOTTY). The signal may arrive
	// later, so this process does not die of SIGHUP from now on.
	if leader, err := unix.Getsid(0); err == nil && leader == os.Getpid() {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TIOCNOTTY, 0); err != nil {
		return fmt.Errorf("give up the controlling terminal: %w", err)
	}
	return nil
}

// New returns both ends of a new terminal: the far end, where the screen and the keyboard are,
// and the near end for programs. The name of near is that of the terminal.
func New(t testing.TB) (far, near *os.File) {
	t.Helper()
	far, near, err := Open("/dev/ptmx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = far.Close() // the test may have closed it
		_ = near.Close()
	})
	return far, near
}

// Open is New for another file than /dev/ptmx. The caller closes both ends.
func Open(ptmx string) (far, near *os.File, err error) {
	far, err = os.OpenFile(ptmx, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(far.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, errors.Join(err, far.Close())
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, errors.Join(err, far.Close())
	}
	peer, err := unix.IoctlRetInt(fd, unix.TIOCGPTPEER)
	if err != nil {
		return nil, nil, errors.Join(err, far.Close())
	}
	return far, os.NewFile(uintptr(peer), fmt.Sprint("/dev/pts/", n)), nil
}
