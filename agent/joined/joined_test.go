package joined

import (
	"errors"
	"io"
	"testing"
)

func TestErrors(t *testing.T) {
	if err := Errors(nil, nil); err != nil {
		t.Errorf("no error: %v", err)
	}
	if err := Errors(nil, io.EOF); err != io.EOF { //nolint:errorlint // the same error
		t.Errorf("one error: %v", err)
	}
	err := Errors(io.EOF, nil, errors.New("another"))
	if err.Error() != "EOF; another" || !errors.Is(err, io.EOF) {
		t.Errorf("two errors: %v", err)
	}
}
