package prompt

import (
	"context"
	"errors"

	"p11-agent/agent/approval"
	"p11-agent/pinentry"
	"p11-agent/pinentry/secret"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A pausingAsker is the asker of Pausing.
type pausingAsker struct {
	pin.Asker
	questions *approval.Questions
}

// Pausing returns an asker that asks as the given asker does. It refuses the requests of a
// client that has to wait because a person has refused its requests.
func Pausing(asker pin.Asker, questions *approval.Questions) pin.Asker {
	return &pausingAsker{asker, questions}
}

// Ask opens the dialogue, which shows nothing yet.
func (a *pausingAsker) Ask(ctx context.Context, about pin.Request) (pin.Dialogue, error) {
	d := &pausingDialogue{asking: a.questions.About(tokenURI(about.Token), about.Waiting, false)}
	about.Waiting = d.asking
	err := d.asking.Show(ctx, func(ctx context.Context) (_ approval.Outcome, err error) {
		d.Dialogue, err = a.Asker.Ask(ctx, about)
		return approval.Unanswered, err
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

var _ pin.ReaderObserver = (*pausingDialogue)(nil)

// A pausingDialogue is a dialogue of a pausingAsker.
type pausingDialogue struct {
	pin.Dialogue
	asking *approval.Asking
	note   func(approval.Outcome) // of the PIN that is typed on the reader; nil: there is an answer
}

func (d *pausingDialogue) PIN(ctx context.Context, problem string) (typed *secret.Secret, err error) {
	err = d.asking.Show(ctx, func(ctx context.Context) (_ approval.Outcome, err error) {
		typed, err = d.Dialogue.PIN(ctx, problem)
		return outcome(err), err
	})
	return typed, err
}

func (d *pausingDialogue) LastTry(ctx context.Context, problem string) (yes bool, err error) {
	err = d.asking.Show(ctx, func(ctx context.Context) (approval.Outcome, error) {
		yes, err = d.Dialogue.LastTry(ctx, problem)
		if err == nil && !yes {
			return approval.OutcomeNo, nil
		}
		return outcome(err), err
	})
	return yes && err == nil, err
}

func (d *pausingDialogue) Notice(ctx context.Context) error {
	return d.asking.Show(ctx, func(ctx context.Context) (approval.Outcome, error) {
		d.note = func(o approval.Outcome) { d.asking.Note(ctx, o) }
		err := d.Dialogue.Notice(ctx)
		if err == nil {
			return approval.Unanswered, nil // the answer is given on the reader
		}
		if errors.Is(err, pin.ErrCancelled) {
			d.note = nil
		}
		return outcome(err), err
	})
}

// TypedOnReader implements pin.ReaderObserver.
func (d *pausingDialogue) TypedOnReader(err error) {
	if d.note != nil {
		d.note(outcome(err))
	}
}

// outcome returns the outcome of a question that has no button for yes.
func outcome(err error) approval.Outcome {
	switch {
	case err == nil:
		return approval.OutcomeYes
	case errors.Is(err, pin.ErrCancelled), errors.Is(err, pinentry.ErrTimeout):
		return approval.OutcomeNo
	}
	return approval.Unanswered
}

func tokenURI(id wire.TokenID) string { return pkcs11uri.ForKey(id, "", nil).String() }
