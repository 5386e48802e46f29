// Package systemd deals with the service manager that may have started the agent: the sockets
// that the agent inherits, its state, its journal, and its unit files.
//
// It promises that a socket it hands out is a listening Unix stream socket. Any other inherited
// file is an error that names it. No child that starts later takes the sockets for its own.
// Without systemd, every function does nothing and succeeds, so that callers need not check.
//
// Any goroutine may call the functions at any time. Only Listeners changes something: the
// environment of the process. Call Listeners before the first child starts. Callers decide what
// to do on the sockets, and when the program is ready.
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

// checkVariables returns what is wrong with variables without a socket.
func checkVariables(pid, fds string) error {
	if pid == "" {
		return nil
	}
	if n, err := strconv.Atoi(pid); err != nil {
		return fmt.Errorf("environment variable LISTEN_PID is %q, which is not a process number", pid)
	} else if n != os.Getpid() {
		return nil
	}
	return fmt.Errorf("environment variable LISTEN_FDS is %q, which is not a number of sockets", fds)
}

// listener makes a listener of f. f stays the caller's.
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
		return nil, errors.Join(fmt.Errorf("a %s socket", l.Addr().Network()), l.Close())
	}
	return u, nil
}

// checkSocket checks what net.FileListener does not check: that f is a stream socket and listens.
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
		return errors.New("not a socket" + hint)
	case failed != nil:
		return failed
	case domain == syscall.AF_INET || domain == syscall.AF_INET6:
		return errors.New("a network socket" + hint)
	case domain != syscall.AF_UNIX:
		return fmt.Errorf("a socket of address family %d%s", domain, hint)
	case kind == syscall.SOCK_DGRAM:
		return errors.New("a datagram socket" + hint)
	case kind != syscall.SOCK_STREAM:
		return fmt.Errorf("a socket of type %d%s", kind, hint)
	case listens == 0:
		return errors.New("the socket does not listen: the socket unit must have Accept=no")
	}
	return nil
}

// Ready tells the service manager that the program has started, or has read its configuration
// again. status is what the program does now. Like the functions below, Ready waits while the
// service manager does not read its messages.
func Ready(status string) error {
	return notify("that the agent is ready", daemon.SdNotifyReady+"\n"+statusLine(status))
}

// Status tells the service manager what the program does, for "systemctl status". The text becomes
// one line. A long text is cut.
func Status(text string) error {
	return notify("the status", statusLine(text))
}

// Reloading tells the service manager that the program reads its configuration again. Call Ready
// afterwards, also after a failure.
func Reloading() error {
	return notify("that the agent reloads", daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
}

// Stopping tells the service manager that the program is about to end.
func Stopping() error {
	return notify("that the agent stops", daemon.SdNotifyStopping)
}

func notify(what, state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell the service manager %s: %w", what, err)
	}
	return nil
}

// Watchdog returns how long the service manager waits for the next call of Alive. 0 means that it
// does not wait for one. The first call takes the variables for it away, so that children do not
// see them.
func Watchdog() (time.Duration, error) {
	every, err := daemon.SdWatchdogEnabled(true)
	if err != nil {
		return 0, fmt.Errorf("the service manager's watchdog: %w", err)
	}
	return every, nil
}

// Alive tells the service manager that the program still works.
func Alive() error {
	return notify("that the agent is alive", daemon.SdNotifyWatchdog)
}

// maxStatus is the most bytes of a status. systemd drops a message of more than 4096 bytes as a
// whole (NOTIFY_BUFFER_MAX in its source), and a person reads less.
const maxStatus = 1024

// statusLine returns the assignment of a status. The text may come from a card. A line break in it
// could add assignments, and systemd refuses text that is not UTF-8.
func statusLine(text string) string { return "STATUS=" + plain.LineWithin(text, maxStatus) }

// StderrIsJournal tells whether stderr goes to the journal, which adds the time by itself
// (systemd.exec(5), JOURNAL_STREAM).
func StderrIsJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return err == nil && is
}

// Booted tells whether systemd manages this machine (sd_booted(3)).
func Booted() bool {
	st, err := os.Lstat("/run/systemd/system")
	return err == nil && st.IsDir()
}
