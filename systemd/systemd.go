// Package systemd is what the agent has to do with the service manager that may
// have started it: the sockets that it inherits, what it tells of its state and
// puts into the journal, and the unit files.
//
// It promises that a socket it hands out is a listening Unix stream socket, that
// whatever else was inherited is an error that names it, and that no child
// started later believes the sockets to be its own. Without systemd everything
// here does nothing and succeeds, so that callers need not ask.
//
// All functions may be called at any time and from any goroutine; only
// Listeners changes something, namely the environment of the process, and
// belongs before the first child is started. What is done on the sockets, and
// when the program is ready, is the caller's business.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/journal"

	"p11-agent/pinentry/plain"
)

// Listeners returns the sockets of the socket unit that started this process
// (sd_listen_fds(3)), in the order of the unit. It returns
//
//   - nil and nil when the process was not started by a socket unit, or when the
//     sockets are for another process (LISTEN_PID), and
//   - an error when the environment makes no sense or one of the sockets is not
//     a listening Unix stream socket: all of them are closed then.
//
// The first call takes the sockets and their environment variables away, so
// that children get neither; the next returns nil and nil. The listeners are the
// caller's. Closing one leaves its file in place: that is the socket unit's.
func Listeners() ([]*net.UnixListener, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	files := activation.Files(true)
	defer func() {
		for _, f := range files {
			_ = f.Close() // the listeners have descriptors of their own
		}
	}()
	if len(files) == 0 {
		return nil, checkVariables(pid, fds)
	}

	var listeners []*net.UnixListener
	for _, f := range files {
		l, err := listener(f)
		if err != nil {
			for _, l := range listeners {
				_ = l.Close() // the error below is the one that matters
			}
			return nil, fmt.Errorf("socket %q inherited from the service manager: %w", f.Name(), err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// checkVariables says what is wrong with variables that led to no socket.
func checkVariables(pid, fds string) error {
	if pid == "" {
		return nil
	}
	if n, err := strconv.Atoi(pid); err != nil {
		return fmt.Errorf("environment variable LISTEN_PID is %q: it is no process number", pid)
	} else if n != os.Getpid() {
		return nil
	}
	return fmt.Errorf("environment variable LISTEN_FDS is %q: it is no number of sockets", fds)
}

// listener makes a listener of f, which stays the caller's.
func listener(f *os.File) (*net.UnixListener, error) {
	if err := checkSocket(f); err != nil {
		return nil, err
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("it is a %s socket", l.Addr().Network()), l.Close())
	}
	return u, nil
}

// checkSocket finds out what net.FileListener does not tell: it takes datagram
// sockets and connections for listeners, too.
func checkSocket(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var domain, kind, listens int
	var failed error
	if err := raw.Control(func(fd uintptr) {
		for _, option := range []struct {
			name  int
			value *int
		}{
			{syscall.SO_DOMAIN, &domain},
			{syscall.SO_TYPE, &kind},
			{syscall.SO_ACCEPTCONN, &listens},
		} {
			if *option.value, failed = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, option.name); failed != nil {
				return
			}
		}
	}); err != nil {
		return err
	}

	const hint = ": the agent serves ListenStream= with a path only"
	switch {
	case errors.Is(failed, syscall.ENOTSOCK):
		return errors.New("it is not a socket" + hint)
	case failed != nil:
		return failed
	case domain == syscall.AF_INET || domain == syscall.AF_INET6:
		return errors.New("it is a network socket" + hint)
	case domain != syscall.AF_UNIX:
		return fmt.Errorf("it is a socket of address family %d%s", domain, hint)
	case kind == syscall.SOCK_DGRAM:
		return errors.New("it is a datagram socket" + hint)
	case kind != syscall.SOCK_STREAM:
		return fmt.Errorf("it is a socket of type %d%s", kind, hint)
	case listens == 0:
		return errors.New("it does not listen: the socket unit must have Accept=no")
	}
	return nil
}

// Ready tells that the program has started, or that it has read its
// configuration again, and what it does now. Like the functions below it waits
// while the service manager does not read its messages.
func Ready(status string) error {
	return notify("that the agent is ready", daemon.SdNotifyReady+"\n"+statusLine(status))
}

// Status tells what the program does, in words for "systemctl status". They are
// put on one line and cut when they are long.
func Status(text string) error {
	return notify("the status", statusLine(text))
}

// Reloading tells that the program reads its configuration again. Ready must
// follow, also when that fails.
func Reloading() error {
	return notify("that the agent reloads", daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
}

// Stopping tells that the program is about to end.
func Stopping() error {
	return notify("that the agent stops", daemon.SdNotifyStopping)
}

func notify(what, state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell the service manager %s: %w", what, err)
	}
	return nil
}

// Watchdog returns within which time the service manager wants to hear that the
// program is Alive, again and again; 0: it does not. The first call takes the
// variables away that say so, so that children do not see them.
func Watchdog() (time.Duration, error) {
	every, err := daemon.SdWatchdogEnabled(true)
	if err != nil {
		return 0, fmt.Errorf("the service manager's watchdog: %w", err)
	}
	return every, nil
}

// Alive tells that the program still does its work.
func Alive() error {
	return notify("that the agent is alive", daemon.SdNotifyWatchdog)
}

// maxStatus is the most bytes of a status. systemd drops a message of more than
// 4096 bytes (NOTIFY_BUFFER_MAX in its source) whole, and a person reads less.
const maxStatus = 1024

// statusLine returns the assignment of a status. The text may hold what is
// written on a card, so it could bring assignments of its own behind a line
// break, and systemd refuses what is not UTF-8.
func statusLine(text string) string { return "STATUS=" + plain.LineWithin(text, maxStatus) }

// StderrIsJournal tells whether what is written to stderr goes to the journal,
// which adds the time itself (systemd.exec(5), JOURNAL_STREAM).
func StderrIsJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return err == nil && is
}

// Booted tells whether systemd manages this machine (sd_booted(3)).
func Booted() bool {
	st, err := os.Lstat("/run/systemd/system")
	return err == nil && st.IsDir()
}
