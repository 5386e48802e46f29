package prompt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

// fakeAsker is a person who gives no PIN.
type fakeAsker struct {
	about pin.Request // of the last dialogue
	asked int
	err   error // what the person does
}

func (f *fakeAsker) Ask(ctx context.Context, about pin.Request) (pin.Dialogue, error) {
	f.about = about
	return f, waiting.Ask(ctx, about.Waiting, waiting.Question{Ask: func(context.Context) error { return nil }})
}

func (f *fakeAsker) ask(ctx context.Context, answer func(context.Context) error) error {
	return waiting.Ask(ctx, f.about.Waiting, waiting.Question{Ask: func(ctx context.Context) error {
		f.asked++
		return answer(ctx)
	}})
}

func (f *fakeAsker) PIN(ctx context.Context, _ string) (*secret.Secret, error) {
	return nil, f.ask(ctx, func(context.Context) error { return f.err })
}

func (f *fakeAsker) LastTry(ctx context.Context, _ string) (bool, error) {
	return false, f.ask(ctx, func(context.Context) error { return nil })
}

func (f *fakeAsker) Notice(ctx context.Context) error {
	return f.ask(ctx, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
}

func (f *fakeAsker) Close() error { return nil }

// When a person answers a PIN prompt without a PIN, the next prompt waits.
func TestAttack10PINPrompts(t *testing.T) {
	errCancelled := pin.ErrCancelled
	for name, test := range map[string]struct {
		err error
		ask func(ctx context.Context, d pin.Dialogue) error
	}{
		"cancelled": {errCancelled, func(ctx context.Context, d pin.Dialogue) error { _, err := d.PIN(ctx, ""); return err }},
		"no answer": {pinentry.ErrTimeout, func(ctx context.Context, d pin.Dialogue) error { _, err := d.PIN(ctx, ""); return err }},
		"last try": {nil, func(ctx context.Context, d pin.Dialogue) error {
			if yes, err := d.LastTry(ctx, ""); yes || err != nil {
				return err
			}
			return errCancelled
		}},
		"cancelled on the reader": {nil, func(ctx context.Context, d pin.Dialogue) error {
			notice, done := context.WithCancel(ctx)
			done() // the login is over
			if err := d.Notice(notice); !errors.Is(err, context.Canceled) {
				return err
			}
			d.(pin.ReaderObserver).TypedOnReader(errCancelled)
			return errCancelled
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				person := &fakeAsker{err: test.err}
				a := &pausingAsker{person, approval.NewQuestions()}
				c := &request.Caller{Peer: peer.Peer{Known: true, UID: 1000}, Forwarded: true}
				paused := 0
				for i := range 700 {
					// Another key of the token each time.
					d, err := a.Ask(c.Context(t.Context()), pin.Request{Token: wire.TokenID{Label: "work"}, Key: fmt.Sprint(i)})
					if err == nil {
						err = test.ask(c.Context(t.Context()), d)
					}
					if _, ok := errors.AsType[*approval.PausedError](err); ok {
						paused++
					} else if err == nil {
						t.Fatal("there was no error")
					}
					time.Sleep(10 * time.Millisecond)
				}
				if person.asked > 3 || paused != 700-person.asked {
					t.Errorf("asked %d times, and paused %d times", person.asked, paused)
				}
			})
		})
	}
}

// A program that says that it tells the person by itself to use the reader is paused as
// others are, also when it hangs up each time.
func TestAttack10Reader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &pausingAsker{&Asker{open: make(map[*pinDialogue]struct{}), log: slog.New(slog.DiscardHandler)}, approval.NewQuestions()}
		c := &request.Caller{Peer: peer.Peer{Known: true, UID: 1000}}
		asked := 0
		for range 100 {
			ctx := c.Context(t.Context())
			d, err := a.Ask(ctx, pin.Request{Token: wire.TokenID{Label: "work"}, Pad: true, ClientTells: true})
			if err != nil {
				if _, ok := errors.AsType[*approval.PausedError](err); !ok {
					t.Fatal(err)
				}
				continue
			}
			asked++
			during, end := context.WithCancel(ctx)
			time.AfterFunc(time.Millisecond, end)
			if err := d.Notice(during); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			d.(pin.ReaderObserver).TypedOnReader(pin.ErrCancelled)
			_ = d.Close() // never fails
		}
		if asked > 3 {
			t.Errorf("the reader asked %d times", asked)
		}
	})
}
