package agent

import (
	"bytes"
	"errors"
	"slices"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/pattern"
	"p11-agent/agent/request"
)

var (
	errBindFailed  = errors.New("its connection could not be bound to its session, and the key is limited to destinations")
	errUnbound     = errors.New("the key is limited to destinations, and its connection is bound to no session (OpenSSH older than 8.9?)")
	errNoLogin     = errors.New("the key is limited to destinations, and this is no request to log in with it")
	errElsewhere   = errors.New("the key may not be used there")
	errOtherHost   = errors.New("the request is for another session or host than its connection is bound to")
	errForwardUse  = errors.New("the last session that its connection is bound to is for forwarding, not for logging in")
	errUnnamedHost = errors.New("the request does not name the host, which has to be known behind a forwarded connection (OpenSSH older than 8.9?)")
)

// A route is a list of destinations. For each hop, one of them has to permit it. An empty
// route permits everything.
type route []request.Destination

// permits tells whether the route lets a connection see and change the key
// (identity_permitted in OpenSSH's ssh-agent.c, without a user).
func (c route) permits(who *request.Caller) error {
	if len(c) == 0 {
		return nil
	}
	if err := c.walk(who, nil); err != nil {
		return err
	}
	// If a route leads to a host and not further, the host does not see the key.
	if n := len(who.Binds); n > 0 && who.Binds[n-1].Forwarding && !c.leads(who.Binds[n-1].HostKey, nil, nil) {
		return errElsewhere
	}
	return nil
}

// permitsLogin tells whether the route lets a connection sign (process_sign_request2 in
// OpenSSH's ssh-agent.c). login is nil if the data is not a login with this key.
func (c route) permitsLogin(who *request.Caller, login *request.Login) error {
	n := len(who.Binds)
	switch {
	case len(c) == 0:
		return nil
	case n == 0 && !who.BindFailed:
		return errUnbound
	case login == nil:
		return errNoLogin
	}
	if err := c.walk(who, &login.User); err != nil {
		return err
	}
	last := who.Binds[n-1]
	switch {
	case !bytes.Equal(login.SessionID, last.SessionID):
		return errOtherHost
	case login.HostKey == nil && n > 1:
		return errUnnamedHost
	case login.HostKey != nil && !bytes.Equal(login.HostKey, last.HostKey.Marshal()):
		return errOtherHost
	}
	return nil
}

// walk checks the sessions from hop to hop. user is the user of the last session. If user
// is nil, the request is not a login.
func (c route) walk(who *request.Caller, user *string) error {
	if len(who.Binds) == 0 {
		if who.BindFailed {
			return errBindFailed
		}
		return nil // the client runs on the agent's machine
	}
	var from ssh.PublicKey
	for i, b := range who.Binds {
		var test *string
		if i == len(who.Binds)-1 {
			if b.Forwarding && user != nil {
				return errForwardUse
			}
			test = user
		}
		if !c.leads(from, b.HostKey, test) {
			return errElsewhere
		}
		from = b.HostKey
	}
	return nil
}

// leads tells whether a destination permits the hop between two hosts. If from is nil, the
// hop starts at the agent's machine. If to is nil, any host will do; if user is nil, any
// user.
func (c route) leads(from, to ssh.PublicKey, user *string) bool {
	return slices.ContainsFunc(c, func(d request.Destination) bool {
		switch {
		case from == nil && (d.From.Host != "" || len(d.From.Keys) > 0):
		case from != nil && !d.From.Is(from):
		case to != nil && !d.To.Is(to):
		case user != nil && d.To.User != "" && !pattern.Match(d.To.User, *user):
		default:
			return true
		}
		return false
	})
}

func (c route) equal(o route) bool { return slices.EqualFunc(c, o, request.Destination.Equal) }
