package pin

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"p11-agent/token/wire"
)

func TestRefusal(t *testing.T) {
	login := func(rv uint64) *wire.Error { return &wire.Error{Function: "C_Login", RV: rv} }
	low := login(wire.CKRPINIncorrect)
	low.HasInfo, low.Info.Flags = true, wire.CKFUserPINCountLow
	for _, tt := range []struct {
		name  string
		err   error
		tries Tries
		tried bool
		is    bool // an Error
		other bool // another error
	}{
		{"locked", login(wire.CKRPINLocked), TriesNone, true, true, false},
		{"locked, and not tried", &wire.Error{Reason: wire.ReasonPINLocked}, TriesNone, false, true, false},
		{"the last try", &wire.Error{Reason: wire.ReasonLastTry}, TriesLast, false, true, false},
		{"wrong", login(wire.CKRPINIncorrect), TriesUnknown, true, true, false},
		{"wrong, and the token tells", low, TriesLow, true, true, false},
		{"wrong, wrapped", fmt.Errorf("log in: %w", low), TriesLow, true, true, false},
		{"too long", login(wire.CKRPINLenRange), TriesUnknown, true, true, false},
		{"of a signature", &wire.Error{Function: "C_Sign", RV: wire.CKRPINIncorrect}, 0, false, false, false},
		{"expired", login(wire.CKRPINExpired), 0, false, false, true},
		{"no PIN yet", login(wire.CKRUserPINNotInitialized), 0, false, false, true},
		{"cancelled at the reader", login(wire.CKRFunctionCanceled), 0, false, false, true},
		{"a broken card", login(wire.CKRDeviceError), 0, false, false, false},
		{"no answer", context.Canceled, 0, false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Refusal("card", tt.err)
			e, ok := errors.AsType[*Error](err)
			if ok != tt.is || (err != nil) != (tt.is || tt.other) {
				t.Fatalf("got %v", err)
			}
			if ok && (e.Token != "card" || e.Tries != tt.tries || e.Tried != tt.tried) {
				t.Errorf("got %+v", e)
			}
		})
	}
}

func TestIsFailure(t *testing.T) {
	for want, all := range map[bool][]error{
		true:  {&Error{Err: context.Canceled}, &LoginError{Err: context.Canceled}, ErrCancelled, fmt.Errorf("sign: %w", ErrCancelled)},
		false: {nil, context.Canceled, ErrForgotten, &wire.Error{Function: "C_Sign"}},
	} {
		for _, err := range all {
			if got := IsFailure(err); got != want {
				t.Errorf("%v: %v", err, got)
			}
		}
	}
}
