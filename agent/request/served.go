package request

import (
	"context"
	"errors"

	"p11-agent/agent/peer"
)

type (
	useKey    struct{}
	callerKey struct{}
	servedKey struct{}
)

// A Served is a request that the agent serves. It is the context of everything that the
// agent does for the request, and carries the Caller and the Use.
//
// They travel in the context, not as arguments: package token is between the keyring and
// the prompts, and must not know them. Prompts, notifications and pauses read them. They
// never decide what package token does.
type Served struct {
	context.Context
	caller *Caller
	use    *Use // nil: no key is used
	cancel context.CancelCauseFunc
}

// Begin starts to serve a request. The context ends with ctx, or with End. use may be nil.
func (s *Served) Begin(ctx context.Context, caller *Caller, use *Use) {
	s.caller, s.use = caller, use
	s.Context, s.cancel = context.WithCancelCause(ctx)
}

// End ends the request. cause is what context.Cause returns afterwards; nil: the request
// is answered. Only the first End counts.
func (s *Served) End(cause error) { s.cancel(cause) }

// Value returns the Caller, the Use and the Served itself under this package's keys.
func (s *Served) Value(key any) any {
	switch key.(type) {
	case callerKey:
		return s.caller
	case servedKey:
		return s
	case useKey:
		if s.use != nil {
			return s.use
		}
	}
	return s.Context.Value(key)
}

// ServedFrom returns the request that ctx belongs to, or nil.
func ServedFrom(ctx context.Context) *Served {
	s, _ := ctx.Value(servedKey{}).(*Served)
	return s
}

// WithUse returns a context that carries use.
func WithUse(ctx context.Context, use *Use) context.Context {
	return context.WithValue(ctx, useKey{}, use)
}

// ErrLocked says that the agent is locked. It is the cause when the lock ends a request.
var ErrLocked = errors.New("the agent is locked (ssh-add -X unlocks it)")

// Context returns a context for a request of c.
func (c *Caller) Context(ctx context.Context) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns the Caller whose request ctx belongs to, or nil.
func CallerFrom(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	return c
}

// PeerFrom returns the process of that Caller, or a Peer that is not Known.
func PeerFrom(ctx context.Context) peer.Peer {
	if c := CallerFrom(ctx); c != nil {
		return c.Client()
	}
	return peer.Peer{}
}

// UseFrom returns the Use that ctx carries, or nil.
func UseFrom(ctx context.Context) *Use {
	u, _ := ctx.Value(useKey{}).(*Use)
	return u
}
