package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// lifetimeValue is the time of -t.
type lifetimeValue struct{ time.Duration }

func (v *lifetimeValue) Set(s string) (err error) {
	v.Duration, err = parseLifetime(s)
	return err
}

func (v *lifetimeValue) String() string { return "" } // the help names no default
func (v *lifetimeValue) Type() string   { return "time" }

// patternsValue is the list of -P. An empty list allows no module.
type patternsValue struct {
	patterns string
	given    bool
}

func (v *patternsValue) Set(s string) error {
	if v.given {
		// It is unknown which list counts, and one may allow less than the other.
		return errors.New("only one list of patterns can be given")
	}
	v.patterns, v.given = s, true
	return nil
}

func (v *patternsValue) String() string { return "" }
func (v *patternsValue) Type() string   { return "patterns" }

// parseLifetime reads a time as ssh-agent does (sshd_config(5), TIME FORMATS; convtime in
// OpenSSH 10.5's misc.c): numbers with units as in 1h30m, of which one at most is seconds.
// A number without a unit is seconds.
func parseLifetime(s string) (time.Duration, error) {
	units := map[byte]time.Duration{
		's': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour,
	}
	bad := fmt.Errorf("invalid length of time %q: write seconds, or 1h30m", s)
	if s == "" {
		return 0, bad
	}
	total, seconds := time.Duration(0), false
	for rest := s; rest != ""; {
		n := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		digits, unit := rest, time.Second
		if n >= 0 {
			digits = rest[:n]
			var ok bool
			if unit, ok = units[rest[n]|0x20]; !ok {
				return 0, bad
			}
			rest = rest[n+1:]
		} else {
			rest = ""
		}
		v, err := strconv.ParseUint(digits, 10, 31)
		if err != nil || unit == time.Second && seconds {
			return 0, bad
		}
		seconds = seconds || unit == time.Second
		total += time.Duration(v) * unit
		if total < 0 || total > 1<<31*time.Second {
			return 0, bad
		}
	}
	return total, nil
}
