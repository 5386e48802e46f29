package waiting

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

type nameKey struct{}

// request returns the context of a waiting request.
func request(ctx context.Context, name string) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.WithValue(ctx, nameKey{}, name))
	return ctx, cancel
}

func ask(ctx context.Context, l *List, f func(context.Context) error) error {
	return l.Ask(ctx, Question{Ask: f})
}

func TestPromptMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		one, leaveOne := request(t.Context(), "one")
		two, leaveTwo := request(t.Context(), "two")
		three, leaveThree := request(t.Context(), "three")
		defer leaveThree()
		l.Add(one)
		l.Add(two)
		shared, end := context.WithCancel(context.Background())
		defer end()

		var asked []string
		answer := make(chan struct{})
		done := make(chan error, 1)
		go func() {
			done <- ask(shared, &l, func(ctx context.Context) error {
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
		expect(2, "two") // no request is left to ask
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
			err := ask(t.Context(), &l, func(context.Context) error {
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
		shared, end := context.WithCancelCause(t.Context())
		done := make(chan error, 2)
		go func() { done <- ask(shared, &l, func(context.Context) error { return nil }) }()
		synctest.Wait()
		end(errEnough)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("without a request: %v", err)
		}

		l.Add(t.Context())
		shared, end = context.WithCancelCause(t.Context())
		go func() {
			done <- ask(shared, &l, func(ctx context.Context) error {
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
	if err := Ask(ctx, nil, Question{Ask: func(got context.Context) error {
		if got != ctx {
			t.Error("asked with another context")
		}
		return nil
	}}); err != nil {
		t.Error(err)
	}
}

func TestListForgetsEndedRequests(t *testing.T) {
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

// A request that is asked leaves after its question has ended. Another request leaves at once.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		first, leave := context.WithCancel(t.Context())
		other, leaveToo := context.WithCancel(t.Context())
		l.Add(first)
		l.Add(other)
		ctx, end := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- ask(ctx, &l, func(ctx context.Context) error {
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

// table is a question that is open until the test answers.
type table struct {
	mu     sync.Mutex
	events []string
	answer chan error
}

func (q *table) note(what string, ctx context.Context) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.events = append(q.events, what+ctx.Value(nameKey{}).(string))
}

func (q *table) ask(ctx context.Context) error {
	q.note("", ctx)
	select {
	case err := <-q.answer:
		return err
	case <-ctx.Done():
		return fmt.Errorf("stopped asking: %w", ctx.Err())
	}
}

func (q *table) want(t *testing.T, what string, events ...string) {
	t.Helper()
	synctest.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if !slices.Equal(q.events, events) {
		t.Fatalf("%s: %q, want %q", what, q.events, events)
	}
}

// A prompt without an answer goes to the waiting requests, one after the other. It stays when there
// is no other request, or no other place.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		q := &table{answer: make(chan error)}
		join := func(name string) { one, _ := request(t.Context(), name); l.Add(one) }
		join("one")
		done := make(chan error, 1)
		go func() {
			done <- l.Ask(t.Context(), Question{
				Ask: q.ask, Turn: time.Minute,
				Takes: func(o Other) bool { return o.Context.Value(nameKey{}) != "homeless" },
			})
		}()
		time.Sleep(time.Hour)
		q.want(t, "no other request waits", "one")
		join("homeless")
		time.Sleep(time.Hour)
		q.want(t, "who waits has no place", "one")
		join("two")
		join("three")
		time.Sleep(time.Minute - 1)
		q.want(t, "before the end of the turn", "one")
		time.Sleep(time.Nanosecond)
		q.want(t, "after a turn", "one", "two")
		time.Sleep(time.Minute)
		q.want(t, "after two turns", "one", "two", "three")
		time.Sleep(time.Minute)
		q.want(t, "after three turns", "one", "two", "three", "one")
		q.answer <- nil
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A request that waits while another is asked hears of it once.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		q := &table{answer: make(chan error)}
		one, _ := request(t.Context(), "one")
		two, leaveTwo := request(t.Context(), "two")
		three, _ := request(t.Context(), "three")
		l.Add(one)
		done := make(chan error, 1)
		go func() {
			done <- l.Ask(t.Context(), Question{
				Ask: q.ask, Patience: 2 * time.Second,
				Tell: func(o Other) { q.note("told ", o.Context) },
			})
		}()
		l.Add(two)
		time.Sleep(time.Second)
		leaveTwo()
		l.Add(three)
		time.Sleep(4 * time.Second)
		q.want(t, "after the patience", "one", "told three")
		time.Sleep(time.Hour)
		q.want(t, "later", "one", "told three")
		q.answer <- nil
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A request that cannot be asked is passed over. When no request can be asked, the first error
// counts.
func TestPass(t *testing.T) {
	errNowhere := errors.New("nowhere")
	for name, test := range map[string]struct {
		waiting []string
		want    error
		asked   []string
	}{
		"one of two":    {[]string{"nowhere", "here"}, nil, []string{"nowhere", "here"}},
		"no place":      {[]string{"nowhere", "nowhere too"}, errNowhere, []string{"nowhere", "nowhere too"}},
		"no place, one": {[]string{"nowhere"}, errNowhere, []string{"nowhere"}},
	} {
		t.Run(name, func(t *testing.T) {
			var l List
			for _, name := range test.waiting {
				one, _ := request(t.Context(), name)
				l.Add(one)
			}
			var asked []string
			err := l.Ask(t.Context(), Question{
				Ask: func(ctx context.Context) error {
					name := ctx.Value(nameKey{}).(string)
					asked = append(asked, name)
					switch name {
					case "here":
						return nil
					case "nowhere":
						return errNowhere
					}
					return fmt.Errorf("%w: too", errNowhere)
				},
				Pass: func(err error) bool { return errors.Is(err, errNowhere) },
			})
			if err != test.want || !slices.Equal(asked, test.asked) { //nolint:errorlint // the very first
				t.Errorf("asked %q: %v", asked, err)
			}
		})
	}
}

// An answer that comes with the end of the turn stands.
func TestAnswerAtTheEndOfATurn(t *testing.T) {
	errNo := errors.New("no")
	for name, answer := range map[string]error{"yes": nil, "no": errNo} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l List
				l.Add(t.Context())
				two, _ := request(t.Context(), "two")
				l.Add(two)
				n := 0
				err := l.Ask(t.Context(), Question{
					Ask: func(ctx context.Context) error {
						n++
						<-ctx.Done()
						return answer
					},
					Turn: time.Minute, Takes: func(Other) bool { return true },
				})
				if n != 1 || !errors.Is(err, answer) {
					t.Errorf("asked %d times: %v", n, err)
				}
			})
		})
	}
}

// A request that waits for the end of the question hears of it and gets its turn. It is not asked.
func TestBeside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l List
		q := &table{answer: make(chan error)}
		one, _ := request(t.Context(), "one")
		beside, leave := request(t.Context(), "beside")
		gone, leaveNow := request(t.Context(), "gone")
		l.Add(one)
		l.SetBeside([]Other{{Context: gone}, {Context: beside}})
		leaveNow()
		ask := func() error {
			return l.Ask(t.Context(), Question{
				Ask: q.ask, Turn: time.Minute, Takes: func(Other) bool { return true },
				Patience: time.Second, Tell: func(o Other) { q.note("told ", o.Context) },
			})
		}
		if err := ask(); !errors.Is(err, ErrMoved) {
			t.Errorf("at the end of the turn: %v", err)
		}
		q.want(t, "after a turn", "one", "told beside")
		leave()
		done := make(chan error)
		go func() { done <- ask() }()
		time.Sleep(time.Hour)
		q.answer <- nil
		if err := <-done; err != nil {
			t.Errorf("when no request is left: %v", err)
		}
		q.want(t, "in the end", "one", "told beside", "one")
	})
}
