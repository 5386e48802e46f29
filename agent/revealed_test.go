package agent

import (
	"testing"

	"p11-agent/agent/request"
)

// hiddenKey is a Key whose token still hides its private key.
type hiddenKey struct{ request.Key }

func (hiddenKey) Hidden() bool { return true }

func TestHidden(t *testing.T) {
	for _, tt := range []struct {
		homes []request.Key
		want  bool
	}{
		{nil, false},
		{[]request.Key{nil}, false},
		{[]request.Key{hiddenKey{}}, true},
		{[]request.Key{nil, hiddenKey{}}, true},
	} {
		if got := (&identity{Target: request.Target{Homes: tt.homes}}).hidden(); got != tt.want {
			t.Errorf("%v are hidden: %v", tt.homes, got)
		}
	}
}
