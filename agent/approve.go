package agent

import (
	"context"
	"slices"

	"p11-agent/agent/request"
)

// ForgetApprovals makes the agent ask a person again about the keys of tokens for which of
// returns true, and about keys on no token if of returns true for nil.
func (k *Keyring) ForgetApprovals(of func(request.Key) bool) {
	k.approver.Forget(func(homes []request.Key) bool {
		if len(homes) == 0 {
			return of(nil)
		}
		return slices.ContainsFunc(homes, of)
	})
}

// approve asks a person where the constraints, the socket or the configuration want it.
// The error says why the use is refused. each says why a person is asked for each use.
func (k *Keyring) approve(ctx context.Context, u *request.Use, t *request.Target, each string) error {
	k.mu.Lock()
	policy := k.opts.Approval
	k.mu.Unlock()
	return k.approver.Approve(ctx, u, t, policy, each)
}
