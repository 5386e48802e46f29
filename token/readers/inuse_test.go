package readers

import (
	"strings"
	"testing"
)

func TestInUseError(t *testing.T) {
	for _, tt := range []struct {
		err  InUseError
		want string
	}{
		{InUseError{}, ", which is not known: end it,"},
		{InUseError{Hidden: true}, ", which this user may not see: end it,"},
		{InUseError{Holders: []string{"firefox (1)"}}, ": firefox (1): end it,"},
		{InUseError{Holders: []string{"firefox (1)", "scdaemon (2)"}}, `, one of: firefox (1), scdaemon (2): "gpgconf --kill scdaemon"`},
		{InUseError{Holders: []string{"firefox (1)"}, Probably: []string{"scdaemon (2)"}}, `, probably scdaemon (2): "gpgconf --kill scdaemon"`},
	} {
		if begin := "the reader is in use by another program" + tt.want; !strings.HasPrefix(tt.err.Error(), begin) {
			t.Errorf("got %q, want it to begin with %q", tt.err.Error(), begin)
		}
	}
}
