package token

import (
	"errors"
	"fmt"
	"time"

	"p11-agent/token/wire"
)

var (
	// ErrAbsent says that no present token holds the key. It has a method
	// Absent, for those who must not know this package.
	ErrAbsent error = absentError{}
	// ErrCancelled says that a person declined to give a PIN. It has a method
	// Declined, likewise.
	ErrCancelled error = cancelledError{}
	// ErrClosed says that the Store has been closed.
	ErrClosed = errors.New("the agent is stopping")
	// ErrNoMatch says that a URI selects nothing that is present.
	ErrNoMatch = errors.New("no key matches")
)

// Tries is what a token says is left of the tries to give its PIN. PKCS#11 has
// flags for this, no number (v2.40 section 4.4, CKF_USER_PIN_*).
type Tries int

// The values of Tries. Not every token sets every flag: Unknown is "no flag".
const (
	TriesUnknown Tries = iota
	TriesLow           // a wrong PIN was given since the last right one
	TriesLast          // one try is left
	TriesNone          // the PIN is locked
)

func triesOf(flags uint64) Tries {
	switch {
	case flags&wire.CKFUserPINLocked != 0:
		return TriesNone
	case flags&wire.CKFUserPINFinalTry != 0:
		return TriesLast
	case flags&wire.CKFUserPINCountLow != 0:
		return TriesLow
	default:
		return TriesUnknown
	}
}

// String says it to a person.
func (t Tries) String() string {
	switch t {
	case TriesLow:
		return "fewer tries left than before"
	case TriesLast:
		return "one try left"
	case TriesNone:
		return "no tries left, the PIN is locked"
	default:
		return "the token does not say how many tries are left"
	}
}

// A PINError says that a token refused a PIN, or that no PIN was tried because
// it would have been refused or was the last try. Asking again may cost a try,
// so only a person may decide to.
type PINError struct {
	Token string // label, as its owner knows it
	Tries Tries
	Tried bool  // a PIN went to the token
	Err   error // why, in the token's or the agent's own words
}

func (e *PINError) Error() string {
	switch {
	case e.Tries == TriesNone:
		return fmt.Sprintf("the PIN of token %q is locked: unlock it with its PUK or SO PIN, or wait, if it is that of a TPM", e.Token)
	case !e.Tried:
		return fmt.Sprintf("the PIN of token %q was not tried: %v", e.Token, e.Err)
	default:
		return fmt.Sprintf("token %q refused the PIN (%s): %v", e.Token, e.Tries, e.Err)
	}
}

func (e *PINError) Unwrap() error { return e.Err }

// loginError is a failure of a login that says nothing of the PIN.
type loginError struct {
	token string
	// attempted tells that a PIN may have reached the token: whoever tries again
	// may use up another try.
	attempted bool
	err       error
}

func (e *loginError) Error() string { return fmt.Sprintf("log in to token %q: %v", e.token, e.err) }
func (e *loginError) Unwrap() error { return e.err }

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

type cancelledError struct{}

func (cancelledError) Error() string { return "the PIN prompt was cancelled" }

// Declined tells this error from others.
func (cancelledError) Declined() bool { return true }
