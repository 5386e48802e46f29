package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token/pkcs11uri"
)

// An Error is a mistake in the configuration file.
type Error struct {
	File      string
	Line, Col int // counted from 1; 0: the whole file
	Text      string
	Advice    string // the next step
	Err       error  // of reading the file; nil: the file is readable
}

// Unwrap returns the error of reading the file, or nil.
func (e *Error) Unwrap() error { return e.Err }

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Text)
}

// Hint returns the next step.
func (e *Error) Hint() string { return e.Advice }

// ExitCode returns the exit code of a wrong configuration.
func (e *Error) ExitCode() int { return exit.CodeUsage }

// unreadable is the error for a configuration file that cannot be read.
func unreadable(file string, err error) error {
	e := &Error{File: file, Text: err.Error(), Err: err}
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		e.Text = p.Err.Error()
	}
	if errors.Is(err, fs.ErrNotExist) {
		e.Advice = "without --config the agent reads ~/.config/p11-agent/config.toml, if it is there"
	}
	return e
}

// explainTOML turns an error of the decoder into one that quotes no value of the file. text is
// the file.
func explainTOML(file string, text []byte, err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var all []error
		for _, e := range strict.Errors {
			all = append(all, explainUnknown(file, text, &e))
		}
		return errors.Join(all...)
	}
	if e, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, col := e.Position()
		ce := &Error{File: file, Line: line, Col: col, Text: strings.TrimPrefix(e.Error(), "toml: ")}
		if key := e.Key(); len(key) > 0 && speaksOfGo(ce.Text) {
			ce.Text = fmt.Sprintf("%s has to be %s", strings.Join(key, "."), wanted(key))
		}
		return ce
	}
	return &Error{File: file, Text: err.Error()}
}

// explainUnknown returns the error for a key that its table does not have. text is the file.
func explainUnknown(file string, text []byte, e *toml.DecodeError) *Error {
	line, col := e.Position()
	key := e.Key()
	ce := &Error{File: file, Line: line, Col: col, Text: fmt.Sprintf("unknown key %q", strings.Join(key, "."))}
	if len(key) == 0 {
		return ce
	}
	name, table := key[len(key)-1], key[:len(key)-1]
	ce.Text = fmt.Sprintf("unknown key %q", name)
	root := reflect.TypeFor[File]()
	elsewhere := tablesWith(root, nil, name)
	switch near := pkcs11uri.Nearest(name, KnownKeys(root, table)); {
	case len(table) > 0 && slices.Contains(KnownKeys(root, nil), name):
		ce.Advice = fmt.Sprintf("%q belongs above the first table%s: what stands below %s belongs to that table", name, firstTable(text), tableHead(root, table))
	case len(elsewhere) > 0:
		ce.Advice = fmt.Sprintf("%q belongs into a table %s", name, strings.Join(elsewhere, " or "))
	case near != "":
		ce.Advice = fmt.Sprintf("did you mean %q?", near)
	}
	return ce
}

var tableLine = regexp.MustCompile(`(?m)^[ \t]*(\[{1,2}[A-Za-z"'].*)$`)

// firstTable says where the first table of a file begins.
func firstTable(text []byte) string {
	at := tableLine.FindIndex(text)
	if at == nil {
		return ""
	}
	return fmt.Sprintf(", which begins in line %d", 1+bytes.Count(text[:at[0]], []byte("\n")))
}

// speaksOfGo tells whether an error of the decoder is about the program's types.
func speaksOfGo(text string) bool {
	for _, word := range []string{"struct", "config.", "agent.", "cannot store", "cannot decode"} {
		if strings.Contains(text, word) {
			return true
		}
	}
	return false
}

// A valueError is a wrong value, with the next step.
type valueError struct {
	text   string
	advice string
}

func (e *valueError) Error() string { return e.text }

// unknownValue returns the error for a value that a key does not have.
func unknownValue[T ~string](what string, value T, known []T) error {
	e := &valueError{text: fmt.Sprintf("%s is %q, and can be %s", what, value, output.OneOf(known))}
	names := make([]string, len(known))
	for i, k := range known {
		names[i] = string(k)
	}
	if s := pkcs11uri.Nearest(string(value), names); s != "" {
		e.advice = fmt.Sprintf("did you mean %q?", s)
	}
	return e
}

// asError turns the error of a check into an Error. Nil stays nil.
func asError(file string, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{File: file, Text: err.Error()}
	if v, ok := errors.AsType[*valueError](err); ok {
		e.Advice = v.advice
	}
	return e
}
