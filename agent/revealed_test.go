package agent

import "testing"

// hiddenKey is a Key whose token has not shown its private key yet.
type hiddenKey struct{ Key }

func (hiddenKey) Hidden() bool { return true }

func TestHidden(t *testing.T) {
	for _, tt := range []struct {
		homes []Key
		want  bool
	}{
		{nil, false},
		{[]Key{nil}, false},
		{[]Key{hiddenKey{}}, true},
		{[]Key{nil, hiddenKey{}}, true},
	} {
		if got := (&identity{homes: tt.homes}).hidden(); got != tt.want {
			t.Errorf("%v are hidden: %v", tt.homes, got)
		}
	}
}
