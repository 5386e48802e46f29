package request

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/knownhosts"
	"p11-agent/agent/pattern"
	"p11-agent/pinentry/secret"
)

// A Token asks for the keys of a token to be added or removed (RFC 9987
// sections 5.2.6 and 5.4).
type Token struct {
	// Provider is what the client named: a pkcs11: URI or the path of a module.
	// It may hold a PIN, so it is the door's own memory and wiped afterwards.
	Provider []byte
	// PIN is empty when none was given. It belongs to the door, which wipes it
	// when the request is answered.
	PIN         *secret.Secret
	Constraints Constraints
}

// An AddKey asks for a private key to be kept in memory (RFC 9987 section
// 5.2).
type AddKey struct {
	Private crypto.Signer // *rsa.PrivateKey, *ecdsa.PrivateKey or ed25519.PrivateKey
	// Public is its public half, or a certificate of it.
	Public      ssh.PublicKey
	Comment     string
	Constraints Constraints
}

// Constraints limit the use of what is added with them (RFC 9987 section 5.2.7
// and OpenSSH's PROTOCOL.agent).
type Constraints struct {
	Lifetime time.Duration // 0: for as long as the agent runs; NoTime: none
	Confirm  bool
	// Destinations are the hops that are permitted; none: every use is.
	Destinations []Destination
	// Certificates go with the keys of a token that they certify.
	Certificates []*ssh.Certificate
	// CertificatesOnly adds only the Certificates and no key without one.
	CertificatesOnly bool
}

// NoTime is the lifetime of what is added and gone at once. A client asks for it with a
// lifetime of 0 seconds, as ssh-agent has it.
const NoTime = time.Nanosecond

// A Destination is one hop that a key may be used for: to log in at a host, from
// another or, when From has no keys, from where the agent runs (OpenSSH's
// PROTOCOL.agent section 2).
type Destination struct{ From, To Hop }

// A Hop is a host as a Destination has it.
type Hop struct {
	User string // a pattern, only of To; empty: any
	Host string // for people, and the name that a certificate must have
	Keys []HostKey
}

// A HostKey is a key that a host may have.
type HostKey struct {
	Key ssh.PublicKey
	CA  bool // Key certifies the host's key
}

// A TokenLogin asks to log in to one token.
type TokenLogin struct {
	// Provider names the token, as in a Token. It is the door's own memory.
	Provider []byte
	// PIN is nil when it is to come from where a signature would get it, or is typed
	// on the reader. It belongs to the door, which wipes it when the request is
	// answered.
	PIN *secret.Secret
}

// A LoginAnswer tells what there is to say of a login, be it one that failed.
type LoginAnswer struct {
	// Already says that a login is in force or not needed: the agent tried nothing.
	Already bool
	Tries   Tries
}

// Tries tells how many tries for the PIN of a token are left.
type Tries string

// The values of Tries. Clients read them.
const (
	TriesOK     Tries = "ok" // or the token does not tell
	TriesLow    Tries = "low"
	TriesLast   Tries = "last"
	TriesLocked Tries = "locked"
)

// Is tells whether the hop means a host with this key, which may be a certificate.
func (h *Hop) Is(key ssh.PublicKey) bool {
	cert, certified := key.(*ssh.Certificate)
	wire := key.Marshal()
	return slices.ContainsFunc(h.Keys, func(k HostKey) bool {
		if !certified || !k.CA {
			return !certified && !k.CA && bytes.Equal(wire, k.Key.Marshal())
		}
		return bytes.Equal(cert.SignatureKey.Marshal(), k.Key.Marshal()) && certifies(cert, h.Host) == nil
	})
}

// certifies tells why a certificate does not prove that a host has a name
// (sshkey_cert_check_host in OpenSSH 10.5's sshkey.c). Its principals may be patterns,
// and the case of letters matters.
func certifies(cert *ssh.Certificate, host string) error {
	if !slices.ContainsFunc(cert.ValidPrincipals, func(p string) bool { return pattern.Match(p, host) }) {
		return fmt.Errorf("the certificate is not for %q", host)
	}
	return knownhosts.CheckHostCertificate(cert)
}

// Equal tells whether both destinations permit the same hop.
func (d Destination) Equal(o Destination) bool {
	return d.From.equal(o.From) && d.To.equal(o.To)
}

func (h Hop) equal(o Hop) bool {
	return h.User == o.User && h.Host == o.Host && slices.EqualFunc(h.Keys, o.Keys, func(a, b HostKey) bool {
		return a.CA == b.CA && bytes.Equal(a.Key.Marshal(), b.Key.Marshal())
	})
}
