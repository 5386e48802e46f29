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
	d := &pausingDialogue{questions: a.questions, about: tokenURI(about.Token)}
	err := d.ask(ctx, func(ctx context.Context) (_ approval.Outcome, err error) {
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
	questions *approval.Questions
	about     string                 // the token, for people
	note      func(approval.Outcome) // of the PIN that is typed on the reader; nil: there is an answer
}

func (d *pausingDialogue) ask(ctx context.Context, show func(context.Context) (approval.Outcome, error)) error {
	return d.questions.Ask(ctx, d.about, false, show)
}

func (d *pausingDialogue) PIN(ctx context.Context, problem string) (typed *secret.Secret, err error) {
	err = d.ask(ctx, func(ctx context.Context) (_ approval.Outcome, err error) {
		typed, err = d.Dialogue.PIN(ctx, problem)
		return outcome(err), err
	})
	return typed, err
}

func (d *pausingDialogue) LastTry(ctx context.Context, problem string) (yes bool, err error) {
	err = d.ask(ctx, func(ctx context.Context) (approval.Outcome, error) {
		yes, err = d.Dialogue.LastTry(ctx, problem)
		if err == nil && !yes {
			return approval.OutcomeNo, nil
		}
		return outcome(err), err
	})
	return yes && err == nil, err
}

func (d *pausingDialogue) Notice(ctx context.Context) error {
	return d.ask(ctx, func(ctx context.Context) (approval.Outcome, error) {
		d.note = func(o approval.Outcome) { d.questions.Note(ctx, d.about, o) }
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
