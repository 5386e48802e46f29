package approval

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
	"p11-agent/pinentry/waiting"
)

// When the questions of a client pause, other clients still get an answer to the shared
// question.
func TestPausedLeavesOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, q := requesttest.New(t), NewQuestions()
		no := byAsking(func(context.Context) (Outcome, error) { return OutcomeNo, ErrDeclined })
		evil, good := w.Caller("ssh", "evil", "-"), w.Caller("ssh")
		_ = no(evil.Context(t.Context()), q.About("a token", nil, false))

		one, two := new(request.Served), new(request.Served)
		one.Begin(t.Context(), evil, nil)
		defer one.End(nil)
		two.Begin(t.Context(), good, nil)
		defer two.End(nil)
		var list waiting.List
		list.Add(one)
		list.Add(two)
		var callers []*request.Caller
		ask := byAsking(func(ctx context.Context) (Outcome, error) {
			callers = append(callers, request.CallerFrom(ctx))
			return OutcomeYes, nil
		})
		err := ask(t.Context(), q.About("a token", &list, false))
		if err != nil || !slices.Equal(callers, []*request.Caller{good}) {
			t.Errorf("%v, asked %v", err, callers)
		}
		if _, paused := errors.AsType[*PausedError](context.Cause(one)); !paused || two.Err() != nil {
			t.Errorf("%v, %v", context.Cause(one), two.Err())
		}
	})
}

// Nothing is kept for ever.
func TestQuestionsForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, q := requesttest.New(t), NewQuestions()
		no := byAsking(func(context.Context) (Outcome, error) { return OutcomeNo, nil })
		for i := range 1000 {
			c := w.Caller(fmt.Sprint("program", i))
			_ = no(c.Context(t.Context()), q.About(fmt.Sprint("key ", i), nil, true))
		}
		if n := len(q.keys); n != maxNos {
			t.Errorf("%d keys", n)
		}
		time.Sleep(forgetNos)
		if again, err := q.begin(w.Caller("x").Origin(), "a key"); again || err != nil || len(q.keys)+len(q.ways)+len(q.groups) != 0 || len(q.turns.all) != 0 {
			t.Errorf("%t, %v, %+v", again, err, q)
		}
	})
}

// byAsking asks through an Asking, as a Confirmer does.
func byAsking(answer func(context.Context) (Outcome, error)) func(context.Context, *Asking) error {
	return func(ctx context.Context, a *Asking) error {
		return a.Show(ctx, func(ctx context.Context) (o Outcome, err error) {
			err = a.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
				o, err = answer(ctx)
				return err
			}})
			return o, err
		})
	}
}
