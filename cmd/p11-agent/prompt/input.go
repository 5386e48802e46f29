package prompt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/pinentry/secret"
	"p11-agent/token/module/undumpable"
)

// maxTyped is the length of the longest PIN or passphrase, with the end of the line, in bytes.
const maxTyped = 1 << 10

// An Input reads what a person types at the terminal of this process, or what a program writes
// to standard input. One goroutine at a time uses it.
type Input struct {
	in  *os.File
	tty bool // in is a terminal
}

// OpenInput opens standard input or the terminal.
func OpenInput(stdin bool) (*Input, error) {
	if err := undumpable.Enforce(); err != nil {
		return nil, err
	}
	if stdin {
		return &Input{in: os.Stdin}, nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, errors.New("there is no terminal to ask at: run it at one, or give the PIN with --stdin")
	}
	return &Input{in: tty, tty: true}, nil
}

// Close gives the terminal back.
func (q *Input) Close() {
	if q.tty {
		_ = q.in.Close()
	}
}

// ReadSecret reads a line. The terminal shows the prompt, and hides what the person types.
func (q *Input) ReadSecret(ctx context.Context, prompt string) (*secret.Secret, error) {
	if q.tty {
		return q.line(ctx, prompt)
	}
	return readLine(q.in)
}

// line reads one line from the terminal, which hides it. A signal that would end or stop the
// process meanwhile does not leave the terminal changed.
func (q *Input) line(ctx context.Context, prompt string) (_ *secret.Secret, err error) {
	fd := int(q.in.Fd()) // the file blocks from here on; a signal abandons the goroutine that reads
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("ask at the terminal: %w", err)
	}
	// Ctrl-Z would give the shell a terminal without echo.
	signal.Ignore(syscall.SIGTSTP)
	defer signal.Reset(syscall.SIGTSTP)
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(caught)

	quiet := *old
	quiet.Lflag |= unix.ICANON | unix.ISIG
	quiet.Lflag &^= unix.ECHO | unix.ECHOE | unix.ECHOK | unix.ECHONL
	// Text that the person typed before the question is not an answer.
	if err := unix.IoctlSetTermios(fd, unix.TCSETSF, &quiet); err != nil {
		return nil, fmt.Errorf("ask at the terminal: %w", err)
	}
	defer func() {
		rerr := unix.IoctlSetTermios(fd, unix.TCSETSF, old)
		_, _ = io.WriteString(q.in, "\n")
		if err == nil && rerr != nil {
			err = fmt.Errorf("give the terminal back: %w", rerr)
		}
	}()
	if _, err := io.WriteString(q.in, prompt); err != nil {
		return nil, err
	}
	type result struct {
		line *secret.Secret
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := readLine(q.in)
		read <- result{line, err}
	}()
	select {
	case r := <-read:
		return r.line, r.err
	case s := <-caught:
		// The process ends after this error, and ends the read.
		return nil, interrupted(s)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// interrupted returns the error that ends the program with the exit status of the signal.
func interrupted(s os.Signal) error {
	if number, ok := s.(syscall.Signal); ok {
		return exit.Status(128 + int(number))
	}
	return exit.Status(exit.CodeFailure)
}

// readLine reads one line, and no byte after it. It returns the line without its end. A read
// from a terminal returns one line at most; from a pipe it reads each byte alone.
func readLine(f *os.File) (*secret.Secret, error) {
	line, err := secret.New(maxTyped)
	if err != nil {
		return nil, err
	}
	b := line.Buffer()
	n := 0
	for {
		if n == len(b) {
			line.Wipe()
			return nil, fmt.Errorf("the line is longer than %d bytes", maxTyped-1)
		}
		got, err := f.Read(b[n : n+1])
		if got == 1 && b[n] == '\n' || errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			line.Wipe()
			return nil, fmt.Errorf("read the answer: %w", err)
		}
		n += got
	}
	if n > 0 && b[n-1] == '\r' {
		n--
	}
	line.SetLen(n)
	return line, nil
}
