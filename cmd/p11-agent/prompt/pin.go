package prompt

import (
	"cmp"
	"context"
	"errors"

	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/pin"
)

// Ask opens a dialogue about one token.
func (a *Asker) Ask(ctx context.Context, about pin.Request) (pin.Dialogue, error) {
	of := "the token " + cmp.Or(plain.Name(about.Token.Label, maxNamed), "without label")
	d := &pinDialogue{
		pins:    &prompter{Asker: a, waiting: about.Waiting, what: "the PIN of " + of, hint: "To give the PIN in a terminal, run: p11-agent login " + output.ShellWord(about.Key)},
		consent: &prompter{Asker: a, waiting: about.Waiting, what: "the last try of " + of, consent: true, hint: a.consentHint()},
		about:   about,
	}
	a.note(d, true)
	first := d.pins
	if about.Tries == pin.TriesLast {
		first = d.consent
	}
	var err error
	if first == d.pins && about.Pad && about.ClientTells {
		// The reader asks, but not for a client in a pause.
		err = waiting.Ask(ctx, about.Waiting, waiting.Question{Ask: func(context.Context) error { return nil }})
	} else {
		// Without a place the dialogue fails now.
		err = first.ask(ctx, func(context.Context, *pinentry.Dialogue) error { return nil })
	}
	if err != nil {
		_ = d.Close() // never fails
		return nil, err
	}
	return d, nil
}

// note keeps the list of open dialogues.
func (a *Asker) note(d *pinDialogue, open bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if open {
		a.open[d] = struct{}{}
	} else {
		delete(a.open, d)
	}
}

// A pinDialogue asks about the PIN of a token: for the PIN where the client runs, and for
// consent to the last try where the client has no say.
type pinDialogue struct {
	pins, consent *prompter
	about         pin.Request
}

// description returns the lines below the first line of a prompt.
func (d *pinDialogue) description(ctx context.Context) string {
	use, t := request.UseFrom(ctx), d.about.Token
	lines := []string{KeyLine(t, d.about.Label, d.about.Key, d.about.ID, use), TokenLine(t, d.about.Reader)}
	lines = append(lines, moduleLines(d.about)...)
	if d.about.EachUse {
		lines = append(lines, "This key asks for the PIN each time it is used.")
	}
	if d.about.Tries == pin.TriesLow {
		lines = append(lines, FewerTries)
	}
	return about(UseLines(use), lines, []string{Requester(request.PeerFrom(ctx))})
}

// PIN asks for the PIN.
func (d *pinDialogue) PIN(ctx context.Context, problem string) (typed *secret.Secret, err error) {
	err = d.pins.ask(ctx, func(ctx context.Context, on *pinentry.Dialogue) (err error) {
		typed, err = on.PIN(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + PINOf(d.about.Token) + "\n" + d.description(ctx),
			Label:       "PIN:",
			Error:       problem,
		})
		return err
	})
	if errors.Is(err, pinentry.ErrCancelled) || errors.Is(err, pinentry.ErrEmpty) {
		err = pin.ErrCancelled
	}
	return typed, err
}

// LastTry asks whether to use the last try.
func (d *pinDialogue) LastTry(ctx context.Context, problem string) (yes bool, err error) {
	if problem != "" {
		problem += "\n"
	}
	given := ""
	if d.about.Supplied {
		given = "The program that asks has given the PIN.\n"
	}
	err = d.consent.ask(ctx, func(ctx context.Context, on *pinentry.Dialogue) (err error) {
		yes, err = on.Confirm(ctx, pinentry.Prompt{
			Title: "p11-agent",
			Description: "Use the last try for " + PINOf(d.about.Token) + "?\n" + problem +
				"One try is left: a wrong PIN now locks the token.\n" + given + d.description(ctx),
			OK:     "_Try the PIN",
			Cancel: "_Stop",
		})
		return err
	})
	return yes && err == nil, err
}

// Notice tells the person to type the PIN on the reader, until ctx ends.
func (d *pinDialogue) Notice(ctx context.Context) error {
	if d.about.ClientTells {
		return waiting.Ask(ctx, d.about.Waiting, waiting.Question{Ask: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
	}
	// The notice does not move: the reader would lose what the person types.
	err := d.pins.askFor(ctx, 0, func(ctx context.Context, on *pinentry.Dialogue) error {
		return on.Message(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + PINOf(d.about.Token) + " on the card reader\n" + d.description(ctx),
		})
	})
	if errors.Is(err, pinentry.ErrCancelled) {
		err = pin.ErrCancelled
	}
	return err
}

// Close ends the prompts.
func (d *pinDialogue) Close() error {
	d.pins.note(d, false)
	d.pins.close()
	d.consent.close()
	return nil
}
