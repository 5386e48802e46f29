package request

import "p11-agent/pinentry/plain"

// A Kind says what the data of a sign request is. The door tells it from the form of the
// data alone. Only the forms of KindLogin, of KindSignature and of KindTLS in TLS 1.3 are
// made to be told apart. The others are so by accident.
type Kind string

// The kinds. Their texts are what the configuration calls them.
const (
	// KindUnknown is data of no known form.
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

// Kinds returns the kinds that a key signs only if the configuration allows it.
func Kinds() []Kind {
	return []Kind{KindHostKey, KindTLS, KindSSHCertificate, KindKRL, KindX509, KindSudo, KindUnknown}
}

// Content describes the data of a sign request.
type Content struct {
	Kind Kind
	// Namespace is that of a KindSignature, as in the data: it may hold anything.
	Namespace string
	// Detail is what else helps a person: the user and service of KindSudo, the key ID
	// of KindSSHCertificate, why data of KindUnknown counts as that. It may hold
	// anything.
	Detail string
}

// A Purpose is what a signature is for. Rules name purposes.
type Purpose string

// The purposes.
const (
	PurposeLogin Purpose = "login"
	PurposeGit   Purpose = "git"
	PurposeFile  Purpose = "file"
	PurposeOther Purpose = "other"
)

// Purposes returns all purposes.
func Purposes() []Purpose { return []Purpose{PurposeLogin, PurposeGit, PurposeFile, PurposeOther} }

// Purpose returns the purpose of the content.
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
		return "SSH signature, namespace " + plain.Quoted(c.Namespace, maxDetail)
	case KindHostKey:
		return "host key of an SSH server"
	case KindTLS:
		return "TLS handshake"
	case KindSSHCertificate:
		return "OpenSSH certificate to be issued, key ID " + plain.Quoted(c.Detail, maxDetail)
	case KindKRL:
		return "list of revoked SSH keys"
	case KindX509:
		return "X.509 certificate or request"
	case KindSudo:
		return "sudo or the like by pam_ssh_agent_auth, " + plain.Quoted(c.Detail, maxDetail)
	case KindTest:
		return "test of the key with random data (ssh-add -T)"
	}
	return "UNKNOWN DATA"
}

// maxDetail is the most bytes of a detail that are shown.
const maxDetail = 64
