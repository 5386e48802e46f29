// Package requesttest makes callers, hosts and uses for tests of rules and questions.
package requesttest

import (
	"strings"
	"testing"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"

	"golang.org/x/crypto/ssh"
)

// Hosts names host keys by their wire form.
type Hosts map[string]request.HostName

// HostName returns the entry of the key.
func (h Hosts) HostName(key ssh.PublicKey, _ peer.Peer) request.HostName {
	return h[string(key.Marshal())]
}

// A World has a few hosts, and makes requests that come from them.
type World struct {
	Keys  map[string]ssh.PublicKey
	Hosts Hosts
}

// New returns a World with a new key for each host.
func New(t testing.TB) *World {
	w := &World{Keys: make(map[string]ssh.PublicKey), Hosts: make(Hosts)}
	for name, known := range map[string]request.HostName{
		"good":    {Names: []string{"good.example.org", "192.0.2.1"}},
		"other":   {Names: []string{"Other.Example.org"}},
		"evil":    {Names: []string{"evil.example.net"}},
		"test":    {Names: []string{"test.example.org"}},
		"hashed":  {Hashed: true},
		"shared":  {Names: []string{"*.example.org"}},
		"any":     {Names: []string{"*"}},
		"revoked": {Names: []string{"gone.example.org"}, Revoked: true},
		"new":     {},
	} {
		pub := keytest.New(t).Public
		w.Keys[name] = pub
		w.Hosts[string(pub.Marshal())] = known
	}
	return w
}

// Caller returns a client whose connection came over these hosts; the last one is
// logged in to unless it is "-".
func (w *World) Caller(chain string, hosts ...string) *request.Caller {
	c := &request.Caller{Number: 7, Peer: peer.Peer{Known: true, PID: 10, UID: 1000}}
	for name := range strings.SplitSeq(chain, " ") {
		c.Peer.Chain = append(c.Peer.Chain, peer.Process{PID: 10 + len(c.Peer.Chain), Name: name})
	}
	for i, name := range hosts {
		last := i == len(hosts)-1
		if last && name == "-" {
			continue
		}
		c.Binds = append(c.Binds, request.Bind{HostKey: w.Keys[name], SessionID: []byte("session " + name), Forwarding: !last})
	}
	c.Forwarded = len(hosts) > 1
	return c
}

// Login returns a request to log in at a host. named says that the data names the host.
func (w *World) Login(host string, named bool) request.Sign {
	l := &request.Login{User: "me", SessionID: []byte("session " + host)}
	if named {
		l.HostKey = w.Keys[host].Marshal()
	}
	return request.Sign{Data: []byte("data"), Content: request.Content{Kind: request.KindLogin}, Login: l}
}

// Signature returns a request for an SSH signature in a namespace.
func Signature(namespace string) request.Sign {
	return request.Sign{Data: []byte("data"), Content: request.Content{Kind: request.KindSignature, Namespace: namespace}}
}

// Use returns the use that a request is for.
func (w *World) Use(c *request.Caller, r request.Sign) *request.Use {
	return &request.Use{Caller: c, Content: r.Content, Login: r.Login, Hosts: w.Hosts}
}
