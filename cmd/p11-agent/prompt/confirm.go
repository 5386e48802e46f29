package prompt

import (
	"context"
	"fmt"
	"strings"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
)

// Confirm asks whether a client may use a key, and for how long when r.Offer is set.
func (a *Asker) Confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	c := &prompter{Asker: a, waiting: r.Asking, what: "the use of a key", consent: true, hint: a.consentHint()}
	defer c.close()
	var answer approval.Answer
	err := c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		if use := request.UseFrom(ctx); use != nil {
			r.Use = use // of the client whose person sees the question
		}
		answer, err = confirm(ctx, d, r, a.patience.get())
		return err
	})
	if err != nil {
		return approval.Answer{}, err
	}
	return answer, nil
}

// consentHint returns the next step when no place can ask for consent.
func (a *Asker) consentHint() string {
	hint := "To be asked, give the service manager a display (systemctl --user import-environment DISPLAY WAYLAND_DISPLAY)"
	if !a.displayOnly.Load() {
		hint += ", or run the client in the foreground of a login shell or of tmux"
	}
	return hint
}

// confirm asks in one dialogue.
func confirm(ctx context.Context, d *pinentry.Dialogue, r approval.Question, patience time.Duration) (approval.Answer, error) {
	text := confirmText(r)
	prompt := pinentry.Prompt{
		Title: "p11-agent", Description: "Allow " + useOf(r.Key) + "?\n" + text,
		OK: allow(r.Plain), Cancel: "_Deny", Timeout: patience,
	}
	again := r.Asking.Again()
	if again || !r.Offer {
		// The button that refuses all requests takes the place of other lengths.
		yes, err := confirmOrBlock(ctx, d, prompt, again)
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
		// Closing this question is a no: the first question has the button for once.
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

// confirmOrBlock asks for yes or no. If again is true, the client had to wait before. Then the
// person can also refuse all its requests: approval.ErrNoToAll.
func confirmOrBlock(ctx context.Context, d *pinentry.Dialogue, prompt pinentry.Prompt, again bool) (bool, error) {
	if !again {
		return d.Confirm(ctx, prompt)
	}
	prompt.Other = "Deny _all from here"
	choice, err := d.Choose(ctx, prompt)
	if choice == pinentry.ChoiceOther {
		err = approval.ErrNoToAll
	}
	return choice == pinentry.ChoiceOK, err
}

// rememberShort is the length of time that every question offers.
const rememberShort = approval.Remember(15 * time.Minute)

// allow returns the text of a button.
func allow(lasts approval.Remember) string {
	switch lasts {
	case approval.Once:
		return "Allow _once"
	case approval.UntilLock:
		return "Allow _until lock"
	}
	return "Allow _" + lasts.String()
}

// confirmText returns the lines about the request.
func confirmText(r approval.Question) string {
	lines := []string{labelledLine(r.Key, r.Comment), r.KeyFingerprint}
	if r.Plain != approval.Once {
		lines = append(lines, "Yes counts "+r.Plain.String()+".")
	}
	return about(UseLines(r.Use), lines, []string{"Asked because of " + r.Why + ".", Requester(r.Caller.Client())})
}

// Insert asks to insert a token. A yes allows nothing: the agent looks at the tokens. So the
// question may appear at the client's own places.
func (a *Asker) Insert(ctx context.Context, w approval.Wanted) (yes bool, err error) {
	c := &prompter{Asker: a, waiting: w.Asking, what: "a token that is not inserted", hint: "Insert the token and try again"}
	defer c.close()
	err = c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		yes, err = confirmOrBlock(ctx, d, pinentry.Prompt{
			Title: "p11-agent",
			Description: fmt.Sprintf("Please insert the token %s.\n", strings.Join(w.Tokens, " or ")) +
				about(UseLines(request.UseFrom(ctx)), []string{commentLine(w.Comment), w.Fingerprint, Requester(request.PeerFrom(ctx))}),
			OK:     "_It is in",
			Cancel: "_Cancel",
		}, w.Asking.Again())
		return err
	})
	return yes && err == nil, err
}
