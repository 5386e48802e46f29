package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
)

const (
	// insertPatience is Options.InsertTimeout unless that says something else.
	insertPatience = time.Minute
	// insertPoke is how often modules are looked at that do not tell of new tokens.
	insertPoke = 2 * time.Second
)

// insert waits until a token that has the identity is there, or a person has
// declined to insert it. Everybody who wants the same identity shares the wait.
func (k *Keyring) insert(ctx context.Context, id *identity) error {
	_, err := k.insertions.Do(ctx, id.ID, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, k.awaitToken(ctx, id)
	})
	return err
}

// awaitToken has a person asked for a token until it is there.
func (k *Keyring) awaitToken(ctx context.Context, id *identity) error {
	w := approval.Wanted{Comment: id.Comment, Fingerprint: k.fingerprint(id.plain)}
	for _, home := range id.Homes {
		if name := home.TokenName(); !slices.Contains(w.Tokens, name) {
			w.Tokens = append(w.Tokens, name)
		}
	}
	tokens := strings.Join(w.Tokens, " or ")
	timeout := k.opts.InsertTimeout
	if timeout == 0 {
		timeout = insertPatience
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, approval.ErrNotInserted)
	type answer struct {
		in  bool
		err error
	}
	answers := make(chan answer, 1)
	open := false // a prompt is
	defer func() {
		cancel()
		if open {
			<-answers
		}
	}()
	ask := func() {
		open = true
		go func() {
			var a answer
			a.err = k.opts.Questions.Ask(ctx, w.Fingerprint, false, func(ctx context.Context) (_ approval.Outcome, err error) {
				a.in, err = k.opts.Insert.Insert(ctx, w)
				return approval.OutcomeOf(a.in, err), err
			})
			answers <- a
		}()
	}
	ask()
	poke := time.NewTicker(insertPoke)
	defer poke.Stop()
	for {
		changed := k.opts.Tokens.Changed()
		if slices.ContainsFunc(id.Homes, request.Key.Present) {
			return nil
		}
		select {
		case <-changed:
		case <-poke.C:
			k.opts.Tokens.Poke()
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
				return fmt.Errorf("token %s is not there, and nobody can be asked to insert it: %w", tokens, a.err)
			case !a.in:
				return fmt.Errorf("token %s is needed: %w", tokens, approval.ErrTokenDeclined)
			}
			if err := k.opts.Tokens.Rescan(ctx); err != nil && ctx.Err() == nil {
				return err
			}
			if !slices.ContainsFunc(id.Homes, request.Key.Present) {
				ask()
			}
		}
	}
}
