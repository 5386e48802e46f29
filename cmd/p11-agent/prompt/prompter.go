package prompt

import (
	"context"
	"errors"
	"fmt"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
	"p11-agent/pinentry/waiting"
	"slices"
	"sync/atomic"
	"time"
)

// prompter asks one thing after the other at the first place that can. It is
// for one goroutine at a time.
type prompter struct {
	*Asker
	what    string // is asked, for clients that wait: "the PIN of the token work"
	consent bool   // a yes is wanted: the client has no say where
	hint    string // what to do when nobody can be asked

	shown atomic.Pointer[location]      // while a question is open; read by any goroutine
	told  map[*request.Caller]*location // the client was told of; for the goroutine of waiting.Ask
	recipient
}

// ask has a question asked. Of several who wait for the answer it is the one who
// has waited longest that is asked; it moves to the next when that one leaves, has
// no place, or does not answer in its turn.
func (c *prompter) ask(ctx context.Context, question func(context.Context, *pinentry.Dialogue) error) error {
	return c.askFor(ctx, c.turn.get(), question)
}

// askFor is ask with another turn; 0: the question stays until it is answered.
func (c *prompter) askFor(ctx context.Context, turn time.Duration, question func(context.Context, *pinentry.Dialogue) error) error {
	return waiting.Ask(ctx, waiting.Question{
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

// begin starts anew, with somebody else.
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

// other returns where another client that waits would be asked first; nil: nowhere
// that a person could look at. done gives the place back.
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

// takes tells whether the prompt can go to another client that waits: it would be asked
// at a place of its own, or need not be asked.
func (c *prompter) takes(o waiting.Other) bool {
	now := c.shown.Load()
	if now == nil {
		return false // it is on its way from one place to the next
	}
	if o.Answered {
		return true
	}
	at, done := c.other(o.Context)
	defer done()
	return at != nil && at.spot != now.spot
}

// tell tells another client that waits where the prompt is: in its terminal if it has
// one, or else at the desktop.
func (c *prompter) tell(o waiting.Other) {
	ctx := o.Context
	now, caller := c.shown.Load(), request.CallerFrom(ctx)
	if now == nil || caller == nil || c.told[caller] == now {
		return
	}
	at, done := c.other(ctx)
	defer done()
	if at == nil && now.spot == nil || at != nil && at.spot == now.spot {
		return // it would be asked there, too
	}
	if c.told == nil {
		c.told = make(map[*request.Caller]*location)
	}
	c.told[caller] = now
	c.log.Info("a client waits for a prompt that is elsewhere", "prompt", c.what, "place", now.name, "client", caller.Who().String())
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
		c.notify(c.what+now.name, []string{"It waits for " + c.what + ", which is asked for elsewhere: " + now.name, Requester(caller.Who())})
	}
}

// find makes sure that there is a dialogue.
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
			c.log.Debug("this is no place to ask", "reason", err)
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

func (c *prompter) giveUp(name string, err error) {
	c.log.Info("cannot ask here, trying the next place", "place", name, "reason", err)
	c.tried = append(c.tried, fmt.Errorf("%s: %w", name, err))
}

// leave ends the dialogue.
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

// client looks where the client is, once.
func (c *prompter) client() *peer.Desk {
	if c.desk == nil {
		var p peer.Peer // unknown
		if c.caller != nil {
			p = c.caller.Who()
		}
		c.desk = p.Desk()
	}
	return c.desk
}

// recipient is what is known of the client whose person is asked.
type recipient struct {
	started bool
	caller  *request.Caller
	desk    *peer.Desk // the caller's; nil when it was not looked at
	display *location  // the first that was found
	finders []finder   // that are left
	seen    []any      // keys of places that were tried
	tried   []error    // why each was of no use
	at      *location  // where it is
	d       *pinentry.Dialogue
}
