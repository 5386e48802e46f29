// Package waiting lets several requests wait for one answer. It asks one request at a time: the
// request that has waited longest. The prompt moves to the next request when a request leaves,
// cannot be asked, or has not answered in its turn.
//
// The context of a question ends with the context of the request that is asked. So a request that
// has left is not asked any longer. The callers decide which requests wait, and for what.
package waiting

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// A List has the requests that wait for an answer, as their contexts. The zero value is
// empty and ready to use. Any goroutine may call its methods.
type List struct {
	mu     sync.Mutex
	all    []context.Context // in the order in which they are asked
	beside []Other           // wait for the end of the question
	added  chan struct{}     // closed and replaced when a request comes
	asked  context.Context   // the request that is asked, or was asked last
	ended  chan struct{}     // closed when the question to that request has ended
}

// Add adds a request. It is on the list for as long as its context lasts.
func (l *List) Add(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pruneLocked()
	l.all = append(l.all, ctx)
	if l.added != nil {
		close(l.added)
		l.added = nil
	}
}

func (l *List) pruneLocked() {
	kept := l.all[:0]
	for _, ctx := range l.all {
		if ctx.Err() == nil {
			kept = append(kept, ctx)
		}
	}
	clear(l.all[len(kept):])
	l.all = kept
}

// An Other is a request that waits while another request is asked.
type Other struct {
	// Context is the context of the request.
	Context context.Context
	// Answered tells that the request has its answer already. It waits for the end of the
	// question and needs no prompt of its own.
	Answered bool
}

// SetBeside replaces the requests that wait for the end of the question, and not for its answer.
// They have questions of their own. They hear where the question is, and a turn can go to them
// (ErrMoved).
func (l *List) SetBeside(all []Other) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beside = slices.Clone(all)
}

// Leave is for a request whose context has ended. If the question goes to that request,
// Leave returns after the end of the question. So the client does not go on while the
// prompt is still in its terminal.
func (l *List) Leave(ctx context.Context) {
	l.mu.Lock()
	var ended chan struct{}
	if l.asked == ctx {
		ended = l.ended
	}
	l.mu.Unlock()
	if ended != nil {
		<-ended
	}
}

// first returns the request that is asked next, until ended is closed. Without such a request, it
// returns a channel that is closed when a request comes; none tells that all waiting requests are
// in passed.
func (l *List) first(passed map[context.Context]bool) (one context.Context, ended chan<- struct{}, added <-chan struct{}, none bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pruneLocked()
	for _, ctx := range l.all {
		if !passed[ctx] {
			l.asked, l.ended = ctx, make(chan struct{})
			return l.asked, l.ended, nil, false
		}
	}
	if l.added == nil {
		l.added = make(chan struct{})
	}
	return nil, nil, l.added, len(l.all) > 0
}

// others returns the requests that wait while one is asked and whose contexts last.
func (l *List) others(one context.Context, passed map[context.Context]bool) []Other {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pruneLocked()
	var all []Other
	for _, ctx := range l.all {
		all = append(all, Other{Context: ctx})
	}
	return slices.DeleteFunc(append(all, l.beside...), func(o Other) bool {
		return o.Context == one || passed[o.Context] || o.Context.Err() != nil
	})
}

// hand gives the turn of one to next. The turn of one comes again after all others. It returns
// false when next does not wait for this question.
func (l *List) hand(one, next context.Context) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Contains(l.all, next) {
		return false
	}
	rest := slices.DeleteFunc(l.all, func(ctx context.Context) bool { return ctx == one || ctx == next })
	l.all = append(slices.Insert(rest, 0, next), one)
	return true
}

// One returns a list of one request.
func One(ctx context.Context) *List { return &List{all: []context.Context{ctx}} }

type acceptedKey struct{}

// OnAccepted returns a context for a request. Accepted calls f when the answer of that
// request's own person has proved right. f runs in the goroutine that calls Accepted. The
// context carries f through the packages between, as that of net/http/httptrace does.
func OnAccepted(ctx context.Context, f func()) context.Context {
	return context.WithValue(ctx, acceptedKey{}, f)
}

// Accepted tells a request that the answer of its own person has proved right, such as a PIN
// that a token took. The requests that waited with it do not hear of it.
func Accepted(ctx context.Context) {
	if f, ok := ctx.Value(acceptedKey{}).(func()); ok {
		f()
	}
}

// Asked returns the request that is asked, or was asked last. It returns nil before the first
// question.
func (l *List) Asked() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.asked
}

