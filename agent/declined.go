package agent

import "errors"

var (
	errDeclined      = errors.New("it was not confirmed")
	errNobody        = errors.New("nobody can be asked for confirmation")
	errNotInserted   = errors.New("nobody inserted it in time")
	errDeclinedToken = errors.New("the person asked has declined to insert it")
)

// isDeclined tells whether a person has said no, who knows why it failed.
func isDeclined(err error) bool {
	if errors.Is(err, errDeclined) || errors.Is(err, errDeclinedToken) {
		return true
	}
	e, ok := errors.AsType[interface {
		error
		Declined() bool
	}](err)
	return ok && e.Declined()
}
