// Package pin gets the PIN of a token from its source and has the token try it.
//
// The package promises that a token gets only PINs that a person or the configuration supplied
// for that token. One login at a time runs on a token; every other request for the token waits
// and shares the outcome. The package drops a kept PIN at the first refusal and does not try a
// refused PIN again. The last try needs the consent of a person.
//
// Package token/pinsource says which token gets the PIN of a URI. Package token calls the module
// process. The Asker shows prompts.
package pin

import (
	"context"
	"errors"
	"fmt"

	"p11-agent/token/wire"
)

var (
	// ErrCancelled says that a person declined to give a PIN. It has a method Declined, for
	// packages that must not import this one.
	ErrCancelled error = cancelledError{}
	// ErrForgotten says that the agent no longer remembers the token: see State.Close.
	ErrForgotten = errors.New("the token is no longer known")
)

type cancelledError struct{}

func (cancelledError) Error() string { return "the PIN prompt was cancelled" }

// Declined tells this error from others.
func (cancelledError) Declined() bool { return true }

// Tries is what a token says of the tries that are left for its PIN. PKCS#11 has flags for
// this and no number (v2.40 section 4.4, CKF_USER_PIN_*).
type Tries int

// The values of Tries. A token may set none of the flags: that is TriesUnknown.
const (
	TriesUnknown Tries = iota
	TriesLow           // a wrong PIN was given since the last right one
	TriesLast          // one try is left
	TriesNone          // the PIN is locked
)

// TriesOf reads the flags of CK_TOKEN_INFO.
func TriesOf(flags uint64) Tries {
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

// String returns the text for a person.
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

// An Error says that a token refused a PIN. It also says that the agent did not try a PIN,
// because the token would refuse it or because one try is left. Another attempt may cost a
// try, so only a person may decide to make it.
type Error struct {
	Token string // label
	Tries Tries
	Tried bool  // the token got a PIN
	Err   error // the reason, from the token or the agent
}

func (e *Error) Error() string {
	switch {
	case e.Tries == TriesNone:
		return fmt.Sprintf("the PIN of token %q is locked: unlock it with the PUK or SO PIN; the PIN of a TPM unlocks itself after a while", e.Token)
	case !e.Tried:
		return fmt.Sprintf("the PIN of token %q was not tried: %v", e.Token, e.Err)
	default:
		return fmt.Sprintf("token %q refused the PIN (%s): %v", e.Token, e.Tries, e.Err)
	}
}

func (e *Error) Unwrap() error { return e.Err }

// A LoginError is a failure of a login that says nothing of the PIN.
type LoginError struct {
	Token string // label
	// Attempted tells that the token may have got a PIN: another attempt may use up another
	// try.
	Attempted bool
	Err       error
}

func (e *LoginError) Error() string { return fmt.Sprintf("log in to token %q: %v", e.Token, e.Err) }
func (e *LoginError) Unwrap() error { return e.Err }

// mayBeTried tells whether a failed login may have used up a try.
func mayBeTried(err error) bool {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Tried
	}
	if e, ok := errors.AsType[*LoginError](err); ok {
		return e.Attempted
	}
	// A request that ends early does not hear what the token made of the PIN.
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
