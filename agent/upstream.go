package agent

import (
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/joined"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
)

var errUnconfirmed = errors.New("the socket of the client confirms each signature, and the agent cannot tell what the message does")

// upstreams returns the upstream agents that a connection may reach.
func (k *Keyring) upstreams(c *request.Caller) []Upstream {
	if restricted(c.Socket) {
		return nil
	}
	return k.opts.Upstreams
}

// listUpstreams lists the identities of all upstream agents that answer at once.
func (k *Keyring) listUpstreams(ctx context.Context, c *request.Caller) []Identity {
	ups := k.upstreams(c)
	if len(ups) == 0 {
		return nil
	}
	lists := make([][]Identity, len(ups))
	errs := make([]error, len(ups))
	var all sync.WaitGroup
	for i, u := range ups {
		all.Go(func() { lists[i], errs[i] = u.List(ctx, c) })
	}
	all.Wait()
	origins := make(map[string]Upstream)
	var merged []Identity
	for i, u := range ups {
		k.trouble(ctx, u, errs[i])
		for _, id := range lists[i] {
			wire := string(id.Key.Marshal())
			if origins[wire] == nil {
				origins[wire] = u
				merged = append(merged, id)
			}
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.origins = origins
	return merged
}

// trouble logs an error of an upstream agent. It logs the same error once until the error
// changes.
func (k *Keyring) trouble(ctx context.Context, u Upstream, err error) {
	if ctx.Err() != nil {
		return // the client has gone
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	k.mu.Lock()
	old := k.troubles[u.Name()]
	k.troubles[u.Name()] = text
	k.mu.Unlock()
	switch {
	case text == old:
	case err != nil:
		k.log.Warn("upstream agent cannot be used", "upstream", u.Name(), "reason", err)
	default:
		k.log.Info("upstream agent can be used again", "upstream", u.Name())
	}
}

// upstreamOf returns the upstream agent that has a key, or nil.
func (k *Keyring) upstreamOf(ctx context.Context, c *request.Caller, key []byte) Upstream {
	ups := k.upstreams(c)
	if len(ups) == 0 {
		return nil
	}
	origin := func() Upstream {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.origins[string(key)]
	}
	if u := origin(); u != nil {
		return u
	}
	k.listUpstreams(ctx, c)
	return origin()
}

// signUpstream asks the upstream agent that has the key for a signature.
func (k *Keyring) signUpstream(ctx context.Context, rec *audit.Record, r request.Sign) (*ssh.Signature, error) {
	c := rec.Use.Caller
	u := k.upstreamOf(ctx, c, r.Key)
	if u == nil {
		return nil, errUnknownKey
	}
	rec.Upstream = u.Name()
	if err := k.approveUpstream(ctx, c, u, r); err != nil {
		return nil, err
	}
	return u.Sign(ctx, c, r)
}

// approveUpstream asks a person if the socket or the policy says so. A key of an upstream
// agent has no constraints here, and no table in the configuration.
func (k *Keyring) approveUpstream(ctx context.Context, c *request.Caller, u Upstream, r request.Sign) error {
	pub, err := ssh.ParsePublicKey(r.Key)
	if err != nil {
		return err
	}
	plain := sshkey.Plain(pub)
	t := &request.Target{ID: string(r.Key), Comment: "a key of the agent at " + u.Name(), Fingerprint: k.fingerprint(plain), PublicKey: cryptoOf(plain)}
	use := &request.Use{Comment: t.Comment, Key: t.PublicKey}
	k.setUse(use, new(request.Login), c, r)
	return k.approve(request.WithUse(ctx, use), use, t, "")
}

// Pass sends a message that the door does not know to the upstream agents, one after the
// other. It returns the first answer that is not a refusal.
func (k *Keyring) Pass(ctx context.Context, c *request.Caller, message []byte) ([]byte, error) {
	inside, err := k.lock.enter(ctx, c, nil)
	if err != nil {
		return nil, err
	}
	defer inside.leave()
	if err := mayChange(c); err != nil {
		return nil, err
	}
	if c.Socket != nil && c.Socket.Confirm != "" && c.Socket.Confirm != approval.ConfirmNever {
		// The message may ask for a signature.
		return nil, errUnconfirmed
	}
	all := []error{}
	for _, u := range slices.Clone(k.upstreams(c)) {
		answer, err := u.Pass(inside, c, message)
		if err == nil {
			return answer, nil
		}
		all = append(all, err)
	}
	if len(all) == 0 {
		return nil, ErrNotPassed
	}
	return nil, joined.Errors(all...)
}
