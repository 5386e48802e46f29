package config

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/retention"
)

// A KeyURI is a PKCS#11 URI (RFC 7512) in quotes.
type KeyURI struct{ *pkcs11uri.URI }

// UnmarshalText parses a URI. The error does not quote it: it may hold a PIN.
func (v *KeyURI) UnmarshalText(b []byte) (err error) {
	v.URI, err = pkcs11uri.ParseBytes(b)
	return err
}

// A Duration is a length of time, as "30s" or "2m". It is a struct, so that a number without a
// unit is an error: the decoder would read nanoseconds.
type Duration struct{ time.Duration }

// UnmarshalText parses a length of time that is longer than 0.
func (v *Duration) UnmarshalText(b []byte) error {
	d, err := time.ParseDuration(string(b))
	if err != nil || d <= 0 {
		return errors.New(`a length of time is written as "30s" or "2m"`)
	}
	v.Duration = d
	return nil
}

// releaseNever is the value of release that is not a length of time.
const releaseNever = "never"

// A ReleaseAfter says when a module releases its cards: after a length of time, or never.
type ReleaseAfter struct {
	after Duration
	never bool
}

// UnmarshalText parses a length of time, or "never".
func (v *ReleaseAfter) UnmarshalText(b []byte) error {
	if v.never = string(b) == releaseNever; v.never {
		return nil
	}
	if err := v.after.UnmarshalText(b); err != nil {
		return fmt.Errorf("%w; this one can also be %q", err, releaseNever)
	}
	return nil
}

// apply sets the value in the specification of a module.
func (v ReleaseAfter) apply(spec *token.ModuleSpec) {
	switch {
	case v.never:
		spec.Idle = token.ReleaseNever
	case v.after.Duration > 0:
		spec.Release = v.after.Duration
		spec.Idle = min(spec.Release, token.ReleaseIdle)
	}
}

// defaultTouchNotice is how long a token works before the person sees a notification.
const defaultTouchNotice = time.Second

const noticeOff = "off"

// A NoticeAfter is a length of time, or "off". It is a string, so that a number without a unit
// is an error.
type NoticeAfter string

func (v NoticeAfter) check() error {
	if v != "" && v != noticeOff && new(Duration).UnmarshalText([]byte(v)) != nil {
		return fmt.Errorf("touch-notice is %q: write a length of time as \"1s\", or \"off\"", string(v))
	}
	return nil
}

// After returns the length of time, and 0 for "off".
func (v NoticeAfter) After() time.Duration {
	var d Duration
	switch {
	case v == "":
		return defaultTouchNotice
	case v == noticeOff || d.UnmarshalText([]byte(v)) != nil: // check refuses such a value
		return 0
	}
	return d.Duration
}

// The events of forget-on.
const (
	forgetSleep = "sleep"
	forgetLock  = "screen-lock"
)

// A ForgetOn lists the events that end logins.
type ForgetOn []string

func (v ForgetOn) check() error {
	for _, s := range v {
		if s != forgetSleep && s != forgetLock {
			return fmt.Errorf("forget-on has %q, and can have %q and %q", s, forgetSleep, forgetLock)
		}
	}
	return nil
}

// Retention returns how long a login lasts.
func (v ForgetOn) Retention() retention.Rule {
	return retention.Rule{Sleep: slices.Contains(v, forgetSleep), ScreenLock: slices.Contains(v, forgetLock)}
}

// ForgetsAtSleep tells whether the agent ends logins before the machine sleeps.
func (c *File) ForgetsAtSleep() bool {
	return c.ForgetOn.Retention().Sleep || slices.ContainsFunc(c.KeyTables, func(k KeyTable) bool {
		return k.ForgetOn != nil && k.ForgetOn.Retention().Sleep
	})
}
