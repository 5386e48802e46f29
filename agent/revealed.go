package agent

import (
	"errors"
	"slices"

	"p11-agent/agent/request"
)

// hider is a Key whose token may hide its private key until a login. Until then, the agent
// does not know the label and ID of the private key.
type hider interface{ Hidden() bool }

// hidden tells whether a token still hides its private key.
func (id *identity) hidden() bool {
	return slices.ContainsFunc(id.Homes, func(k request.Key) bool {
		h, ok := k.(hider)
		return ok && h.Hidden()
	})
}

// errRevealed says why the client does not get a signature.
var errRevealed = errors.New("the login shows that this is not the key that was named: its label or ID is another one")

// stillThere returns an error if the caller does not see the identity after a login.
func (k *Keyring) stillThere(c *request.Caller, id *identity) error {
	if now, unseen := k.find(c, []byte(id.ID)); unseen != nil || now == nil {
		return errRevealed
	}
	return nil
}
