package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

var (
	_ pin.Asker = (*asker)(nil)

	_ pin.Dialogue       = (*dialogue)(nil)
	_ approval.Confirmer = (*asker)(nil)
	_ approval.Inserter  = (*asker)(nil)
)

// tellsItself is in the context of a login whose client tells the person to type the PIN
// on the reader.
type tellsItself struct{}

// clientTells marks the context of a login whose client tells the person to type the PIN
// on the reader: the agent shows no notice.
func clientTells(ctx context.Context) context.Context {
	return context.WithValue(ctx, tellsItself{}, true)
}

// Ask opens a dialogue about one token.
func (a *asker) Ask(ctx context.Context, about pin.Request) (pin.Dialogue, error) {
	of := "the token " + cmp.Or(plain.Name(about.Token.Label, maxNamed), "without label")
	d := &dialogue{
		pins:    &conversation{asker: a, what: "the PIN of " + of, hint: "To give the PIN in a terminal, run: p11-agent login " + output.ShellWord(about.Key)},
		consent: &conversation{asker: a, what: "the last try of " + of, consent: true, hint: a.consentHint()},
		about:   about,
		quiet:   ctx.Value(tellsItself{}) != nil,
	}
	a.note(d, true)
	first := d.pins
	if about.Tries == pin.TriesLast {
		first = d.consent
	}
	var err error
	if first == d.pins && about.Pad && d.quiet {
		// The reader asks, but not for a client in a pause.
		err = waiting.Ask(ctx, waiting.Question{Ask: func(context.Context) error { return nil }})
	} else {
		// Without a place there is nothing to begin with.
		err = first.ask(ctx, func(context.Context, *pinentry.Dialogue) error { return nil })
	}
	if err != nil {
		_ = d.Close() // never fails
		return nil, err
	}
	return d, nil
}

// note keeps the list of the dialogues that are open.
func (a *asker) note(d *dialogue, open bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if open {
		a.open[d] = struct{}{}
	} else {
		delete(a.open, d)
	}
}

// promptAt tells where a person is being asked about a token; empty: nowhere. It may be
// called from any goroutine.
func (a *asker) promptAt(t wire.TokenID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for d := range a.open {
		for _, c := range []*conversation{d.pins, d.consent} {
			if at := c.shown.Load(); at != nil && d.about.Token == t {
				return at.name
			}
		}
	}
	return ""
}

// consentHint says what to do where there is no place for consent.
func (a *asker) consentHint() string {
	hint := "To be asked, give the service manager a display (systemctl --user import-environment DISPLAY WAYLAND_DISPLAY)"
	if !a.displayOnly.Load() {
		hint += ", or run the client in the foreground of a login shell or of tmux"
	}
	return hint
}

// Confirm asks whether a key may be used, and for how long when that is a question.
func (a *asker) Confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	c := &conversation{asker: a, what: "the use of a key", consent: true, hint: a.consentHint()}
	defer c.close()
	var answer approval.Answer
	err := c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		if use := request.UseFrom(ctx); use != nil {
			r.Use = use // of the one who is asked
		}
		answer, err = confirm(ctx, d, r, a.patience.get())
		return err
	})
	if err != nil {
		return approval.Answer{}, err
	}
	return answer, nil
}

// confirm asks on one dialogue.
func confirm(ctx context.Context, d *pinentry.Dialogue, r approval.Question, patience time.Duration) (approval.Answer, error) {
	text := confirmText(r)
	prompt := pinentry.Prompt{
		Title: "p11-agent", Description: "Allow " + useOf(r.Key) + "?\n" + text,
		OK: allow(r.Plain), Cancel: "_Deny", Timeout: patience,
	}
	if approval.Again(ctx) || !r.Offer {
		// To be left alone matters more than other lengths do.
		yes, err := confirmOrBlock(ctx, d, prompt)
		return approval.Answer{Allowed: yes, For: r.Plain}, err
	}
	prompt.Other = "Allow _longer..."
	if r.Plain != approval.Once {
		prompt.Other = "Allow _otherwise..."
	}
	lengths := [2]approval.Remember{approval.Once, approval.UntilLock}
	switch r.Plain {
	case approval.Once:
		lengths[0] = rememberShort
	case approval.UntilLock:
		lengths[1] = rememberShort
	}
	choice, err := d.Choose(ctx, prompt)
	if err == nil && choice == pinentry.ChoiceOther {
		// Who closes this one has not said yes: once is to be had before.
		prompt.Description = "Allow " + useOf(r.Key) + " for how long?\n" + text
		prompt.OK, prompt.Other = allow(lengths[0]), allow(lengths[1])
		choice, err = d.Choose(ctx, prompt)
		r.Plain = lengths[0]
		if choice == pinentry.ChoiceOther {
			r.Plain = lengths[1]
		}
	}
	if err != nil || choice == pinentry.ChoiceCancel {
		return approval.Answer{}, err
	}
	return approval.Answer{Allowed: true, For: r.Plain}, nil
}

