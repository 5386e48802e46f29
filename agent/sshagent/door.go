// Package sshagent is the SSH door of the agent: it speaks the agent protocol
// (RFC 9987, and OpenSSH's extensions of it) with clients and leaves every
// decision to the keyring.
package sshagent

import (
	"context"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
)

// A Keyring answers the requests of clients. Its methods are called from many
// goroutines at once; ctx ends when the client hangs up. Any error becomes
// SSH_AGENT_FAILURE: the keyring has logged the reason.
type Keyring interface {
	List(ctx context.Context, c *agent.Caller) ([]agent.Identity, error)
	Sign(ctx context.Context, c *agent.Caller, r agent.SignRequest) (*ssh.Signature, error)
	AddToken(ctx context.Context, c *agent.Caller, r agent.TokenRequest) error
	RemoveToken(ctx context.Context, c *agent.Caller, r agent.TokenRequest) error
	// Remove takes the wire form of a public key.
	Remove(ctx context.Context, c *agent.Caller, key []byte) error
	RemoveAll(ctx context.Context, c *agent.Caller) error
}
