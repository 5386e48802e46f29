package agent

import (
	"fmt"
	"slices"
	"strconv"
)

// A Kind is what the data of a sign request says of itself. The door tells it
// from the data's form alone, which is domain separation by accident for some
// kinds: only KindLogin, KindSignature and the TLS 1.3 form of KindTLS can be nothing else.
type Kind string

// The kinds. Their texts are what the configuration calls them.
const (
	// KindUnknown is data that says nothing of itself.
	KindUnknown Kind = "unknown"
	// KindLogin is a request to be let in at a server with this key (see Login).
	KindLogin Kind = "login"
	// KindSignature is an SSH signature of a file, a commit and the like
	// (OpenSSH's PROTOCOL.sshsig section 3).
	KindSignature Kind = "signature"
	// KindHostKey is what a server signs with its host key: an exchange hash (RFC
	// 4253 section 8), which is the digest of a hash function and nothing more, or
	// hostkeys-prove-00@openssh.com (OpenSSH's PROTOCOL section 2.5).
	KindHostKey Kind = "host-key"
	// KindTLS is a TLS handshake (RFC 8446 section 4.4.3, RFC 5246 sections 7.4.3
	// and 7.4.8).
	KindTLS Kind = "tls"
	// KindSSHCertificate is an OpenSSH certificate to be issued (OpenSSH's
	// PROTOCOL.certkeys).
	KindSSHCertificate Kind = "ssh-certificate"
	// KindKRL is a list of revoked keys (OpenSSH's PROTOCOL.krl).
	KindKRL Kind = "krl"
	// KindX509 is ASN.1 as X.509 certificates, requests and revocation lists are
	// (RFC 5280 section 4.1.2, RFC 2986).
	KindX509 Kind = "x509"
	// KindSudo is a question of pam_ssh_agent_auth, which stands in for a password.
	KindSudo Kind = "sudo"
	// KindTest is 1,024 bytes of no other kind, which is what ssh-add -T has signed to
	// see whether a key works. They can be anything: see Caller.judged.
	KindTest Kind = "test"
)

// Kinds returns those that are signed only with keys that allow it.
func Kinds() []Kind {
	return []Kind{KindHostKey, KindTLS, KindSSHCertificate, KindKRL, KindX509, KindSudo, KindUnknown}
}

// Content is what is known of the data of a sign request.
type Content struct {
	Kind Kind
	// Namespace is that of a KindSignature, as in the data: it may hold anything.
	Namespace string
	// Detail is what else helps a person: the user and service of KindSudo, the key ID
	// of KindSSHCertificate, why data of KindUnknown counts as that. It may hold
	// anything.
	Detail string
}

// A Purpose is what a signature is for, as far as rules tell purposes apart.
type Purpose string

// The purposes.
const (
	PurposeLogin Purpose = "login"
	PurposeGit   Purpose = "git"
	PurposeFile  Purpose = "file"
	PurposeOther Purpose = "other"
)

// Purposes returns them all.
func Purposes() []Purpose { return []Purpose{PurposeLogin, PurposeGit, PurposeFile, PurposeOther} }

// Purpose returns what the content is for.
func (c Content) Purpose() Purpose {
	switch {
	case c.Kind == KindLogin:
		return PurposeLogin
	case c.Kind == KindSignature && c.Namespace == "git":
		return PurposeGit
	case c.Kind == KindSignature && c.Namespace == "file":
		return PurposeFile
	}
	return PurposeOther
}

// String names the content to a person, within some 200 bytes and in printable
// characters.
func (c Content) String() string {
	switch c.Kind {
	case KindLogin:
		return "SSH login"
	case KindSignature:
		switch c.Namespace {
		case "git":
			return "git signature (a commit, a tag or a push)"
		case "file":
			return "signature of a file"
		}
		return "SSH signature, namespace " + shortQuote(c.Namespace)
	case KindHostKey:
		return "host key of an SSH server"
	case KindTLS:
		return "TLS handshake"
	case KindSSHCertificate:
		return "OpenSSH certificate to be issued, key ID " + shortQuote(c.Detail)
	case KindKRL:
		return "list of revoked SSH keys"
	case KindX509:
		return "X.509 certificate or request"
	case KindSudo:
		return "sudo or the like by pam_ssh_agent_auth, " + shortQuote(c.Detail)
	case KindTest:
		return "test of the key with random data (ssh-add -T)"
	}
	return "UNKNOWN DATA"
}

// shortQuote makes a text of others fit to be shown.
func shortQuote(s string) string {
	const limit = 64
	if len(s) > limit {
		return strconv.QuoteToGraphic(s[:limit]) + "..."
	}
	return strconv.QuoteToGraphic(s)
}

// A KindError says that a key is not for this kind of data.
type KindError struct {
	Content Content
	Key     string // the comment
}

func (e *KindError) Error() string {
	what := e.Content.String()
	if e.Content.Kind == KindUnknown && e.Content.Detail != "" {
		what += " (" + e.Content.Detail + ")"
	}
	return fmt.Sprintf("%s is not signed with this key: if it is meant for that, its [[key]] table has to say allow = [%q]", what, e.Content.Kind)
}

// testProgram is the program that data of KindTest is signed for.
const testProgram = "ssh-add"

// mayTest tells whether a connection may have data of KindTest signed: it comes from
// the ssh-add of this machine, and belongs to no SSH session.
func (c *Caller) mayTest() error {
	if c.Forwarded || c.BindFailed || len(c.Binds) > 0 {
		return errBound
	}
	return c.Who().RunsSystemProgram(testProgram)
}

// judged returns what the content counts for when this connection has it signed. The
// data of KindTest says nothing of itself: it may be the attributes of a CMS signature,
// filled up to that length. So it is unknown unless ssh-add sends it.
func (c *Caller) judged(content Content) Content {
	if content.Kind != KindTest {
		return content
	}
	if err := c.mayTest(); err != nil {
		return Content{Kind: KindUnknown, Detail: "1,024 bytes, which are signed for ssh-add -T of this machine, but " + err.Error()}
	}
	return content
}

// allowed tells whether data of this kind may be signed with an identity. Logins, SSH
// signatures and the tests of ssh-add -T always may be. Keys in memory sign what they
// are given, as those of ssh-agent do.
func (k *Keyring) allowed(id *identity, content Content) error {
	switch content.Kind {
	case KindLogin, KindSignature, KindTest:
		return nil
	}
	if len(id.homes) == 0 {
		return nil
	}
	k.mu.Lock()
	allow := k.opts.Allow
	k.mu.Unlock()
	if allow != nil && slices.ContainsFunc(id.homes, func(key Key) bool {
		kinds := allow(key)
		return slices.Contains(kinds, content.Kind) || slices.Contains(kinds, KindUnknown)
	}) {
		return nil
	}
	return &KindError{Content: content, Key: id.comment}
}