// ErrMoved says that the turn has gone to a request of List.SetBeside, which has a question of its
// own. The caller may ask again after that request.
var ErrMoved = errors.New("the prompt has moved to a request that waited for its end")

// A Question goes to the waiting requests, one at a time. All functions but Ask may be nil. One
// goroutine at a time calls them, while Ask runs.
type Question struct {
	// Ask asks for the request that its context belongs to.
	Ask func(context.Context) error
	// Pass tells whether an error of Ask means that Ask cannot ask for this request. Then
	// the question goes to the next request. If Ask cannot ask for any request, the first
	// error stands.
	Pass func(error) bool
	// Turn is how long the question stays with a request while others wait; 0: until the
	// answer.
	Turn time.Duration
	// Takes tells whether another waiting request can be asked at a place of its own. At the end
	// of a turn, the first request that can be asked gets the next turn.
	Takes func(Other) bool
	// Tell gets each other request that has waited for longer than Patience, once in each
	// turn. If Patience is 0, it gets no request.
	Tell     func(Other)
	Patience time.Duration
}

// Requests asks a question on behalf of the requests that wait for its answer. A *List does so.
type Requests interface {
	Ask(ctx context.Context, q Question) error
}

// Ask asks a question on behalf of the requests. If requests is nil, no other request waits, and
// q.Ask gets ctx itself.
func Ask(ctx context.Context, requests Requests, q Question) error {
	if requests == nil {
		return q.Ask(ctx)
	}
	return requests.Ask(ctx, q)
}

// Ask calls q.Ask until there is an answer, or an error other than that of a context. The context
// of q.Ask has the values of the request that is asked. It ends with that request, with its turn,
// or with ctx. When the request or its turn ends, Ask calls q.Ask again for the next request. When
// there is no next request, Ask waits for one.
//
// The error is ErrMoved when a turn goes to a request of SetBeside.
func (l *List) Ask(ctx context.Context, q Question) error {
	var failed error // of the first request that was passed over
	passed := make(map[context.Context]bool)
	for {
		one, ended, added, none := l.first(passed)
		if none {
			return failed
		}
		if one == nil {
			select {
			case <-added:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		turn := &turn{Question: q, list: l, one: one, passed: passed}
		err := turn.ask(ctx, ended)
		switch {
		case ctx.Err() != nil:
			return err
		case turn.moved && errors.Is(err, context.Canceled):
			return ErrMoved
		case turn.over && errors.Is(err, context.Canceled):
		case one.Err() != nil && errors.Is(err, one.Err()):
		case err != nil && q.Pass != nil && q.Pass(err):
			passed[one] = true
			if failed == nil {
				failed = err
			}
		default:
			return err
		}
	}
}

// A turn is the time in which one request is asked.
type turn struct {
	Question
	list   *List
	one    context.Context
	passed map[context.Context]bool
	// Valid after ask has returned:
	over  bool // the next request of the list is asked
	moved bool // the turn goes to a request of List.SetBeside
}

// ask calls Ask with the values of the request, for as long as both contexts and the turn last.
// Then it closes ended, also after a panic in Ask.
func (t *turn) ask(ctx context.Context, ended chan<- struct{}) error {
	defer close(ended)
	both, cancel := context.WithCancelCause(t.one)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })()
	if t.Turn > 0 || t.Patience > 0 {
		watch.Go(func() { t.watch(both, cancel) })
	}
	return t.Ask(both)
}

// watch calls Tell for waiting requests, and ends the turn when another request can be asked.
func (t *turn) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	var turns, looks <-chan time.Time
	if t.Turn > 0 {
		ticker := time.NewTicker(t.Turn)
		defer ticker.Stop()
		turns = ticker.C
	}
	if t.Patience > 0 {
		ticker := time.NewTicker(t.Patience)
		defer ticker.Stop()
		looks = ticker.C
	}
	seen := make(map[context.Context]int) // how often watch has met each
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-looks:
			for _, other := range t.list.others(t.one, t.passed) {
				if seen[other.Context]++; seen[other.Context] == 2 {
					during(ctx, other, t.Tell)
				}
			}
		case <-turns:
			for _, other := range t.list.others(t.one, t.passed) {
				takes := false
				during(ctx, other, func(o Other) { takes = t.Takes(o) })
				if takes {
					t.over = t.list.hand(t.one, other.Context)
					t.moved = !t.over
					cancel(context.Canceled)
					return
				}
			}
		}
	}
}

// during calls f with other. Its context lasts as long as both contexts last.
func during(ctx context.Context, other Other, f func(Other)) {
	both, cancel := context.WithCancel(other.Context)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	f(Other{both, other.Answered})
}
