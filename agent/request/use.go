package request

import (
	"bytes"
	"crypto"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/knownhosts"
	"p11-agent/agent/peer"
	"p11-agent/pinentry/plain"
)

// A Use is what a request uses a key for. The context of the request carries it, for
// prompts. It shares no memory with the request. It does not change once a person is
// asked.
type Use struct {
	Comment string           // of the key
	Key     crypto.PublicKey // nil: the agent does not have it
	Caller  *Caller
	Content Content
	Login   *Login // nil: it is no request to log in
	// Unlimited says that the key was limited before it was removed, is not so any more,
	// and is used for the first time since.
	Unlimited bool
	PINPays   bool // for that: a person is about to be asked for a PIN

	// Hosts gives names to host keys; nil: they have none.
	Hosts HostNamer
	// Fingerprint is how keys are named; nil: ssh.FingerprintSHA256.
	Fingerprint func(ssh.PublicKey) string
}

// A HostNamer knows hosts by their keys.
type HostNamer interface {
	// HostName returns what is known of a host key, which may be a certificate.
	// p, the client, may help to guess names, which count only if they are proved.
	HostName(key ssh.PublicKey, p peer.Peer) HostName
}

// A HostName is what a host key is known as.
type HostName = knownhosts.Known

// A Host is a host that a request is for, or came through.
type Host struct {
	Key ssh.PublicKey // nil: not known. May be a certificate
	// Verified says that the host with this key has signed the session that the
	// request is for. Without it the key is what the request says: the signature is
	// good at no other host, but the person may mean another host.
	Verified bool
	// Conflict says that the request names another host than its connection is
	// bound to.
	Conflict bool
	HostName
}

// Where returns the host that the login is at; the zero value when it is no login,
// or when that is not known.
func (u *Use) Where() Host {
	h := u.where()
	if h.Key == nil {
		return h
	}
	named := u.host(h.Key, h.Verified)
	named.Conflict = h.Conflict
	return named
}

// where is Where without the names.
func (u *Use) where() (h Host) {
	if u.Login == nil {
		return h
	}
	if u.Login.HostKey != nil {
		var err error
		if h.Key, err = ssh.ParsePublicKey(u.Login.HostKey); err != nil {
			return Host{}
		}
	}
	for _, b := range u.Caller.Binds {
		switch {
		case b.Forwarding || !bytes.Equal(b.SessionID, u.Login.SessionID):
		case h.Key == nil:
			// The bind alone tells which session it is. A host that the agent is forwarded
			// to can sign the identifier of a session that it has with another host, and bind
			// it as its own.
			h.Key, h.Verified = b.HostKey, len(u.Caller.Binds) == 1 && !u.Caller.Forwarded
			return h
		default:
			h.Verified = bytes.Equal(u.Login.HostKey, b.HostKey.Marshal())
			h.Conflict = !h.Verified
			return h
		}
	}
	return h
}

// Via returns the hosts that the request was forwarded through, from here on, as
// far as they have proved who they are.
func (u *Use) Via() (hosts []Host) {
	for _, b := range u.Caller.Binds {
		if b.Forwarding {
			hosts = append(hosts, u.host(b.HostKey, true))
		}
	}
	return hosts
}

func (u *Use) host(key ssh.PublicKey, verified bool) Host {
	h := Host{Key: key, Verified: verified}
	if u.Hosts != nil {
		h.HostName = u.Hosts.HostName(key, u.Caller.Client())
	}
	return h
}

// Lines tell a person what the key is used for: what is signed, for whom and
// where, and the way it came when it was forwarded. What matters most comes
// first. Texts from outside are quoted where they could pass for something else.
func (u *Use) Lines() []string {
	what := u.What()
	lines := []string{"For: " + what}
	switch u.Content.Kind {
	case KindUnknown, "":
		lines = []string{"WARNING: this is UNKNOWN DATA: no SSH login, and no signature of a file or commit."}
	case KindLogin, KindSignature, KindTest:
	default:
		lines = []string{"WARNING: this is no SSH login, but: " + what}
	}
	if via := u.Forwarding(); via != "" {
		lines = append(lines, "FORWARDED "+via)
	}
	if u.Unlimited {
		lines = append(lines, "NOTE: the key had limits (ssh-add -c, -t or -h) until it was removed. A yes or a PIN lifts them.")
	}
	return lines
}

