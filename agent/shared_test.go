package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Who has waited last goes on when the prompt has gone, unless that takes too long.
func TestSharedEndsFirst(t *testing.T) {
	for _, takes := range []time.Duration{time.Second, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var s shared[int]
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			start := time.Now()
			ended := make(chan struct{})
			if _, err := s.do(ctx, "key", func(ctx context.Context) (int, error) {
				defer close(ended)
				<-ctx.Done()
				time.Sleep(takes)
				return 0, ctx.Err()
			}); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if want := min(time.Second+takes, 4*time.Second); time.Since(start) != want {
				t.Errorf("it returned after %v, want %v", time.Since(start), want)
			}
			<-ended
		})
	}
}
