package token

import (
	"testing"
	"time"

	"p11-agent/token/process"
)

// TestProof checks how often the agent verifies signatures of a key.
func TestProof(t *testing.T) {
	one, other := new(process.Process), new(process.Process)
	var v proof
	if !v.due(one, time.Microsecond) {
		t.Error("the first one of a process is not")
	}
	v.given(one, time.Microsecond)
	for i := 1; i <= 2*proofShare; i++ {
		due := v.due(one, time.Microsecond)
		if due != (i%proofShare == 0) {
			t.Errorf("fast signature %d: %v", i, due)
		}
		if due {
			v.given(one, time.Microsecond)
		}
	}
	if !v.due(one, slow) {
		t.Error("a slow one is not")
	}
	v.given(one, time.Microsecond)
	if !v.due(other, time.Microsecond) {
		t.Error("the first one of another process is not")
	}
	if !v.due(one, proofShare*time.Microsecond) || !v.due(one, 0) {
		t.Error("one that was wrong is not followed by another look")
	}
}
