package token

import (
	"testing"
	"time"

	"p11-agent/token/pcsc"
	"p11-agent/token/process"
)

// A request that meets a pull has 5 s. pcscd takes pcsc.NoticeTime of them, and a new process
// takes the same time again.
func TestPulledBounds(t *testing.T) {
	if all := pcsc.NoticeTime + process.GoneTimeout + process.OthersTimeout + pcsc.NoticeTime; all > 5*time.Second {
		t.Errorf("the bounds add up to %v", all)
	}
	if all := pcsc.NoticeTime + newcomerTimeout + pcsc.NoticeTime; all > 5*time.Second {
		t.Errorf("the bounds with a new card add up to %v", all)
	}
	if all := pcsc.NoticeTime + backTimeout; all > 5*time.Second {
		t.Errorf("a request waits for %v for its card to be back", all)
	}
}
