package agent

import (
	"errors"
	"slices"

	"p11-agent/agent/request"
)

// What a connection may see decides what it may use and change: nothing that it does
// not see. The rules are here, and every method of the Keyring that takes a Caller
// asks them. A key that a Caller does not see is answered for as one that is not there.

var errSomeKeys = errors.New("the socket it came in at shows some keys only")

// confined tells whether there may be keys that the connection does not see: it came in
// at a socket for some keys, or it belongs to an SSH session.
func confined(c *request.Caller) bool {
	return restricted(c.Socket) || c.Forwarded || c.BindFailed || len(c.Binds) > 0
}

// some tells whether the socket shows some keys only. A nil Socket shows all.
func restricted(s *request.Socket) bool { return s != nil && s.Only != nil }

// shows tells whether the socket shows a key of a token.
func shows(s *request.Socket, key request.Key) bool {
	return !restricted(s) || slices.ContainsFunc(s.Only, func(sel request.Selection) bool { return request.Selects(sel, key) })
}

// seenBy returns nil if the connection sees the identity, and otherwise why not. The
// reason is for the log: the client is told that there is no such key.
//
// A key that has lost its destinations has them for forwarded connections until a
// person has agreed to the loss.
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

// find returns the identity with a wire form if the connection sees it. Otherwise it
// returns none, and unseen says why where there is one.
func (k *Keyring) find(c *request.Caller, wire []byte) (id *identity, unseen error) {
	if id = k.identity(wire); id == nil {
		return nil, nil
	}
	if err := id.seenBy(c); err != nil {
		return nil, err
	}
	return id, nil
}

// identity returns the identity with a wire form, or nil.
func (k *Keyring) identity(wire []byte) *identity {
	v := k.nowOnTokens()
	if id := v.byKey[string(wire)]; id != nil {
		return id // no signature of a token waits for what changes
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.identityLocked(v, string(wire))
}

// reachesLocked tells whether the connection would see a known key if the key were
// added now: what it may add and remove by a URI.
func (k *Keyring) reachesLocked(v *view, c *request.Caller, key known) bool {
	if !shows(c.Socket, key.Key) {
		return false
	}
	in, owed := v.limits[key.wire], k.owed[key.wire]
	return in.permits(c) == nil && (owed == nil || !c.Forwarded || owed.permits(c) == nil)
}

// mayChange tells whether a connection may change what the agent holds.
func mayChange(c *request.Caller) error {
	if c.Socket != nil && c.Socket.ReadOnly {
		return errReadOnly
	}
	return nil
}

// mayLock tells whether a connection may lock and unlock the agent, which concerns
// all of its keys.
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
