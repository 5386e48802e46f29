package prompt

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/pinentry"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/token/pin"
)

// A terminalAsker is the asker of WithTerminal. The PIN goes from the terminal into locked
// memory, and the terminal does not show it.
type terminalAsker struct {
	asker   pin.Asker
	install string
}

// WithTerminal returns an asker for a command that a person runs. It asks as the given asker
// does. Where that asker has no place, it asks at the terminal of this process. install is the
// command that installs a pinentry program, for the error.
func WithTerminal(asker pin.Asker, install string) pin.Asker {
	return terminalAsker{asker, install}
}

// Ask opens a dialogue. It fails when there is neither a pinentry nor a terminal.
func (a terminalAsker) Ask(ctx context.Context, about pin.Request) (pin.Dialogue, error) {
	d, err := a.asker.Ask(ctx, about)
	if !errors.Is(err, pinentry.ErrNoPrompt) {
		return d, err
	}
	q, terr := OpenInput(false)
	if terr != nil {
		return nil, exit.WithHint(
			errors.New("the PIN cannot be asked for: no pinentry program can show a prompt, and this command has no terminal"),
			fmt.Sprintf("run it at a terminal, or install a pinentry program: %s", a.install),
		)
	}
	return &terminalDialogue{q, about}, nil
}

// terminalDialogue asks at a terminal.
type terminalDialogue struct {
	ask   *Input
	about pin.Request
}

func (d *terminalDialogue) say(lines ...string) error {
	_, err := io.WriteString(d.ask.in, strings.Join(lines, "\n")+"\n")
	return err
}

// PIN asks for the PIN. An empty line declines.
func (d *terminalDialogue) PIN(ctx context.Context, problem string) (*secret.Secret, error) {
	var lines []string
	if problem != "" {
		lines = append(lines, plain.Line(problem))
	}
	lines = append(lines, fmt.Sprintf("Enter the PIN of token %s (serial %s).",
		cmp.Or(plain.Name(d.about.Token.Label, maxNamed), "without label"), cmp.Or(plain.Name(d.about.Token.Serial, maxNamed), "unknown")))
	lines = append(lines, moduleLines(d.about)...)
	if d.about.Tries != pin.TriesUnknown {
		lines = append(lines, "Note: "+d.about.Tries.String()+".")
	}
	if err := d.say(lines...); err != nil {
		return nil, err
	}
	typed, err := d.ask.ReadSecret(ctx, "PIN: ")
	if err == nil && typed.Len() == 0 {
		typed.Wipe()
		return nil, pin.ErrCancelled
	}
	return typed, err
}

// LastTry asks whether to use the last try. Only the whole word is a yes.
func (d *terminalDialogue) LastTry(ctx context.Context, problem string) (bool, error) {
	lines := []string{"One try is left: a wrong PIN now locks the token.", `To use the last try, type "yes".`}
	if problem != "" {
		lines = append([]string{plain.Line(problem)}, lines...)
	}
	if err := d.say(lines...); err != nil {
		return false, err
	}
	answer, err := d.ask.ReadSecret(ctx, "Use the last try? ")
	if err != nil {
		return false, err
	}
	defer answer.Wipe()
	return bytes.Equal(answer.Bytes(), []byte("yes")), nil
}

// Notice says that the reader asks, and stays until ctx ends.
func (d *terminalDialogue) Notice(ctx context.Context) error {
	if err := d.say("Please enter the PIN on the card reader."); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// Close gives the terminal back.
func (d *terminalDialogue) Close() error {
	d.ask.Close()
	return nil
}

var (
	_ pin.Asker    = terminalAsker{}
	_ pin.Dialogue = (*terminalDialogue)(nil)
)
