package pin

import (
	"errors"
	"fmt"

	"p11-agent/token/wire"
)

// Refusal returns what the error of a module says about a PIN: an *Error when the token refused the
// PIN or would refuse it, or another error for a person. It returns nil when the error of the module
// says nothing about the PIN. token is the label of the token.
func Refusal(token string, err error) error {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return nil
	}
	tries := TriesUnknown
	if e.HasInfo {
		tries = TriesOf(e.Info.Flags)
	}
	tried := e.Function == "C_Login"
	switch {
	case e.Reason == wire.ReasonPINLocked || tried && wire.IsRV(err, wire.CKRPINLocked):
		return &Error{Token: token, Tries: TriesNone, Tried: tried, Err: err}
	case e.Reason == wire.ReasonLastTry:
		return &Error{Token: token, Tries: TriesLast, Err: errors.New("one try is left")}
	case tried && wire.IsRV(err, wire.CKRPINIncorrect, wire.CKRPINInvalid, wire.CKRPINLenRange):
		return &Error{Token: token, Tries: tries, Tried: true, Err: err}
	case wire.IsRV(err, wire.CKRPINExpired):
		return fmt.Errorf("the PIN of token %q has expired and must be changed: %w", token, err)
	case wire.IsRV(err, wire.CKRUserPINNotInitialized):
		return fmt.Errorf("token %q has no PIN yet: set one first (pkcs11-tool --init-pin): %w", token, err)
	case wire.IsRV(err, wire.CKRFunctionCanceled):
		return ErrCancelled
	}
	return nil
}

// IsFailure reports whether an error is an *Error, a *LoginError or ErrCancelled: the login failed.
func IsFailure(err error) bool {
	_, refused := errors.AsType[*Error](err)
	_, failed := errors.AsType[*LoginError](err)
	return refused || failed || errors.Is(err, ErrCancelled)
}
