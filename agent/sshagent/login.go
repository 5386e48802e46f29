package sshagent

import (
	"bytes"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

const (
	msgUserauthRequest = 50 // SSH_MSG_USERAUTH_REQUEST (RFC 4252 section 6)
	serviceConnection  = "ssh-connection"
	methodPublicKey    = "publickey"
	// methodHostbound names the server's key as well (OpenSSH's PROTOCOL section
	// 3.1).
	methodHostbound = "publickey-hostbound-v00@openssh.com"
)

// maxPeerKey bounds the bytes of a key or certificate in a request to log in. The largest RSA keys,
// and certificates with long lists of principals, are smaller.
const maxPeerKey = 8 << 10

// parseLogin returns the login that data asks for. It returns nil unless data is a whole request to
// log in with this very key or a certificate of it, with nothing after it. It copies nothing of
// data but the user's name.
//
// A token signs data without seeing it. So data must not be something else as well, such as an
// archive that hides in a field. parseLogin holds each field to the bounds of protocol and
// practice: the session identifier is a digest, the user is a short text. Keys and certificates are
// whole, bounded, and signed by their authorities.
func parseLogin(data, key []byte) *request.Login {
	in := reader{rest: data}
	session := in.bytes()
	if in.byte() != msgUserauthRequest {
		return nil
	}
	user, service, method := in.bytes(), in.bytes(), in.bytes()
	signed, algorithm, blob := in.byte(), in.bytes(), in.bytes()
	var host []byte
	switch string(method) {
	case methodPublicKey:
	case methodHostbound:
		if host = in.bytes(); !isPeerKey(host) {
			return nil
		}
	default:
		return nil
	}
	kind := reader{rest: blob}
	switch {
	case in.end() != nil, signed != 1, string(service) != serviceConnection, !isDigest(session), !isText(user, maxUser),
		!isOwnKey(blob, key), !algorithmFits(string(algorithm), string(kind.bytes())):
		return nil
	}
	return &request.Login{User: string(user), SessionID: session, HostKey: host}
}

// isOwnKey tells whether blob is the key or a certificate of it. With a certificate from a file
// (CertificateFile), ssh has the plain key sign.
func isOwnKey(blob, key []byte) bool {
	if kind := (&reader{rest: blob}).bytes(); !bytes.HasSuffix(kind, certSuffix) {
		return bytes.Equal(blob, key)
	}
	cert, ok := parsePeerKey(blob).(*ssh.Certificate)
	return ok && (bytes.Equal(blob, key) || bytes.Equal(cert.Key.Marshal(), key))
}

// isPeerKey tells whether parsePeerKey reads blob.
func isPeerKey(blob []byte) bool { return parsePeerKey(blob) != nil }

// parsePeerKey reads a public key or a certificate. It returns nil unless blob is bounded and the
// only form of the key, and unless the authority that a certificate names has signed it.
func parsePeerKey(blob []byte) ssh.PublicKey {
	if len(blob) > maxPeerKey {
		return nil
	}
	key, err := ssh.ParsePublicKey(blob)
	if err != nil || !bytes.Equal(key.Marshal(), blob) {
		return nil
	}
	if cert, ok := key.(*ssh.Certificate); ok && !isSigned(cert) {
		return nil
	}
	return key
}

// isSigned tells whether the authority that a certificate names has signed it, and whether its
// texts are texts. The server judges the authority, and whether the certificate is valid.
func isSigned(cert *ssh.Certificate) bool {
	texts := append([]string{cert.KeyId}, cert.ValidPrincipals...)
	for _, options := range []map[string]string{cert.CriticalOptions, cert.Extensions} {
		for name, value := range options {
			texts = append(texts, name, value)
		}
	}
	for _, text := range texts {
		if strings.IndexByte(text, 0) >= 0 {
			return false
		}
	}
	// The signed part ends before the signature (OpenSSH's PROTOCOL.certkeys).
	unsigned := *cert
	unsigned.Signature = nil
	signed := unsigned.Marshal()
	return cert.Signature != nil && cert.SignatureKey.Verify(signed[:len(signed)-4], cert.Signature) == nil
}

// algorithmFits tells whether keys of a type sign with an algorithm (RFC 8332 section 3 for RSA).
func algorithmFits(algorithm, keyType string) bool {
	switch {
	case algorithm == keyType:
		return true
	case keyType == ssh.KeyAlgoRSA:
		return algorithm == ssh.KeyAlgoRSASHA256 || algorithm == ssh.KeyAlgoRSASHA512
	case keyType == ssh.CertAlgoRSAv01:
		return algorithm == ssh.CertAlgoRSASHA256v01 || algorithm == ssh.CertAlgoRSASHA512v01
	}
	return false
}
