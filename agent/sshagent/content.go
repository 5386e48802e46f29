package sshagent

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"strings"

	"p11-agent/agent/request"
)

const (
	magicSignature = "SSHSIG"       // OpenSSH's PROTOCOL.sshsig section 3
	magicKRL       = "SSHKRL\n\x00" // OpenSSH's PROTOCOL.krl section 1

	hostKeysProve = "hostkeys-prove-00@openssh.com" // OpenSSH's PROTOCOL section 2.5

	msgTrustRequest = 54 // of pam_ssh_agent_auth
	serviceSudo     = "pam_ssh_agent_auth"

	// testSize is how many random bytes ssh-add -T has signed (ssh-add.c, test_key).
	testSize = 1024

	// maxNamespace bounds the bytes of the namespace of an SSH signature. Namespaces in
	// use are words and names with a domain.
	maxNamespace = 256
)

// parseContent tells from the form of data what kind of data it is. Data of a known kind is whole
// and has nothing after it. All other data is unknown. key is the wire form of the key that is to
// sign.
func parseContent(data, key []byte) (request.Content, *request.Login) {
	if login := parseLogin(data, key); login != nil {
		return request.Content{Kind: request.KindLogin}, login
	}
	content := request.Content{Kind: request.KindUnknown}
	if namespace, ok := parseSSHSIG(data); ok {
		content.Kind, content.Namespace = request.KindSignature, namespace
		return content, nil
	}
	id, certificate := parseCertificate(data)
	sudo, isSudo := parseSudo(data, key)
	switch {
	case isHostKeyProof(data, key), isDigest(data):
		content.Kind = request.KindHostKey
	case certificate:
		content.Kind, content.Detail = request.KindSSHCertificate, id
	case isSudo:
		content.Kind, content.Detail = request.KindSudo, sudo
	case bytes.HasPrefix(data, []byte(magicKRL)):
		content.Kind = request.KindKRL
	case isTLS(data):
		content.Kind = request.KindTLS
	case isX509(data):
		content.Kind = request.KindX509
	case len(data) == testSize:
		content.Kind = request.KindTest
	}
	return content, nil
}

// parseSSHSIG reads the data of an SSH signature, and returns its namespace.
func parseSSHSIG(data []byte) (namespace string, ok bool) {
	rest, ok := bytes.CutPrefix(data, []byte(magicSignature))
	if !ok {
		return "", false
	}
	in := reader{rest: rest}
	name, reserved, algorithm, digest := in.bytes(), in.bytes(), in.bytes(), in.bytes()
	size := -1
	switch string(algorithm) {
	case "sha256":
		size = sha256.Size
	case "sha512":
		size = sha512.Size
	}
	if in.end() != nil || len(name) == 0 || !isText(name, maxNamespace) || len(reserved) > 0 || len(digest) != size {
		return "", false
	}
	return string(name), true
}

// isText tells whether a field can be a text: at most limit bytes without a NUL. Archives and
// documents, which could hide in a field, need a NUL.
func isText(field []byte, limit int) bool {
	return len(field) <= limit && bytes.IndexByte(field, 0) < 0
}

// isHostKeyProof recognises the data that a server signs to prove that it owns a further host key.
func isHostKeyProof(data, key []byte) bool {
	in := reader{rest: data}
	name, session, own := in.bytes(), in.bytes(), in.bytes()
	return in.end() == nil && string(name) == hostKeysProve && isDigest(session) && bytes.Equal(own, key)
}

// isDigest tells whether data has the length of an exchange hash of SHA-1, SHA-256, SHA-384 or
// SHA-512. Nothing else shows that data is an exchange hash. The first exchange hash is the session
// identifier (RFC 4253 section 7.2).
func isDigest(data []byte) bool {
	switch len(data) {
	case 20, 32, 48, 64:
		return true
	}
	return false
}