// What names what the key is used for in one line, such as "SSH login as root at
// github.com (host verified)".
func (u *Use) What() string {
	if u.Login == nil {
		return u.Content.String()
	}
	return fmt.Sprintf("SSH login as %s at %s", plain.HostName(u.Login.User, maxHostName), u.describe(u.Where()))
}

// Forwarding tells the way that a forwarded request came; empty: it was not.
func (u *Use) Forwarding() string {
	if u.Caller == nil || !u.Caller.Forwarded {
		return ""
	}
	var names []string
	for _, h := range u.Via() {
		names = append(names, u.Name(h))
	}
	switch {
	case u.Caller.BindFailed:
		return "by a host whose proof of itself is wrong"
	case len(names) == 0:
		return "by an unknown host"
	}
	return "through " + strings.Join(names, ", ")
}

// Name is the name of a host, or the fingerprint of its key.
func (u *Use) Name(h Host) string {
	switch {
	case h.Key == nil:
		return "an unknown host"
	case h.Revoked:
		return "a host with a REVOKED key, " + u.fingerprint(h.Key)
	case hostText(h.HostName) != "":
		return hostText(h.HostName)
	}
	return u.fingerprint(h.Key)
}

// hostText shows the name of a host; empty: it has none. Where hosts share the key, it
// shows all that the key may mean: which of them it is, nothing proves.
func hostText(h HostName) string {
	switch {
	case len(h.Names) == 0:
		return ""
	case !h.Shared():
		return plain.HostName(h.Names[0], maxHostName)
	}
	const shown = 3
	var all []string
	for _, n := range h.Names {
		all = append(all, plain.HostName(n, maxHostName))
	}
	text := "a host of " + strings.Join(all[:min(len(all), shown)], ", ")
	if more := len(all) - shown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// describe tells of a host all that a person needs to judge it.
func (u *Use) describe(h Host) string {
	switch {
	case h.Key == nil:
		return "an unknown host"
	case h.Conflict:
		return "ANOTHER HOST than the one connected to, with the key " + u.fingerprint(h.Key)
	case h.Revoked:
		return "a host with a REVOKED key, " + u.fingerprint(h.Key)
	case !h.Verified && hostText(h.HostName) != "":
		return hostText(h.HostName) + " (NOT VERIFIED: only the request says so)"
	case !h.Verified:
		return "a host NOT VERIFIED, key " + u.fingerprint(h.Key)
	case hostText(h.HostName) != "":
		return hostText(h.HostName) + " (host verified)"
	case h.Hashed:
		return "a host whose name is hashed in known_hosts, key " + u.fingerprint(h.Key)
	}
	return "a host that is not in known_hosts, key " + u.fingerprint(h.Key)
}

func (u *Use) fingerprint(key ssh.PublicKey) string {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	if u.Fingerprint != nil {
		return u.Fingerprint(key)
	}
	return ssh.FingerprintSHA256(key)
}

// maxHostName is the most bytes of the name of a host or a user that are shown.
const maxHostName = 128

// ProvenHost returns the key of the host that the login's signature is good for,
// or nil when that is not proved. consistent is false when the connection says
// something else than the data.
//
// A host that the data names is proved by the very signature: no other server
// takes it (publickey-hostbound-v00, OpenSSH's PROTOCOL section 3.1). Whether the
// client has a connection to it is not proved, and does not matter. If the data names no
// host, it is the host that signed the session's identifier when the connection was bound.
// ProvenHost believes that, as ssh-agent does, on a connection with no other bind. Behind a
// forwarded connection, a host on the way could sign the identifier of a session that it
// has with another host.
func (u *Use) ProvenHost() (key ssh.PublicKey, consistent bool) {
	c, h := u.Caller, u.where()
	if u.Login == nil {
		return nil, true
	}
	elsewhere := false // the connection is bound, and to no session that this is for
	if n := len(c.Binds); n > 0 {
		last := c.Binds[n-1]
		elsewhere = last.Forwarding || !bytes.Equal(last.SessionID, u.Login.SessionID)
	}
	switch said := u.Login.HostKey != nil; {
	case c.BindFailed, elsewhere, h.Conflict, said && h.Key == nil:
		return nil, false
	case said, h.Verified:
		return h.Key, true
	}
	return nil, true
}
