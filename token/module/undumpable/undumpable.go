// Package undumpable keeps other processes of the user from reading this process, from
// before the first instruction of the Go runtime.
//
// No process can trace a process that is not dumpable (PR_SET_DUMPABLE, prctl(2)), or
// open its /proc/PID/mem. It leaves no core file. When a process executes a program, the
// kernel makes the process dumpable, unless the user must not read the program's file.
//
// So a program that its user can read is open until the dynamic loader has done its work.
// This takes half a millisecond. A program of mode 0711 is never open. A process that
// opens /proc/PID/mem in that time keeps it open: package secret protects secrets against
// this.
//
// A constructor in C makes the process undumpable, because the Go runtime and the
// packages of a program take milliseconds before main. To use it, import this package.
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

// Enforce makes the process undumpable if it is not. It fails if this is impossible. It
// also fails if another process traces this process: such tracing does not end. Call
// Enforce as the first act of main, and again before the process holds secrets.
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

// Suspend makes the process dumpable, so that another process can see which program it
// runs. Call it only in a process that holds no secret. Enforce reverses it.
func Suspend() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("let the agent see which program this is: %w", err)
	}
	return nil
}

// tracer returns the process that traces this process, or 0. The kernel also reports 0
// for a process outside of this PID namespace. The user of such a process can do
// everything here anyway.
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
