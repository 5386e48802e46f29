package setup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
)

// A dialog asks a person at a terminal for answers that are not secret. One goroutine at a time uses it.
type dialog struct {
	in  io.Reader // one line at a time
	out io.Writer
}

// errInterrupted ends the program as Ctrl-C does in a shell.
const errInterrupted = exit.Status(128 + int(syscall.SIGINT))

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 512

// line asks for one line. Ctrl-C ends it with errInterrupted, by way of ctx.
func (d *dialog) line(ctx context.Context, prompt string) (string, error) {
	if ctx.Err() != nil {
		return "", errInterrupted
	}
	fmt.Fprint(d.out, prompt+" ")
	type answer struct {
		text string
		err  error
	}
	read := make(chan answer, 1)
	go func() {
		text, err := d.read()
		read <- answer{text, err}
	}()
	select {
	case a := <-read:
		return a.text, a.err
	case <-ctx.Done():
		// The program ends now, which ends the read.
		fmt.Fprintln(d.out)
		return "", errInterrupted
	}
}

// read reads a line byte by byte, so that the next answer stays unread.
func (d *dialog) read() (string, error) {
	var text []byte
	for b := make([]byte, 1); ; {
		n, err := d.in.Read(b)
		switch {
		case n == 1 && b[0] == '\n':
			return strings.TrimSpace(string(text)), nil
		case n == 1 && len(text) == maxAnswer:
			return "", fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
		case n == 1:
			text = append(text, b[0])
		case errors.Is(err, io.EOF):
			return "", errors.New("the terminal was closed")
		case err != nil:
			return "", fmt.Errorf("read the answer: %w", err)
		}
	}
}

// yes asks a question. Enter alone means the usual answer.
func (d *dialog) yes(ctx context.Context, prompt string, usual bool) (bool, error) {
	keys := map[bool]string{true: "[Y/n]", false: "[y/N]"}[usual]
	for {
		text, err := d.line(ctx, prompt+" "+keys)
		if err != nil {
			return false, err
		}
		switch strings.ToLower(text) {
		case "":
			return usual, nil
		case "y", "yes":
			return true, nil
		case "n", "no":
			return false, nil
		}
		fmt.Fprintln(d.out, "Please type y or n.")
	}
}

// choose returns the index of the choice that a person takes. Enter alone takes the first. It returns -1 if the person ends
// the conversation with 0.
func (d *dialog) choose(ctx context.Context, prompt string, choices []string) (int, error) {
	for i, c := range choices {
		fmt.Fprintf(d.out, "  %d  %s\n", i+1, c)
	}
	fmt.Fprintln(d.out, "  0  none of these: end here")
	for {
		text, err := d.line(ctx, prompt+" [1]")
		if err != nil {
			return 0, err
		}
		if text == "" {
			return 0, nil
		}
		if n, err := strconv.Atoi(text); err == nil && n >= 0 && n <= len(choices) {
			return n - 1, nil
		}
		fmt.Fprintf(d.out, "Please type a number from 0 to %d.\n", len(choices))
	}
}

// newDialog returns nil unless in and out are terminals.
func newDialog(in io.Reader, out io.Writer) *dialog {
	f, ok := in.(*os.File)
	if !ok || !output.IsTerminal(f) || !output.IsTerminal(out) {
		return nil
	}
	return &dialog{in: in, out: out}
}
