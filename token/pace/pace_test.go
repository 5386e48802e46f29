package pace

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	p := Limit{Burst: 3, Every: time.Second}
	now := time.Unix(1000, 0)
	for i, want := range []time.Duration{0, 0, 0, time.Second, 2 * time.Second} {
		if got := p.Take(now); got != want {
			t.Errorf("number %d waits %v, want %v", i, got, want)
		}
	}
	if got := p.Take(now.Add(10 * time.Second)); got != 0 {
		t.Errorf("after a pause: %v", got)
	}
}
