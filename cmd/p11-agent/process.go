package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"

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
