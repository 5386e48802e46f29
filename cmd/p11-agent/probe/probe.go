// Package probe asks the programs and the agents of this machine: what a program prints, how
// ssh is configured, which agent answers at a socket, which readers pcscd has, and which
// units the user's service manager has.
//
// It promises that each answer takes a bounded time, and that it changes nothing. What the
// answers mean for a person is the business of package doctor.
package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Timeout is how long a program or an agent may take to answer.
const Timeout = 5 * time.Second

// An Output is what a program has printed, and how it has ended.
type Output struct {
	Out, Err string
	Status   error // an *exec.ExitError; nil: status 0
}

// maxOutput bounds what is read of a program.
const maxOutput = 1 << 20

// Run runs a program, in the language of programs, for a bounded time. It gets no
// terminal to ask anything at. What it starts ends with it.
func Run(ctx context.Context, name string, args ...string) (Output, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return Output{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for what has left its group with its pipes
	var out, errs limited
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if ctx.Err() != nil {
		return Output{}, fmt.Errorf("%s does not answer", name)
	}
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		return Output{}, err
	}
	return Output{Out: out.String(), Err: strings.TrimSpace(errs.String()), Status: err}, nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	l.b.Write(b[:min(len(b), max(0, maxOutput-l.b.Len()))])
	return len(b), nil
}

func (l *limited) String() string { return l.b.String() }

// Line returns the first line of a small file, or "".
func Line(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, 256)
	n, _ := f.Read(b)
	text, _, _ := strings.Cut(string(b[:n]), "\n")
	return strings.TrimSpace(text)
}
