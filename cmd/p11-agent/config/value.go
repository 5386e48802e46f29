package config

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
)

// KeyURI is a PKCS#11 URI in the configuration.
type KeyURI struct{ *pkcs11uri.URI }

func (v *KeyURI) UnmarshalText(b []byte) (err error) {
	v.URI, err = pkcs11uri.ParseBytes(b)
	return err
}

// Duration is a length of time, as "30s" or "2m". It is a struct so that a
// number without a unit is an error: TOML would make nanoseconds of it.
type Duration struct{ time.Duration }

func (v *Duration) UnmarshalText(b []byte) error {
	d, err := time.ParseDuration(string(b))
	if err != nil || d <= 0 {
		return errors.New(`a length of time is written as "30s" or "2m"`)
	}
	v.Duration = d
	return nil
}

// releaseNever is what release may be besides a length of time.
const releaseNever = "never"

// ReleaseAfter is when a module lets go of its cards: after a length of time, or
// never.
type ReleaseAfter struct {
	after Duration
	never bool
}

func (v *ReleaseAfter) UnmarshalText(b []byte) error {
	if v.never = string(b) == releaseNever; v.never {
		return nil
	}
	if err := v.after.UnmarshalText(b); err != nil {
		return fmt.Errorf("%w; this one can also be %q", err, releaseNever)
	}
	return nil
}

// apply tells a module.
func (v ReleaseAfter) apply(spec *token.ModuleSpec) {
	switch {
	case v.never:
		spec.Idle = token.ReleaseNever
	case v.after.Duration > 0:
		spec.Release = v.after.Duration
		spec.Idle = min(spec.Release, token.ReleaseIdle)
	}
}

// defaultTouchNotice is how long a token works before a notification is shown, when
// nobody says otherwise.
const defaultTouchNotice = time.Second

const noticeOff = "off"

// NoticeAfter is a length of time, or "off". It is a string, so that a number
// without a unit is none.
type NoticeAfter string

func (v NoticeAfter) check() error {
	if v != "" && v != noticeOff && new(Duration).UnmarshalText([]byte(v)) != nil {
		return fmt.Errorf("touch-notice is %q: a length of time is written as \"1s\", and \"off\" is none", string(v))
	}
	return nil
}

// After returns what a notify.Notifier takes.
func (v NoticeAfter) After() time.Duration {
	var d Duration
	switch {
	case v == "":
		return defaultTouchNotice
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

// ForgetOn says when logins end.
type ForgetOn []string

func (v ForgetOn) check() error {
	for _, s := range v {
		if s != forgetSleep && s != forgetLock {
			return fmt.Errorf("forget-on has %q, and can have %q and %q", s, forgetSleep, forgetLock)
		}
	}
	return nil
}

func (v ForgetOn) Retention() token.Retention {
	return token.Retention{Sleep: slices.Contains(v, forgetSleep), ScreenLock: slices.Contains(v, forgetLock)}
}

// ForgetsAtSleep tells whether anything is to be done before the machine sleeps.
func (c *File) ForgetsAtSleep() bool {
	return c.ForgetOn.Retention().Sleep || slices.ContainsFunc(c.KeyTables, func(k KeyTable) bool {
		return k.ForgetOn != nil && k.ForgetOn.Retention().Sleep
	})
}
