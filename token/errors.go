package token

import (
	"errors"
	"fmt"

	"p11-agent/token/supervise"
)

var (
	// ErrAbsent says that no present token holds the key. It has a method Absent, for packages
	// that must not import this one.
	ErrAbsent error = absentError{}
	// ErrClosed says that the Store has been closed.
	ErrClosed = supervise.ErrClosed
	// ErrNoMatch says that a URI selects no present key.
	ErrNoMatch = errors.New("no key matches")
)

// A ModuleError says what is wrong with a PKCS#11 module or its process.
type ModuleError = supervise.ModuleError

// An AmbiguousError says that several modules show a token, and that none of them is its home.
type AmbiguousError struct {
	Token   string
	Modules []string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("token %q is seen through the modules %q: add ?module-name= to the URI to choose one",
		e.Token, e.Modules)
}

type absentError struct{}

func (absentError) Error() string { return "the token is not present" }

// Absent distinguishes this error from other errors.
func (absentError) Absent() bool { return true }