// confirmOrBlock asks for yes or no. A client that had to wait before may also be refused
// with "no to everything from here", which is approval.ErrNoToAll.
func confirmOrBlock(ctx context.Context, d *pinentry.Dialogue, prompt pinentry.Prompt) (bool, error) {
	if !approval.Again(ctx) {
		return d.Confirm(ctx, prompt)
	}
	prompt.Other = "Deny _all from here"
	choice, err := d.Choose(ctx, prompt)
	if choice == pinentry.ChoiceOther {
		err = approval.ErrNoToAll
	}
	return choice == pinentry.ChoiceOK, err
}

// rememberShort is the length of time that is offered to everybody.
const rememberShort = approval.Remember(15 * time.Minute)

// allow is the text of a button.
func allow(lasts approval.Remember) string {
	switch lasts {
	case approval.Once:
		return "Allow _once"
	case approval.UntilLock:
		return "Allow _until lock"
	}
	return "Allow _" + lasts.String()
}

// confirmText says what is asked about.
func confirmText(r approval.Question) string {
	lines := []string{labelledLine(r.Key, r.Comment), r.KeyFingerprint}
	if r.Plain != approval.Once {
		lines = append(lines, "Yes counts "+r.Plain.String()+".")
	}
	return about(useLines(r.Use), lines, []string{"Asked because of " + r.Why + ".", requester(r.Caller.Who())})
}

// Insert asks to insert a token. A yes allows nothing: the agent looks at the tokens. So
// the client's own places will do.
func (a *asker) Insert(ctx context.Context, w approval.Wanted) (yes bool, err error) {
	c := &conversation{asker: a, what: "a token that is not inserted", hint: "Insert the token and try again"}
	defer c.close()
	err = c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		yes, err = confirmOrBlock(ctx, d, pinentry.Prompt{
			Title: "p11-agent",
			Description: fmt.Sprintf("Please insert the token %s.\n", strings.Join(w.Tokens, " or ")) +
				about(useLines(request.UseFrom(ctx)), []string{commentLine(w.Comment), w.Fingerprint, requester(request.PeerFrom(ctx))}),
			OK:     "_It is in",
			Cancel: "_Cancel",
		})
		return err
	})
	return yes && err == nil, err
}

// dialogue asks about the PIN of a token: for the PIN where the person is, and for
// consent where the client has no say.
type dialogue struct {
	pins, consent *conversation
	about         pin.Request
	quiet         bool // the client tells by itself what to do at the reader
}

// description is for the one who is asked, below the first line.
func (d *dialogue) description(ctx context.Context) string {
	use, t := request.UseFrom(ctx), d.about.Token
	lines := []string{keyLine(t, d.about.Label, d.about.Key, d.about.ID, use), tokenLine(t, d.about.Reader)}
	lines = append(lines, moduleLines(d.about)...)
	if d.about.EachUse {
		lines = append(lines, "This key asks for the PIN each time it is used.")
	}
	if d.about.Tries == pin.TriesLow {
		lines = append(lines, fewerTries)
	}
	return about(useLines(use), lines, []string{requester(request.PeerFrom(ctx))})
}

func (d *dialogue) PIN(ctx context.Context, problem string) (typed *secret.Secret, err error) {
	err = d.pins.ask(ctx, func(ctx context.Context, on *pinentry.Dialogue) (err error) {
		typed, err = on.PIN(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + pinOf(d.about.Token) + "\n" + d.description(ctx),
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

func (d *dialogue) LastTry(ctx context.Context, problem string) (yes bool, err error) {
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
			Description: "Use the last try for " + pinOf(d.about.Token) + "?\n" + problem +
				"One try is left: a wrong PIN now locks the token.\n" + given + d.description(ctx),
			OK:     "_Try the PIN",
			Cancel: "_Stop",
		})
		return err
	})
	return yes && err == nil, err
}

func (d *dialogue) Notice(ctx context.Context) error {
	if d.quiet {
		return waiting.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
	}
	// It does not move: what is typed on the reader would be lost.
	err := d.pins.askFor(ctx, 0, func(ctx context.Context, on *pinentry.Dialogue) error {
		return on.Message(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + pinOf(d.about.Token) + " on the card reader\n" + d.description(ctx),
		})
	})
	if errors.Is(err, pinentry.ErrCancelled) {
		err = pin.ErrCancelled
	}
	return err
}

func (d *dialogue) Close() error {
	d.pins.note(d, false)
	d.pins.close()
	d.consent.close()
	return nil
}
