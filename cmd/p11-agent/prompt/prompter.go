package prompt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
	"p11-agent/pinentry/waiting"
)

// A prompter asks the questions about one thing, one after the other, at the first place that
// can show them. One goroutine at a time uses it.
type prompter struct {
	*Asker
	waiting waiting.Requests // on whose behalf it asks; nil: one client
	what    string           // the thing, for clients that wait: "the PIN of the token work"
	consent bool             // the questions are for consent: the client has no say where
	hint    string           // the next step when no place can show the question

	shown atomic.Pointer[location] // the place of the open question; any goroutine reads it
	// told has the place that each waiting client knows of. The goroutine of waiting.Ask uses it.
	told map[*request.Caller]*location
	recipient
}

// A recipient is the client whose person sees the questions.
type recipient struct {
	started bool
	caller  *request.Caller
	desk    *peer.Desk // of the caller; nil: not looked at yet
	display *location  // the first display that was found
	finders []finder   // not tried yet
	seen    []any      // keys of the places that were tried
	tried   []error    // why each place failed
	at      *location  // the place of the dialogue
	d       *pinentry.Dialogue
}

// ask shows a question and returns its error. When several clients wait for the answer, it
// asks the person of the client that waits longest. The question moves to the next client when
// that client leaves, has no place, or gets no answer in its turn.
func (c *prompter) ask(ctx context.Context, question func(context.Context, *pinentry.Dialogue) error) error {
	return c.askFor(ctx, c.turn.get(), question)
}

// askFor is ask with another turn. With 0 the question stays until its answer.
func (c *prompter) askFor(ctx context.Context, turn time.Duration, question func(context.Context, *pinentry.Dialogue) error) error {
	return waiting.Ask(ctx, c.waiting, waiting.Question{
		Ask: func(ctx context.Context) error {
			if caller := request.CallerFrom(ctx); !c.started || caller != c.caller {
				c.begin(caller)
			}
			for {
				if err := c.find(ctx); err != nil {
					return err
				}
				c.shown.Store(c.at)
				err := question(ctx, c.d)
				c.shown.Store(nil)
				if !errors.Is(err, pinentry.ErrNoPrompt) {
					return err
				}
				c.giveUp(c.at.name, err)
				c.leave()
			}
		},
		Pass: func(err error) bool { return errors.Is(err, pinentry.ErrNoPrompt) },
		Turn: turn, Takes: c.takes,
		Patience: tellAfter, Tell: c.tell,
	})
}

// begin starts anew for another client.
func (c *prompter) begin(caller *request.Caller) {
	if c.started {
		c.log.Info("the prompt moves to the next client that waits for it", "prompt", c.what)
	}
	c.close()
	c.recipient = recipient{started: true, caller: caller}
	switch {
	case !c.consent:
		c.finders = []finder{
			c.clientDisplay, c.clientTerminal, c.managerDisplay, c.ownDisplay, c.ownGPGTTY, c.ownTerminal, c.askpass,
		}
	case c.displayOnly.Load():
		c.finders = []finder{c.managerDisplay, c.ownDisplay, c.askpass}
	default:
		c.finders = []finder{c.managerDisplay, c.ownDisplay, c.clientTerminal, c.ownGPGTTY, c.ownTerminal, c.askpass}
	}
}

// other returns the first place for another client that waits. It returns nil when that client
// has no place that a person looks at. done releases the place.
func (c *prompter) other(ctx context.Context) (at *location, done func()) {
	o := &prompter{Asker: c.Asker, consent: c.consent}
	o.begin(request.CallerFrom(ctx))
	for _, find := range o.finders {
		at, err := find(ctx)
		if err != nil || at == nil {
			continue
		}
		o.at = at
		if at.spot != nil && ctx.Err() == nil {
			return at, o.close
		}
		o.leave()
	}
	o.close()
	return nil, func() {}
}

// takes tells whether the prompt can move to another client that waits: the client has a place
// of its own, or has given its answer.
func (c *prompter) takes(o waiting.Other) bool {
	now := c.shown.Load()
	if now == nil {
		return false // the prompt is between two places
	}
	if o.Answered {
		return true
	}
	at, done := c.other(o.Context)
	defer done()
	return at != nil && at.spot != now.spot
}

// tell says to another client that waits where the prompt is: in the client's terminal, or at
// the desktop when the client has no terminal.
func (c *prompter) tell(o waiting.Other) {
	ctx := o.Context
	now, caller := c.shown.Load(), request.CallerFrom(ctx)
	if now == nil || caller == nil || c.told[caller] == now {
		return
	}
	at, done := c.other(ctx)
	defer done()
	if at == nil && now.spot == nil || at != nil && at.spot == now.spot {
		return // the client has the same place
	}
	if c.told == nil {
		c.told = make(map[*request.Caller]*location)
	}
	c.told[caller] = now
	c.log.Info("a client waits for a prompt that is elsewhere", "prompt", c.what, "place", now.name, "client", caller.Client().String())
	if at != nil && at.TTY != nil {
		then := "it comes here"
		if o.Answered {
			then = "this goes on"
		}
		text := fmt.Sprintf("p11-agent: this waits for %s, which is asked for elsewhere: %s. Without an answer there, %s.", c.what, now.name, then)
		if err := at.Say(text); err != nil {
			c.log.Debug("the client cannot be told in its terminal", "reason", err)
		}
		return
	}
	if c.notify != nil {
		c.notify(c.what+now.name, []string{"It waits for " + c.what + ", which is asked for elsewhere: " + now.name, Requester(caller.Client())})
	}
}

// find opens a dialogue at the next place that can show questions, unless one is open.
func (c *prompter) find(ctx context.Context) error {
	for c.d == nil {
		if len(c.finders) == 0 {
			return &noPlaceError{c.tried, c.hint}
		}
		find := c.finders[0]
		c.finders = c.finders[1:]
		at, err := find(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			c.log.Debug("cannot ask at this place", "reason", err)
			c.tried = append(c.tried, err)
			continue
		}
		if at == nil {
			continue
		}
		c.at = at
		if slices.Contains(c.seen, at.key) {
			c.leave()
			continue
		}
		c.seen = append(c.seen, at.key)
		c.log.Debug("asking", "place", at.name)
		d, err := c.pinentry.Open(ctx, at.Place)
		if errors.Is(err, pinentry.ErrNoPrompt) {
			c.giveUp(at.name, err)
			c.leave()
			continue
		}
		if err != nil {
			c.leave()
			return err
		}
		c.d = d
	}
	return nil
}

// giveUp notes why a place failed.
func (c *prompter) giveUp(name string, err error) {
	c.log.Info("cannot ask here, trying the next place", "place", name, "reason", err)
	c.tried = append(c.tried, fmt.Errorf("%s: %w", name, err))
}

// leave ends the dialogue and releases its place.
func (c *prompter) leave() {
	if c.d != nil {
		_ = c.d.Close() // never fails
		c.d = nil
	}
	if c.at != nil && c.at.close != nil {
		c.at.close()
	}
	c.at = nil
}

func (c *prompter) close() {
	c.leave()
	if c.desk != nil {
		c.desk.Close()
		c.desk = nil
	}
}

// client returns where the client is. It looks once.
func (c *prompter) client() *peer.Desk {
	if c.desk == nil {
		var p peer.Peer // unknown
		if c.caller != nil {
			p = c.caller.Client()
		}
		c.desk = p.Desk()
	}
	return c.desk
}
