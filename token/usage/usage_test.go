package usage

import (
	"errors"
	"testing"
	"time"

	"p11-agent/token/process"
)

// TestProof checks how often the agent verifies signatures of a key.
func TestProof(t *testing.T) {
	one, other := new(process.Process), new(process.Process)
	var v Usage
	if !v.due(one, time.Microsecond) {
		t.Error("the first one of a process is not")
	}
	v.verified(one, time.Microsecond)
	for i := 1; i <= 2*share; i++ {
		due := v.due(one, time.Microsecond)
		if due != (i%share == 0) {
			t.Errorf("fast signature %d: %v", i, due)
		}
		if due {
			v.verified(one, time.Microsecond)
		}
	}
	if !v.due(one, slow) {
		t.Error("a slow one is not")
	}
	v.verified(one, time.Microsecond)
	if !v.due(other, time.Microsecond) {
		t.Error("the first one of another process is not")
	}
	if !v.due(one, share*time.Microsecond) || !v.due(one, 0) {
		t.Error("one that was wrong is not followed by another look")
	}
}

// TestVerify checks which signatures of a fast key are verified.
func TestVerify(t *testing.T) {
	p := new(process.Process)
	wrong := errors.New("wrong")
	var u Usage
	calls := 0
	verify := func() error {
		calls++
		return nil
	}
	if err := u.Verify(p, 0, false, func() error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("a wrong signature: %v", err)
	}
	if err := u.Verify(p, 0, false, verify); err != nil || calls != 1 {
		t.Errorf("after a wrong signature, the next is not verified: %v", err)
	}
	u.verified(p, time.Hour)
	if err := u.Verify(p, 0, false, verify); err != nil || calls != 1 {
		t.Errorf("a fast signature is verified: %v", err)
	}
	if err := u.Verify(p, 0, true, verify); err != nil || calls != 2 {
		t.Errorf("a signature of a card is not verified: %v", err)
	}
}

func TestCounts(t *testing.T) {
	var u Usage
	if u.Signatures() != 0 || !u.Last().IsZero() {
		t.Error("an unused key was used")
	}
	now := time.Unix(1000, 0)
	u.Signed(now)
	u.Used(now.Add(time.Second))
	if u.Signatures() != 1 || !u.Last().Equal(now.Add(time.Second)) {
		t.Errorf("%d signatures, the last use at %v", u.Signatures(), u.Last())
	}
}
