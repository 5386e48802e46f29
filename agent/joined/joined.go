// Package joined joins errors on one line.
//
// The text of errors.Join has a line for each error. A log, the answer to a client and a finding of doctor have
// room for one line only. The package imports no other room, and every room may import it.
package joined

import (
	"slices"
	"strings"
)

// errorList is several errors on one line.
type errorList []error

func (e errorList) Unwrap() []error { return e }

func (e errorList) Error() string {
	var all []string
	for _, err := range e {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

// Errors joins the errors that are not nil. It returns nil if all are nil, and a single error as it is. errors.Is and
// errors.AsType find each error in the result.
func Errors(all ...error) error {
	all = slices.DeleteFunc(all, func(err error) bool { return err == nil })
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	return errorList(all)
}
