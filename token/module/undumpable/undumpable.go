// Package undumpable keeps other processes of the user from looking into this one,
// from before the first instruction of the Go runtime on.
//
// A process that is not dumpable (PR_SET_DUMPABLE, prctl(2)) cannot be traced, its
// /proc/PID/mem cannot be opened, and it leaves no core file. The kernel makes each
// process dumpable when it executes a program, unless the user must not read the
// program's file. So a program that its user can read is open until the dynamic loader
// has done its work, which is half a millisecond; one of mode 0711 is never open. Whoever
// opens /proc/PID/mem in that time keeps it: package secret is for that.
//
// A constructor in C does it, as the Go runtime and the packages of a program take
// milliseconds before main. A program gets it by importing this package.
package undumpable

// #include <sys/prctl.h>
//
// static void undumpable(void)
// {
//	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
// }
//
// /* The loader calls these before the constructors of any library. */
// __attribute__((section(".preinit_array"), used)) static void (*const first)(void) = undumpable;
import "C"

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Enforce makes the process undumpable if it is not. It fails if that cannot be
// done, and if another process traces this one: that has begun before, and goes on. It is
// called as the first act of main, and again before there are secrets.
func Enforce() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep other processes from looking into this one: %w", err)
	}
	pid, err := tracer()
	switch {
	case err != nil:
		return fmt.Errorf("find out whether another process traces this one: %w", err)
	case pid != 0:
		return fmt.Errorf("process %d traces this one and can read PINs: run it without a debugger", pid)
	}
	return nil
}

// Suspend makes the process dumpable, for another one that has to see which program it
// is. It is for a process that holds no secret. Enforce ends it.
func Suspend() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("let the agent see which program this is: %w", err)
	}
	return nil
}

// tracer returns the process that traces this one, or 0. The kernel says 0 as well of one
// that is outside of this PID namespace, whose user can do everything here anyway.
func tracer() (int, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "TracerPid:"); ok {
			return strconv.Atoi(strings.TrimSpace(text))
		}
	}
	return 0, errors.New("/proc/self/status does not say")
}
