package agent

import (
	"errors"
	"slices"

	"p11-agent/agent/request"
)

// This file has the rules about the keys that a connection sees. A connection neither uses
// nor changes a key that it does not see. Every method of the Keyring that takes a Caller
// applies the rules. For a key that the Caller does not see, the answer is the same as for
// a key that does not exist.

var errSomeKeys = errors.New("the socket it came in at shows some keys only")

// confined tells whether the agent may hide keys from the connection: its socket shows only
// some keys, or the connection belongs to an SSH session.
func confined(c *request.Caller) bool {
	return restricted(c.Socket) || c.Forwarded || c.BindFailed || len(c.Binds) > 0
}

// restricted tells whether the socket shows only some keys. A nil Socket shows all.
func restricted(s *request.Socket) bool { return s != nil && s.Only != nil }

// shows tells whether the socket shows a key of a token.
func shows(s *request.Socket, key request.Key) bool {
	return !restricted(s) || slices.ContainsFunc(s.Only, func(sel request.Selection) bool { return request.Selects(sel, key) })
}

// seenBy returns nil if the connection sees the identity. Otherwise the error says why not.
// The error is for the log. The client only gets a failure, as for an unknown key.
//
// If a key has lost its destinations, they still bind forwarded connections until a person
// agrees to the loss.
func (id *identity) seenBy(c *request.Caller) error {
	if restricted(c.Socket) && !slices.ContainsFunc(id.Homes, func(key request.Key) bool { return shows(c.Socket, key) }) {
		return errUnknownKey
	}
	if err := id.limits.permits(c); err != nil {
		return err
	}
	if id.owed != nil && c.Forwarded {
		return id.owed.permits(c)
	}
	return nil
}

// find returns the identity with this wire form if the connection sees it. Otherwise id is
// nil. If the identity exists, unseen says why the connection does not see it.
func (k *Keyring) find(c *request.Caller, wire []byte) (id *identity, unseen error) {
	if id = k.identity(wire); id == nil {
		return nil, nil
	}
	if err := id.seenBy(c); err != nil {
		return nil, err
	}
	return id, nil
}

// identity returns the identity with this wire form, or nil.
func (k *Keyring) identity(wire []byte) *identity {
	v := k.nowOnTokens()
	if id := v.byKey[string(wire)]; id != nil {
		return id // without the lock, so no signature of a token waits for a change
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.identityLocked(v, string(wire))
}

// reachesLocked tells whether the connection reaches a known key: it would see the key if
// it added the key now. A connection adds and removes by URI only keys that it reaches.
func (k *Keyring) reachesLocked(v *view, c *request.Caller, key known) bool {
	if !shows(c.Socket, key.Key) {
		return false
	}
	in, owed := v.limits[key.wire], k.owed[key.wire]
	return in.permits(c) == nil && (owed == nil || !c.Forwarded || owed.permits(c) == nil)
}

// mayChange returns nil if a connection may change what the agent holds.
func mayChange(c *request.Caller) error {
	if c.Socket != nil && c.Socket.ReadOnly {
		return errReadOnly
	}
	return nil
}

// mayLock returns nil if a connection may lock and unlock the agent, with all of its keys.
func mayLock(c *request.Caller) error {
	if err := mayChange(c); err != nil {
		return err
	}
	if restricted(c.Socket) {
		return errSomeKeys
	}
	if confined(c) {
		return errForwarded
	}
	return nil
}
