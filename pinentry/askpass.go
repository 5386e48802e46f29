package pinentry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// maxAskpassText is the most bytes of the argument of an askpass program.
const maxAskpassText = 2000

// askpass runs an SSH_ASKPASS program for each question, as ssh-agent(1) runs ssh-askpass(1). The
// text is its argument. SSH_ASKPASS_PROMPT says what kind of question it is. The program prints the
// answer. Any exit status but 0 is a cancel.
type askpass struct {
	file string
	env  []string
}

// ask runs the program and reads its output, without the final newline.
func (a *askpass) ask(ctx context.Context, prompt Prompt, kind string) (answer *secret.Secret, err error) {
	var texts []string
	for _, text := range []string{prompt.Title, prompt.withError(), prompt.Label} {
		if text != "" {
			texts = append(texts, text)
		}
	}
	text := plain.Lines(strings.Join(texts, "\n"))
	env := a.env
	if kind != "" {
		env = append(env[:len(env):len(env)], "SSH_ASKPASS_PROMPT="+kind)
	}
	// Room for a newline of two bytes, and for one byte that shows that there is more.
	printed, err := secret.New(MaxPIN + 3)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			printed.Wipe()
		}
	}()

	child, err := run(a.file, []string{a.file, plain.Shorten(text, maxAskpassText)}, env, nil)
	if err != nil {
		return nil, &cannotAskError{fmt.Errorf("SSH_ASKPASS: %w", err)}
	}
	defer child.close()
	_ = child.in.Close()
	release := child.guard(ctx)
	n, err := io.ReadFull(child.out, printed.Buffer())
	printed.SetLen(n)
	tooLong := err == nil
	if tooLong {
		child.stop()
	}
	<-child.done
	if err := release(); err != nil {
		return nil, err
	}
	switch status := child.cmd.ProcessState; {
	case tooLong:
		return nil, fmt.Errorf("SSH_ASKPASS: %w", errTooLong)
	case !status.Exited():
		return nil, &cannotAskError{child.blame(fmt.Errorf("SSH_ASKPASS: %w", child.ended()))}
	case !status.Success():
		return nil, child.blame(ErrCancelled)
	}
	b := bytes.TrimSuffix(printed.Bytes(), []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	printed.SetLen(len(b))
	return printed, nil
}

func (a *askpass) pin(ctx context.Context, prompt Prompt) (*secret.Secret, error) {
	pin, err := a.ask(ctx, prompt, "")
	if err != nil {
		return nil, err
	}
	switch {
	case pin.Len() > MaxPIN:
		err = errTooLong
	case bytes.IndexByte(pin.Bytes(), '\n') >= 0:
		err = errors.New("printed more than one line")
	}
	if err != nil {
		pin.Wipe()
		return nil, fmt.Errorf("SSH_ASKPASS: %w", err)
	}
	return pin, nil
}

func (a *askpass) confirm(ctx context.Context, prompt Prompt) error {
	answer, err := a.ask(ctx, prompt, "confirm")
	if err != nil {
		return err
	}
	defer answer.Wipe()
	// A program that does not know SSH_ASKPASS_PROMPT has the person type a text, and
	// succeeds with any text.
	if answer.Len() > 0 && !bytes.EqualFold(answer.Bytes(), []byte("yes")) {
		return ErrCancelled
	}
	return nil
}

func (a *askpass) message(ctx context.Context, prompt Prompt) error {
	answer, err := a.ask(ctx, prompt, "none")
	answer.Wipe()
	return err
}

func (a *askpass) again(context.Context) error { return nil }
func (a *askpass) close()                      {}
