// Package exit says how a command ends: its exit code, and the next step that goes with
// an error. Commands return errors; main alone prints them and ends the program.
package exit

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The exit codes of every command.
const (
	CodeOK      = 0
	CodeFailure = 1 // the command failed, or check or doctor found a problem
	CodeUsage   = 2 // the command line or the configuration is wrong
)

// A Status is an error that ends the program with this exit code. Main prints nothing:
// the command has printed its result.
type Status int

func (s Status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// Usage marks err as a mistake on the command line: the program ends with CodeUsage.
func Usage(err error) error { return &usageError{err} }

type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// ExitCode is the method that Code looks for.
func (e *usageError) ExitCode() int { return CodeUsage }

// Code returns the exit code for the error of a command: the number of a Status, or what
// the method ExitCode of the first error of the tree that has one returns, or CodeFailure.
func Code(err error) int {
	if err == nil {
		return CodeOK
	}
	if s, ok := errors.AsType[Status](err); ok {
		return int(s)
	}
	if e, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		return e.ExitCode()
	}
	return CodeFailure
}

// WithHint adds the next step to an error. The text of the error stays.
func WithHint(err error, hint string) error { return &hintedError{err, hint} }

type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }

// Hint is the method that the function Hint looks for.
func (e *hintedError) Hint() string { return e.hint }

// Hint returns the next step of the first error of the tree that has a method Hint, or "".
func Hint(err error) string {
	if e, ok := errors.AsType[interface {
		error
		Hint() string
	}](err); ok {
		return e.Hint()
	}
	return ""
}

// Each returns the errors that err joins, to be printed one by one. An error with a text
// of its own stays whole. The hint of a joined error goes to the last.
func Each(err error) []error {
	//nolint:errorlint // only the outermost is meant
	switch e := err.(type) {
	case *hintedError:
		all := Each(e.err)
		last := &all[len(all)-1]
		*last = WithHint(*last, e.hint)
		return all
	case interface{ Unwrap() []error }:
		var texts []string
		all := slices.Clone(e.Unwrap())
		for _, one := range all {
			texts = append(texts, one.Error())
		}
		if strings.Join(texts, "\n") == err.Error() || strings.Join(texts, "; ") == err.Error() {
			return all
		}
	}
	return []error{err}
}
