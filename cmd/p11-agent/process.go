package main

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

// nameProcess gives the process a name, which ps and pgrep show. A process that has run
// itself by /proc/self/exe is called "exe" before. The kernel keeps 15 bytes.
//
// A thread may write the names of its own process, also when the process is undumpable
// (proc_tid_comm_permission in Linux's fs/proc/base.c). The name of the first thread is
// that of the process.
func nameProcess(name string) {
	pid := strconv.Itoa(os.Getpid())
	// The name is for people: without /proc it stays as it is.
	_ = os.WriteFile("/proc/self/task/"+pid+"/comm", []byte(name), 0)
}

// closeInherited closes the descriptors from 3 on that the starter of this process has
// left open, but for keep. ssh-agent does so, too: it would hold the locks of the
// starter, and keep pipes open. The process has opened its own with close-on-exec.
func closeInherited(keep int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("close what was inherited: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < 3 || fd == keep {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd) // on Linux it is closed whatever close returns
		}
	}
	return nil
}

// A terminal is the controlling terminal that an agent in the foreground was started
// in. ssh-agent ends with SIGHUP. p11-agent reads its configuration again then, and ends
// when the terminal has gone, too.
type terminal struct{ hungUp atomic.Bool }

// controllingTerminal returns nil when there is none, or when the agent is to outlive
// it (nohup). It is called before SIGHUP is caught.
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

// hangup is called for each SIGHUP. It tells whether the terminal has gone. Some shells
// send SIGHUP before the terminal goes: then end is called when it goes, unless ctx has
// ended. t may be nil.
func (t *terminal) hangup(ctx context.Context, end func()) (gone bool) {
	if t == nil {
		return false
	}
	fd, err := openTTY()
	if err != nil {
		return true
	}
	if !t.hungUp.CompareAndSwap(false, true) {
		_ = unix.Close(fd) // the first SIGHUP has somebody wait
		return false
	}
	go func() {
		defer unix.Close(fd)
		const pause = 1000 // milliseconds, after which ctx is looked at
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

// noTraces keeps the stack of a panic out of the log. debug.SetTraceback cannot do
// that: it takes nothing away from what the environment says, or does not say, at
// the start.
const noTraces = "GOTRACEBACK=none"

// withoutTraces starts the program anew with noTraces, in the same process, unless
// that is there. It returns when it cannot, or need not.
func withoutTraces() error {
	name, value, _ := strings.Cut(noTraces, "=")
	if os.Getenv(name) == value {
		return nil
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("start again: %w", syscall.Exec(program, os.Args, dedupe(append(os.Environ(), noTraces))))
}

// crashSignals have Go print all stacks and registers whatever GOTRACEBACK says,
// when they are sent to the process. Where its own code causes one it becomes a
// panic.
var crashSignals = []os.Signal{
	syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGSYS,
}

// harden keeps others of the same user from looking into the process, and its
// memory out of core files and out of the log.
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

// warnUnlocked says once that secrets may reach the swap space.
func warnUnlocked(log *slog.Logger) {
	if s, err := secret.New(1); err == nil {
		s.Wipe()
	}
	if err := secret.LockError(); err != nil {
		log.Warn("PINs may reach the swap space: raise the limit of locked memory (ulimit -l)", "reason", err)
	}
}
