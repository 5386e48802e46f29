package agent

import (
	"bytes"
	"context"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
)

// A Use is what a key is about to be used for. It goes along in the context of
// what is done for a request, for whoever tells a person about it. Like the
// request it is of, it is not to be kept once that is answered.
type Use struct {
	Comment string        // of the identity
	Key     ssh.PublicKey // of the identity, or what its certificate certifies
	Caller  *Caller
	Login   *Login // nil: it is no request to log in
}

// Host returns the key of the host that the login is at, or nil when that is
// not known. What a request names itself is what its signature is good for;
// otherwise it is the host that the connection has proved to be bound to.
func (u *Use) Host() ssh.PublicKey {
	switch {
	case u.Login == nil:
		return nil
	case u.Login.HostKey != nil:
		key, err := ssh.ParsePublicKey(u.Login.HostKey)
		if err != nil {
			return nil
		}
		return key
	}
	for _, b := range u.Caller.Binds {
		if !b.Forwarding && bytes.Equal(b.SessionID, u.Login.SessionID) {
			return b.HostKey
		}
	}
	return nil
}

type (
	useKey    struct{}
	callerKey struct{}
)

// context returns a context for what is done for a request of c.
func (c *Caller) context(ctx context.Context) context.Context {
	return context.WithValue(peer.NewContext(ctx, c.Peer), callerKey{}, c)
}

// CallerFromContext returns the Caller whose request ctx is of, or nil. Like a
// Use it goes along with what is done for a request.
func CallerFromContext(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	return c
}

// UseFromContext returns the Use that ctx carries, or nil.
func UseFromContext(ctx context.Context) *Use {
	u, _ := ctx.Value(useKey{}).(*Use)
	return u
}
