package token

import (
	"errors"
	"fmt"
	"time"
)

var (
	// ErrAbsent says that no present token holds the key. It has a method
	// Absent, for those who must not know this package.
	ErrAbsent error = absentError{}
	// ErrClosed says that the Store has been closed.
	ErrClosed = errors.New("the agent is stopping")
	// ErrNoMatch says that a URI selects nothing that is present.
	ErrNoMatch = errors.New("no key matches")
)

// A ModuleError says what is wrong with a PKCS#11 module or its process.
type ModuleError struct {
	Module string // its name in the registry or the configuration
	Path   string // its file
	Err    error
	Retry  time.Time // when its process is started again; zero when not by itself
}

func (e *ModuleError) Error() string {
	return fmt.Sprintf("PKCS#11 module %q: %v", e.Module, e.Err)
}

func (e *ModuleError) Unwrap() error { return e.Err }

// An AmbiguousError says that one token is seen through several modules, so that
// it is not clear which of them is to be used.
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

// Absent tells this error from others.
func (absentError) Absent() bool { return true }
