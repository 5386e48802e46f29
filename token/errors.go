package token

import (
	"context"
	"errors"
	"fmt"
	"time"

	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
)

var (
	// ErrAbsent says that no present token holds the key. It has a method
	// Absent, for those who must not know this package.
	ErrAbsent error = absentError{}
	// ErrCancelled is pin.ErrCancelled.
	ErrCancelled = pin.ErrCancelled
	// ErrClosed says that the Store has been closed.
	ErrClosed = errors.New("the agent is stopping")
	// ErrNoMatch says that a URI selects nothing that is present.
	ErrNoMatch = errors.New("no key matches")
)

// These names stand for those of package pin.
type (
	// PINError is pin.Error.
	PINError = pin.Error
	// Tries is pin.Tries.
	Tries = pin.Tries
	// PINAsker is pin.Asker.
	PINAsker = pin.Asker
	// PINRequest is pin.Request.
	PINRequest = pin.Request
	// PINDialogue is pin.Dialogue.
	PINDialogue = pin.Dialogue
	// ReaderObserver is pin.ReaderObserver.
	ReaderObserver = pin.ReaderObserver
)

// The values of Tries.
const (
	TriesUnknown = pin.TriesUnknown
	TriesLow     = pin.TriesLow
	TriesLast    = pin.TriesLast
	TriesNone    = pin.TriesNone
)

// HasPIN is pin.HasPIN.
func HasPIN(ctx context.Context) bool { return pin.HasPIN(ctx) }

// CheckSource is pin.CheckSource.
func CheckSource(u *pkcs11uri.URI) error { return pin.CheckSource(u) }

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
