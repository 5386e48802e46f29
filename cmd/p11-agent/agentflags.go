package main

import (
	"errors"
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

// patternsValue is the list of -P, which may be empty and then allows nothing.
type patternsValue struct {
	patterns string
	given    bool
}

func (v *patternsValue) Set(s string) error {
	if v.given {
		// Which of the two counts is unknown, and one may allow less than the other.
		return errors.New("it is given twice")
	}
	v.patterns, v.given = s, true
	return nil
}

func (v *patternsValue) String() string { return "" }
func (v *patternsValue) Type() string   { return "patterns" }
