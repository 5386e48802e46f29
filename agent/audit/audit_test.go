package audit

import (
	"fmt"
	"testing"

	"p11-agent/agent/request"
)

// The keys whose uses are counted are bounded.
func TestUsesAreBounded(t *testing.T) {
	var a Trail
	for i := range 2 * maxUses {
		a.add(&Record{Event: Event{Action: request.ActionSign, Result: OK, Key: fmt.Sprint(i)}})
	}
	if len(a.uses) != maxUses {
		t.Errorf("uses of %d keys are kept", len(a.uses))
	}
}
