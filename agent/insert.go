package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/pinentry/waiting"
)

const (
	// insertPatience is the default of Options.InsertTimeout.
	insertPatience = time.Minute
	// insertPoke is how often the agent looks at modules that do not report new tokens.
	insertPoke = 2 * time.Second
)

// insert waits until a token that has the identity is present, or until a person has
// declined to insert it. All requests for the same identity share the wait.
func (g *Guard) insert(ctx context.Context, t *request.Target) error {
	_, err := g.insertions.Do(ctx, t.ID, func(ctx context.Context, list *waiting.List) (struct{}, error) {
		return struct{}{}, g.awaitToken(ctx, list, t)
	})
	return err
}

// awaitToken asks a person for a token until the token is present. list has the requests that
// wait for it.
func (g *Guard) awaitToken(ctx context.Context, list *waiting.List, t *request.Target) error {
	w := approval.Wanted{Comment: t.Comment, Fingerprint: t.Fingerprint}
	for _, home := range t.Homes {
		if name := home.TokenName(); !slices.Contains(w.Tokens, name) {
			w.Tokens = append(w.Tokens, name)
		}
	}
	tokens := strings.Join(w.Tokens, " or ")
	ctx, cancel := context.WithTimeoutCause(ctx, g.insertTimeout, approval.ErrNotInserted)
	type answer struct {
		in  bool
		err error
	}
	answers := make(chan answer, 1)
	open := false // a prompt is open
	defer func() {
		cancel()
		if open {
			<-answers
		}
	}()
	ask := func() {
		open = true
		w.Asking = g.approver.Questions.About(w.Fingerprint, list, false)
		go func() {
			var a answer
			a.err = w.Asking.Show(ctx, func(ctx context.Context) (_ approval.Outcome, err error) {
				a.in, err = g.inserter.Insert(ctx, w)
				return approval.OutcomeOf(a.in, err), err
			})
			answers <- a
		}()
	}
	ask()
	poke := time.NewTicker(insertPoke)
	defer poke.Stop()
	for {
		changed := g.tokens.Changed()
		if slices.ContainsFunc(t.Homes, request.Key.Present) {
			return nil
		}
		select {
		case <-changed:
		case <-poke.C:
			g.tokens.Poke()
		case <-ctx.Done():
			return fmt.Errorf("token %s is needed: %w", tokens, context.Cause(ctx))
		case a := <-answers:
			open = false
			switch {
			case ctx.Err() != nil:
				return fmt.Errorf("token %s is needed: %w", tokens, context.Cause(ctx))
			case approval.Declined(a.err):
				return fmt.Errorf("token %s is needed: %w", tokens, a.err)
			case a.err != nil:
				return fmt.Errorf("token %s is absent, and no prompt can ask for it: %w", tokens, a.err)
			case !a.in:
				return fmt.Errorf("token %s is needed: %w", tokens, approval.ErrTokenDeclined)
			}
			if err := g.tokens.Rescan(ctx); err != nil && ctx.Err() == nil {
				return err
			}
			if !slices.ContainsFunc(t.Homes, request.Key.Present) {
				ask()
			}
		}
	}
}
