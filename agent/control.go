package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
)

// ErrNoControl says that a connection may not control the agent. MayControl wraps it with
// the reason.
var ErrNoControl = errors.New("the agent may not be controlled like this")

var (
	errNotHere     = errors.New("a [[socket]] does not permit it")
	errBound       = errors.New("its connection belongs to an SSH session, and may come from another machine")
	errUnknownPeer = errors.New("the process that asks has ended or cannot be looked at")
	errOtherUser   = errors.New("the request comes from another user; even root is refused")
)

// MayControl returns nil if a connection may read the agent's status and log in and out
// of tokens: see the Keyring's methods Status, Login and Logout.
//
// A connection may if p11-agent itself has opened it, on this machine and for the agent's
// own user. The rule protects from other machines. Forwarded requests (ssh -A, ssh -R,
// socat, a container's proxy) come from the program that forwards them. The agent
// recognises ssh by its binds, since OpenSSH 8.9, and every program by its file. It
// refuses a process that it cannot look at.
//
// The rule does not protect from other programs of the user on this machine. They can run
// p11-agent, as the user can. The signatures that they can have anyway are worth more.
//
// The error is ErrNoControl.
func MayControl(c *request.Caller) error {
	reason := func() error {
		switch {
		case c.Socket != nil:
			return errNotHere
		case c.Forwarded || c.BindFailed || len(c.Binds) > 0:
			return errBound
		}
		who := c.Client()
		switch {
		case !who.Known || len(who.Chain) == 0:
			return errUnknownPeer
		case who.UID != os.Geteuid():
			return errOtherUser
		}
		return who.SameProgram()
	}()
	if reason != nil {
		return fmt.Errorf("%w: %w", ErrNoControl, reason)
	}
	return nil
}

// lookTime bounds how long a status waits for tokens that are looked at again.
const lookTime = 5 * time.Second

// Status returns the result of Options.Report for the tokens that the provider selects. An
// empty provider selects everything. If the provider selects a known key, Status returns at
// once. Otherwise the key may be new: Status looks at the tokens again, for 5 s at most.
func (k *Keyring) Status(ctx context.Context, c *request.Caller, provider []byte) ([]byte, error) {
	rec := k.begin(c, request.ActionStatus)
	rec.Told = true
	report, err := k.report(ctx, c, provider)
	if err != nil {
		k.audit.End(rec, err)
	}
	return report, err
}

func (k *Keyring) report(ctx context.Context, c *request.Caller, provider []byte) ([]byte, error) {
	if err := MayControl(c); err != nil {
		return nil, err
	}
	if k.opts.Report == nil {
		return nil, errors.New("there is no status")
	}
	var s request.Selection
	if len(provider) > 0 {
		var err error
		if s, err = k.opts.Tokens.Parse(provider, false); err != nil {
			return nil, err
		}
		defer k.opts.Tokens.Drop(s)
		if !slices.ContainsFunc(k.opts.Tokens.Keys(), s.Match) {
			ctx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			if err := k.opts.Tokens.Rescan(ctx); err != nil {
				k.log.Debug("cannot look at all tokens", "reason", err)
			}
		}
	}
	return k.opts.Report(k.Now(), s)
}

// Login logs in to the single token that the request names. It tries once. If one try is
// left, the agent first asks a person whether to use it. The request cannot prevent that.
// The answer counts even if there is an error.
func (k *Keyring) Login(ctx context.Context, c *request.Caller, r request.TokenLogin) (request.LoginAnswer, error) {
	rec := k.begin(c, request.ActionLogin)
	rec.Told = true
	answer, err := k.login(ctx, rec, r)
	if answer.Already {
		rec.Note = "nothing was to be done"
	}
	k.audit.End(rec, err)
	return answer, err
}

func (k *Keyring) login(ctx context.Context, rec *audit.Record, r request.TokenLogin) (request.LoginAnswer, error) {
	c := rec.Use.Caller
	if err := MayControl(c); err != nil {
		return request.LoginAnswer{}, err
	}
	inside, err := k.lock.enter(ctx, c, nil)
	if err != nil {
		return request.LoginAnswer{}, err
	}
	defer inside.leave()
	s, err := k.opts.Tokens.Parse(r.Provider, false)
	if err != nil {
		return request.LoginAnswer{}, err
	}
	rec.URI = s.String()
	defer k.opts.Tokens.Drop(s)
	answer, err := k.opts.Tokens.Login(inside, s, r.PIN)
	return answer, inside.reason(err)
}

// Logout logs out of the tokens that the provider selects, and forgets their PINs. An empty
// provider selects all tokens.
func (k *Keyring) Logout(ctx context.Context, c *request.Caller, provider []byte) error {
	rec := k.begin(c, request.ActionLogout)
	rec.Told = true
	err := k.logout(ctx, rec, provider)
	k.audit.End(rec, err)
	return err
}

func (k *Keyring) logout(ctx context.Context, rec *audit.Record, provider []byte) error {
	if err := MayControl(rec.Use.Caller); err != nil {
		return err
	}
	if len(provider) == 0 {
		return k.opts.Tokens.LogoutAll(ctx)
	}
	s, err := k.opts.Tokens.Parse(provider, false)
	if err != nil {
		return err
	}
	rec.URI = s.String()
	defer k.opts.Tokens.Drop(s)
	return k.opts.Tokens.Logout(ctx, s)
}
