package waiting

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

type nameKey struct{}

// request is somebody who waits.
func request(ctx context.Context, name string) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.WithValue(ctx, nameKey{}, name))
	return ctx, cancel
}

func TestPromptFollowsThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		one, leaveOne := request(t.Context(), "one")
		two, leaveTwo := request(t.Context(), "two")
		three, leaveThree := request(t.Context(), "three")
		defer leaveThree()
		l.Add(one)
		l.Add(two)
		shared, end := context.WithCancel(NewContext(context.Background(), &l))
		defer end()

		var asked []string
		answer := make(chan struct{})
		done := make(chan error, 1)
		go func() {
			done <- Ask(shared, func(ctx context.Context) error {
				asked = append(asked, ctx.Value(nameKey{}).(string))
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-answer:
					return nil
				}
			})
		}()
		expect := func(n int, last string) {
			t.Helper()
			synctest.Wait()
			if len(asked) != n || asked[n-1] != last {
				t.Fatalf("asked %q", asked)
			}
		}
		expect(1, "one")
		leaveOne()
		expect(2, "two")
		leaveTwo()
		expect(2, "two") // nobody is there to ask
		l.Add(three)
		expect(3, "three")
		close(answer)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestAnswersStand(t *testing.T) {
	errNo := errors.New("no")
	for name, answer := range map[string]error{"yes": nil, "no": errNo} {
		t.Run(name, func(t *testing.T) {
			var l List
			one, leave := request(t.Context(), "one")
			l.Add(one)
			l.Add(t.Context())
			n := 0
			err := Ask(NewContext(t.Context(), &l), func(context.Context) error {
				n++
				leave() // the moment it is answered
				return answer
			})
			if n != 1 || !errors.Is(err, answer) {
				t.Errorf("asked %d times: %v", n, err)
			}
		})
	}
}

func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		errEnough := errors.New("enough")
		shared, end := context.WithCancelCause(NewContext(t.Context(), &l))
		done := make(chan error, 2)
		go func() { done <- Ask(shared, func(context.Context) error { return nil }) }()
		synctest.Wait()
		end(errEnough)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("with nobody there: %v", err)
		}

		l.Add(t.Context())
		shared, end = context.WithCancelCause(NewContext(t.Context(), &l))
		go func() {
			done <- Ask(shared, func(ctx context.Context) error {
				<-ctx.Done()
				return context.Cause(ctx)
			})
		}()
		synctest.Wait()
		end(errEnough)
		if err := <-done; !errors.Is(err, errEnough) {
			t.Errorf("during the question: %v", err)
		}
	})
}

func TestWithoutList(t *testing.T) {
	ctx := context.WithValue(t.Context(), nameKey{}, "alone")
	if err := Ask(ctx, func(got context.Context) error {
		if got != ctx {
			t.Error("asked with another context")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestListForgetsThoseWhoLeft(t *testing.T) {
	var l List
	for range 100 {
		ctx, leave := request(t.Context(), "")
		l.Add(ctx)
		leave()
	}
	l.Add(t.Context())
	if len(l.all) != 1 {
		t.Errorf("%d are on the list", len(l.all))
	}
}

// Who leaves goes on when nobody is asked for it any more; who was not asked goes on
// at once.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		first, leave := context.WithCancel(t.Context())
		other, leaveToo := context.WithCancel(t.Context())
		l.Add(first)
		l.Add(other)
		ctx, end := context.WithCancel(NewContext(t.Context(), &l))
		done := make(chan error)
		go func() {
			done <- Ask(ctx, func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Second) // the prompt takes its time
				return ctx.Err()
			})
		}()
		synctest.Wait()
		start := time.Now()
		leaveToo()
		l.Leave(other)
		if took := time.Since(start); took != 0 {
			t.Errorf("one that was not asked left after %v", took)
		}
		leave()
		l.Leave(first)
		if took := time.Since(start); took != time.Second {
			t.Errorf("the one that was asked left after %v", took)
		}
		end()
		<-done
	})
}
