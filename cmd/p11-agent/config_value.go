package main

import (
	"errors"
	"fmt"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"slices"
	"time"
)

// uriValue is a PKCS#11 URI in the configuration.
type uriValue struct{ *pkcs11uri.URI }

func (v *uriValue) UnmarshalText(b []byte) (err error) {
	v.URI, err = pkcs11uri.ParseBytes(b)
	return err
}

// durationValue is a length of time, as "30s" or "2m". It is a struct so that a
// number without a unit is an error: TOML would make nanoseconds of it.
type durationValue struct{ time.Duration }

func (v *durationValue) UnmarshalText(b []byte) error {
	d, err := time.ParseDuration(string(b))
	if err != nil || d <= 0 {
		return errors.New(`a length of time is written as "30s" or "2m"`)
	}
	v.Duration = d
	return nil
}

// releaseNever is what release may be besides a length of time.
const releaseNever = "never"

// releaseValue is when a module lets go of its cards: after a length of time, or
// never.
type releaseValue struct {
	after durationValue
	never bool
}

func (v *releaseValue) UnmarshalText(b []byte) error {
	if v.never = string(b) == releaseNever; v.never {
		return nil
	}
	if err := v.after.UnmarshalText(b); err != nil {
		return fmt.Errorf("%w; this one can also be %q", err, releaseNever)
	}
	return nil
}

// apply tells a module.
func (v releaseValue) apply(spec *token.ModuleSpec) {
	switch {
	case v.never:
		spec.Idle = token.ReleaseNever
	case v.after.Duration > 0:
		spec.Release = v.after.Duration
		spec.Idle = min(spec.Release, token.ReleaseIdle)
	}
}

// touchNotice is how long a token works before a notification is shown, when
// nobody says otherwise.
const touchNotice = time.Second

const noticeOff = "off"

// noticeValue is a length of time, or "off". It is a string, so that a number
// without a unit is none.
type noticeValue string

func (v noticeValue) check() error {
	if v != "" && v != noticeOff && new(durationValue).UnmarshalText([]byte(v)) != nil {
		return fmt.Errorf("touch-notice is %q: a length of time is written as \"1s\", and \"off\" is none", string(v))
	}
	return nil
}

// after returns what a notify.Notifier takes.
func (v noticeValue) after() time.Duration {
	var d durationValue
	switch {
	case v == "":
		return touchNotice
	case v == noticeOff || d.UnmarshalText([]byte(v)) != nil: // which check has seen
		return 0
	}
	return d.Duration
}

// What forget-on may have.
const (
	forgetSleep = "sleep"
	forgetLock  = "screen-lock"
)

// forgetValue says when logins end.
type forgetValue []string

func (v forgetValue) check() error {
	for _, s := range v {
		if s != forgetSleep && s != forgetLock {
			return fmt.Errorf("forget-on has %q, and can have %q and %q", s, forgetSleep, forgetLock)
		}
	}
	return nil
}

func (v forgetValue) retention() token.Retention {
	return token.Retention{Sleep: slices.Contains(v, forgetSleep), ScreenLock: slices.Contains(v, forgetLock)}
}

// forgetsAtSleep tells whether anything is to be done before the machine sleeps.
func (c *config) forgetsAtSleep() bool {
	return c.ForgetOn.retention().Sleep || slices.ContainsFunc(c.KeyTables, func(k keyConfig) bool {
		return k.ForgetOn != nil && k.ForgetOn.retention().Sleep
	})
}
