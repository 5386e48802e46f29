package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/pinentry/secret"
	"p11-agent/token/module/undumpable"

	"golang.org/x/sys/unix"
)

// NameProcess gives the process a name, which ps and pgrep show. Without it, a process of
// /proc/self/exe has the name "exe". The kernel keeps 15 bytes.
//
// A thread may write the names of its own process, also when the process is undumpable
// (proc_tid_comm_permission in Linux's fs/proc/base.c). The process has the name of its first thread.
func NameProcess(name string) {
	pid := strconv.Itoa(os.Getpid())
	// Only people read the name: without /proc it stays as it is.
	_ = os.WriteFile("/proc/self/task/"+pid+"/comm", []byte(name), 0)
}

// CloseInherited closes the descriptors from 3 on that the starter of this process left open, except keep.
// ssh-agent does so too: otherwise the agent holds the locks of the starter, and keeps pipes open. Descriptors of
// the process itself have close-on-exec, and stay.
func CloseInherited(keep int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("close inherited files: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < 3 || fd == keep {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd) // Linux closes it even when close fails
		}
	}
	return nil
}

// A terminal is the controlling terminal of an agent in the foreground. SIGHUP ends ssh-agent. It makes p11-agent
// read its configuration again, or end if the terminal has gone.
type terminal struct{ hungUp atomic.Bool }

// controllingTerminal returns nil without a controlling terminal, and under nohup. It is called before SIGHUP is
// caught.
func controllingTerminal() *terminal {
	if signal.Ignored(syscall.SIGHUP) {
		return nil
	}
	fd, err := openTTY()
	if err != nil {
		return nil
	}
	_ = unix.Close(fd)
	return new(terminal)
}

func openTTY() (int, error) {
	return unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// hangup is called for each SIGHUP. It tells whether the terminal has gone. Some shells send SIGHUP before the
// terminal goes: then hangup calls end when the terminal goes, unless ctx has ended. t may be nil.
func (t *terminal) hangup(ctx context.Context, end func()) (gone bool) {
	if t == nil {
		return false
	}
	fd, err := openTTY()
	if err != nil {
		return true
	}
	if !t.hungUp.CompareAndSwap(false, true) {
		_ = unix.Close(fd) // a goroutine of the first SIGHUP waits
		return false
	}
	go func() {
		defer unix.Close(fd)
		const pause = 1000 // milliseconds until the next look at ctx
		for ctx.Err() == nil {
			fds := []unix.PollFd{{Fd: int32(fd)}}
			n, err := unix.Poll(fds, pause)
			if err != nil && !errors.Is(err, unix.EINTR) || n > 0 {
				end()
				return
			}
		}
	}()
	return false
}

// noTraces keeps the stack of a panic out of the log. debug.SetTraceback cannot do that: it can only add to
// what the environment says at the start.
const noTraces = "GOTRACEBACK=none"

// WithoutTraces starts the program again with noTraces, in the same process. It returns nil if noTraces is in force
// already, and an error if the start fails.
func WithoutTraces() error {
	name, value, _ := strings.Cut(noTraces, "=")
	if os.Getenv(name) == value {
		return nil
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("start again: %w", syscall.Exec(program, os.Args, lastOfEach(append(os.Environ(), noTraces))))
}

// crashSignals make Go print all stacks and registers, also with noTraces, when another process sends them. A fault
// of the program's own code is a panic instead.
var crashSignals = []os.Signal{
	syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGSYS,
}

// harden keeps other processes of the user from reading this process, and keeps its memory out of core files and
// out of the log.
func harden(log *slog.Logger) error {
	crashes := make(chan os.Signal, 1)
	signal.Notify(crashes, crashSignals...)
	go func() { // until the process ends
		log.Error("agent ended by a signal", "signal", (<-crashes).String())
		os.Exit(exit.CodeFailure)
	}()
	if err := undumpable.Enforce(); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core files off: %w", err)
	}
	return nil
}

// warnUnlocked logs that secrets may reach the swap space, if memory cannot be locked.
func warnUnlocked(log *slog.Logger) {
	if s, err := secret.New(1); err == nil {
		s.Wipe()
	}
	if err := secret.LockError(); err != nil {
		log.Warn("PINs may reach the swap space: raise the limit of locked memory (ulimit -l)", "reason", err)
	}
}
