// Package sshagent is the SSH door of the agent: it speaks the agent protocol
// (RFC 9987, and OpenSSH's extensions of it) with clients and leaves every
// decision to the keyring.
//
// It promises:
//
//   - It answers the requests of a connection one after the other, in their order.
//     Connections do not wait for each other.
//   - A bad message ends at most the client's own connection. A client costs memory in
//     proportion to the bytes that it has sent. Package agent/door counts that memory.
//   - It moves a PIN into locked memory, and overwrites the received bytes before it uses
//     their memory again.
//   - It refuses a request that is unknown or incomplete, or has bytes after its end.
//
// The keyring decides which keys there are, which clients may use them and for what.
// Package agent/door has the sockets and connections.
package sshagent

import (
	"context"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// A Keyring answers the requests of clients. Many goroutines call its methods at once. ctx
// ends when the client hangs up. The client gets SSH_AGENT_FAILURE for any error, and the
// keyring has logged the reason.
type Keyring interface {
	List(ctx context.Context, c *request.Caller) (*agent.Listing, error)
	Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error)
	AddToken(ctx context.Context, c *request.Caller, r request.Token) error
	RemoveToken(ctx context.Context, c *request.Caller, r request.Token) error
	Add(ctx context.Context, c *request.Caller, r request.AddKey) error
	// Remove takes the wire form of a public key.
	Remove(ctx context.Context, c *request.Caller, key []byte) error
	RemoveAll(ctx context.Context, c *request.Caller) error
	// Lock and Unlock get a passphrase that the door wipes afterwards.
	Lock(ctx context.Context, c *request.Caller, phrase *secret.Secret) error
	Unlock(ctx context.Context, c *request.Caller, phrase *secret.Secret) error
	// Status answers with JSON about the tokens that the provider names. An empty provider
	// names all tokens. The error is agent.ErrNoControl when the connection may not ask.
	Status(ctx context.Context, c *request.Caller, provider []byte) ([]byte, error)
	// Login and Logout return agent.ErrNoControl as well.
	Login(ctx context.Context, c *request.Caller, r request.TokenLogin) (request.LoginAnswer, error)
	Logout(ctx context.Context, c *request.Caller, provider []byte) error
	// Refuse records a request that the door refuses by itself.
	Refuse(c *request.Caller, action request.Action, reason error)
	// Pass has an upstream agent answer a message that the door does not know. The door
	// logs the error.
	Pass(ctx context.Context, c *request.Caller, message []byte) (answer []byte, err error)
}