// parseCertificate recognises an OpenSSH certificate without its signature, and
// returns its key ID.
func parseCertificate(data []byte) (id string, ok bool) {
	in := reader{rest: data}
	kind, isCert := bytes.CutSuffix(in.bytes(), certSuffix)
	if !isCert {
		return "", false
	}
	plain := string(kind)
	in.bytes() // nonce
	fields := map[string]int{"ssh-rsa": 2, "ssh-dss": 4, "ssh-ed25519": 1, "sk-ssh-ed25519": 2, "sk-ecdsa-sha2-nistp256": 3}[plain]
	if strings.HasPrefix(plain, "ecdsa-sha2-") {
		fields = 2
	}
	if fields == 0 {
		return "", false
	}
	for range fields {
		in.bytes() // of the public key
	}
	in.take(8) // serial
	in.uint32()
	keyID := in.bytes()
	in.bytes() // principals
	in.take(16)
	in.bytes() // critical options
	in.bytes() // extensions
	in.bytes() // reserved
	in.bytes() // the key that signs
	return string(keyID), in.end() == nil
}

// parseSudo recognises a question of pam_ssh_agent_auth (its userauth_pubkey_from_id.c) and returns
// which user wants to run what.
func parseSudo(data, key []byte) (detail string, ok bool) {
	in := reader{rest: data}
	in.bytes() // session
	if in.byte() != msgTrustRequest {
		return "", false
	}
	user, service, method := in.bytes(), in.bytes(), in.bytes()
	signed, _, blob := in.byte(), in.bytes(), in.bytes()
	if in.end() != nil || string(service) != serviceSudo || string(method) != methodPublicKey || signed != 1 || !bytes.Equal(blob, key) {
		return "", false
	}
	return "user " + string(user), true
}

// The variables save work for each request: most requests are of another kind.
var (
	certSuffix = []byte("-cert-v01@openssh.com")
	tlsBlanks  = bytes.Repeat([]byte{' '}, 64)
)

const (
	tlsHello      = 1
	tlsNamedCurve = 3
)

// isTLS recognises data of TLS. TLS 1.3 puts a text in front of it. TLS 1.2 has two forms, which
// are recognised by their structure: the parameters of a server's key exchange, and the messages of
// a handshake.
func isTLS(data []byte) bool {
	if rest, ok := bytes.CutPrefix(data, tlsBlanks); ok {
		for _, side := range []string{"server", "client"} {
			if hash, ok := bytes.CutPrefix(rest, []byte("TLS 1.3, "+side+" CertificateVerify\x00")); ok {
				return isDigest(hash)
			}
		}
		return false
	}
	const randoms = 64
	if len(data) > randoms+4 && data[randoms] == tlsNamedCurve && len(data) == randoms+4+int(data[randoms+3]) {
		return true
	}
	messages := 0
	for rest := data; len(rest) > 0; messages++ {
		if len(rest) < 4 || messages == 0 && (rest[0] != tlsHello || len(rest) < 6 || rest[4] != 3) {
			return false
		}
		size := 4 + int(rest[1])<<16 + int(rest[2])<<8 + int(rest[3])
		if size > len(rest) {
			return false
		}
		rest = rest[size:]
	}
	return messages > 1
}

// isX509 recognises data that X.509 signs: one ASN.1 sequence that begins with a version or a
// number, and nothing after it.
func isX509(data []byte) bool {
	const sequence = 0x30
	if len(data) == 0 || data[0] != sequence {
		return false
	}
	var outer asn1.RawValue
	rest, err := asn1.Unmarshal(data, &outer)
	if err != nil || len(rest) > 0 || outer.Class != asn1.ClassUniversal || outer.Tag != asn1.TagSequence || !outer.IsCompound {
		return false
	}
	fields := 0
	for inner := outer.Bytes; len(inner) > 0; fields++ {
		var v asn1.RawValue
		if inner, err = asn1.Unmarshal(inner, &v); err != nil {
			return false
		}
	}
	return fields >= 3
}
