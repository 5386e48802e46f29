package approval

import (
	"context"
	"errors"

	"p11-agent/agent/request"
	"p11-agent/pinentry"
)

// A Question asks a person to confirm a use of a key.
type Question struct {
	*request.Use
	Key            request.Key // the key of a token that would sign; nil: it is on no token
	KeyFingerprint string      // the key's fingerprint in the form for people
	Why            string      // why the agent asks at all
	// Asking asks on behalf of the requests that wait for the answer.
	Asking *Asking
	// Plain is how long a yes counts if the person chooses no other length.
	Plain Remember
	// Offer says that the Confirmer may offer other lengths. Otherwise a choice of the
	// person does not count.
	Offer bool
}

// An Answer is the answer of a person. The zero value is no.
type Answer struct {
	Allowed bool
	For     Remember
}

// A Confirmer asks a person whether a key may be used.
type Confirmer interface {
	// Confirm returns the answer. If the person closes the question, the answer is no.
	// The error says that no prompt can show the question, or that no answer came in
	// time. Confirm ends with ctx. It asks through Question.Asking.
	//
	// If Asking.Again returns true, Confirm offers "no to everything from here". It returns
	// ErrNoToAll when the person chooses that.
	Confirm(ctx context.Context, r Question) (Answer, error)
}

// OutcomeOf returns the Outcome of a question for yes or no. err is the error of the
// prompt.
func OutcomeOf(yes bool, err error) Outcome {
	switch {
	case err == nil && yes:
		return OutcomeYes
	case err == nil, errors.Is(err, pinentry.ErrTimeout):
		return OutcomeNo
	case errors.Is(err, ErrNoToAll):
		return OutcomeNoToAll
	}
	return Unanswered
}
