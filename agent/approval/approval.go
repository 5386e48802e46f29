// Package approval decides whether a request may use a key. It applies the rules of the
// configuration, and asks a person. It remembers an answer for as long as the person says.
// When a person has refused requests of a client, it pauses the questions of that client.
//
// It promises that an answer counts only for the use that the person saw: the same key,
// host, user, program and way. The Confirmer shows the question.
package approval

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"

	"p11-agent/agent/request"
	"p11-agent/pinentry/waiting"
)

// An Approver decides whether a key may be used. It asks a person where a policy, a
// socket or a constraint says so, and remembers the answers. Any goroutine may call its
// methods.
type Approver struct {
	// Confirm asks a person; nil: there is no way to ask.
	Confirm Confirmer
	// Questions decides whether the agent may ask a person.
	Questions *Questions
	// Log gets a line for each answer that lasts.
	Log *slog.Logger

	kept remembered
}

// Approve returns nil if the request may use the key. Otherwise the error says why not.
// Approve waits for the person as long as ctx lasts.
//
// policy returns the policy of a key of a token. For nil, it returns the policy of keys on
// no token. If policy is nil, no policy asks a person. each says why the agent asks for
// each use. If each is empty, the agent asks if the socket or the policy says so.
func (a *Approver) Approve(ctx context.Context, u *request.Use, t *request.Target, policy func(request.Key) Policy, each string) error {
	d := decide(u, t, policy)
	if d.confirm == ConfirmDeny {
		return &DeniedError{Why: d.why()}
	}
	why := each
	atSocket := decideSocket(u)
	d = d.stricter(atSocket)
	switch {
	case why != "":
	case atSocket.confirm == ConfirmAlways && atSocket.plain == Once:
		// A yes at such a socket counts for one signature.
		why = atSocket.why()
	case u.Unlimited && !u.PINPays:
		return a.ApproveLoss(ctx, u, t)
	case d.confirm == ConfirmNever:
		return nil
	}
	name, ok := sameness(u, t.ID)
	if why != "" || !ok {
		return a.ask(ctx, nil, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: cmp.Or(why, d.why())}).error()
	}
	return a.askOnce(ctx, u, t, d, name)
}

// askOnce asks a person unless an earlier answer counts. Requests with the same name share
// a question.
func (a *Approver) askOnce(ctx context.Context, u *request.Use, t *request.Target, d decision, name string) error {
	if a.kept.has(name, t) {
		return nil
	}
	answer, err := a.kept.asking.Do(ctx, name, func(ctx context.Context, list *waiting.List) (Answer, error) {
		if a.kept.has(name, t) {
			return Answer{Allowed: true}, nil
		}
		generation := a.kept.now()
		said := a.ask(ctx, list, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: d.why(), Plain: d.plain, Offer: true})
		if said.Allowed && said.For != Once {
			a.kept.keep(name, t, u, said.For, generation)
			a.Log.Info("allowed for longer", "result", "ok", "key", t.Fingerprint, "comment", u.Comment, "what", u.Content.String(),
				"lasts", said.For.String(), "client", u.Caller.Client().String(), "forwarded", u.Caller.Forwarded)
		}
		return said.Answer, said.err
	})
	return asked{answer, err}.error()
}

// ApproveLoss asks a person whether a request may use a key without the limits that the
// key had before it was removed.
func (a *Approver) ApproveLoss(ctx context.Context, u *request.Use, t *request.Target) error {
	const why = "the limits that the key had before it was removed"
	return a.ask(ctx, nil, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: why}).error()
}

// Remembered returns the answers that still count, the newest first.
func (a *Approver) Remembered() []Status { return a.kept.list() }

// Forget forgets the answers about keys with these homes, if of returns true for them.
func (a *Approver) Forget(of func(homes []request.Key) bool) {
	a.kept.forget(func(kept answer) bool { return of(kept.homes) })
}

// ForgetKey forgets the answers about the key with this Target.ID.
func (a *Approver) ForgetKey(id string) { a.kept.forgetIdentity(id) }

// ForgetAll forgets all answers.
func (a *Approver) ForgetAll() { a.kept.forgetAll() }

// asked is the result of a question: an answer or an error.
type asked struct {
	Answer
	err error
}

func (a asked) error() error {
	switch {
	case a.err != nil:
		return a.err
	case !a.Allowed:
		return ErrDeclined
	}
	return nil
}

// ask asks a person. requests asks on behalf of the requests that wait for the answer; nil: one
// request.
func (a *Approver) ask(ctx context.Context, requests waiting.Requests, q Question) asked {
	if a.Confirm == nil {
		return asked{err: ErrNoPrompt}
	}
	var answer Answer
	q.Asking = a.Questions.About(q.KeyFingerprint, requests, true)
	err := q.Asking.Show(ctx, func(ctx context.Context) (_ Outcome, err error) {
		answer, err = a.Confirm.Confirm(ctx, q)
		return OutcomeOf(answer.Allowed, err), err
	})
	if err != nil {
		return asked{err: fmt.Errorf("ask for confirmation: %w", err)}
	}
	if answer.For < UntilLock {
		answer.For = Once
	}
	return asked{Answer: answer}
}
