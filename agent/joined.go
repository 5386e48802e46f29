package agent

import (
	"slices"
	"strings"
)

// joinedError is several errors. Unlike that of errors.Join its text is one line, as it
// goes into the log and the answer to a client.
type joinedError []error

func (e joinedError) Unwrap() []error { return e }

func (e joinedError) Error() string {
	var all []string
	for _, err := range e {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

// joinErrors makes one error of those that are not nil, and nil of none.
func joinErrors(all ...error) error {
	all = slices.DeleteFunc(all, func(err error) bool { return err == nil })
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	return joinedError(all)
}
