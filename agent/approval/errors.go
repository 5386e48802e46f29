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
