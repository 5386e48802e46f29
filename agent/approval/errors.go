package approval

import "errors"

// The errors of a use that a person does not allow.
var (
	ErrDeclined      = errors.New("the use of the key was not confirmed")
	ErrNoPrompt      = errors.New("there is no way to ask for confirmation")
	ErrNotInserted   = errors.New("the token was not inserted in time")
	ErrTokenDeclined = errors.New("the person asked has declined to insert it")
)

// Declined tells whether err says that a person answered no. Then the person knows why the
// request failed.
func Declined(err error) bool {
	if errors.Is(err, ErrDeclined) || errors.Is(err, ErrTokenDeclined) {
		return true
	}
	e, ok := errors.AsType[interface {
		error
		Declined() bool
	}](err)
	return ok && e.Declined()
}

// ErrNoToAll says that a person refuses all requests from the place that this request
// comes from.
var ErrNoToAll error = declinedAllError{}

type declinedAllError struct{}

func (declinedAllError) Error() string  { return "a person has refused everything from there" }
func (declinedAllError) Declined() bool { return true }

// A DeniedError says that the configuration refuses a use.
type DeniedError struct{ Why string }

func (e *DeniedError) Error() string { return e.Why + " refuses it" }
