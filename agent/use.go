package agent

import (
	"bytes"
	"context"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
)

// A Use is what a key is about to be used for. It goes along in the context of
// what is done for a request, for whoever tells a person about it. It shares no
// memory with the request, and is not changed.
type Use struct {
	Comment string        // of the identity
	Key     ssh.PublicKey // of the identity, or what its certificate certifies
	Caller  *Caller
	Content Content
	Login   *Login // nil: it is no request to log in

	// Hosts gives names to host keys; nil: they have none.
	Hosts HostNamer
	// Fingerprint is how keys are named; nil: ssh.FingerprintSHA256.
	Fingerprint func(ssh.PublicKey) string
}

// A HostNamer knows hosts by their keys.
type HostNamer interface {
	// HostName returns what is known of a host key, which may be a certificate.
	// p, who asks, may help to guess names, which count only when they are proved.
	HostName(key ssh.PublicKey, p peer.Peer) HostName
}

// A HostName is what a host key is known as.
type HostName struct {
	Names   []string // the most fitting first
	Hashed  bool     // there is a name, which cannot be told from its hash
	Revoked bool     // the key is not to be trusted any more
}

// Host returns the key of the host that the login is at, or nil when that is
// not known. What a request names itself is what its signature is good for;
// otherwise it is the host that the connection has proved to be bound to.
func (u *Use) Host() ssh.PublicKey {
	switch {
	case u.Login == nil:
		return nil
	case u.Login.HostKey != nil:
		key, err := ssh.ParsePublicKey(u.Login.HostKey)
		if err != nil {
			return nil
		}
		return key
	}
	for _, b := range u.Caller.Binds {
		if !b.Forwarding && bytes.Equal(b.SessionID, u.Login.SessionID) {
			return b.HostKey
		}
	}
	return nil
}

type useKey struct{}

// UseFromContext returns the Use that ctx carries, or nil.
func UseFromContext(ctx context.Context) *Use {
	u, _ := ctx.Value(useKey{}).(*Use)
	return u
}
