package agent

import (
	"errors"
	"slices"

	"p11-agent/agent/request"
)

// hider is a Key whose token may not have shown its private key yet. Until then the
// agent cannot know whether a name that only the private key can have is the key's.
type hider interface{ Hidden() bool }

// hidden tells whether the names of the private key are not known yet.
func (id *identity) hidden() bool {
	return slices.ContainsFunc(id.Homes, func(k request.Key) bool {
		h, ok := k.(hider)
		return ok && h.Hidden()
	})
}

// errRevealed is why a signature is not handed out.
var errRevealed = errors.New("the login shows that this is not the key that was named: its label or ID is another one")

// stillThere fails when a login has shown that the identity is not one of the caller's.
func (k *Keyring) stillThere(c *request.Caller, id *identity) error {
	if now, unseen := k.find(c, []byte(id.ID)); unseen != nil || now == nil {
		return errRevealed
	}
	return nil
}
