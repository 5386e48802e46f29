package sshagent

import (
	"bytes"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
)

const (
	msgUserauthRequest = 50 // SSH_MSG_USERAUTH_REQUEST (RFC 4252 section 6)
	serviceConnection  = "ssh-connection"
	methodPublicKey    = "publickey"
	// methodHostbound names the server's key as well (OpenSSH's PROTOCOL section
	// 3.1).
	methodHostbound = "publickey-hostbound-v00@openssh.com"
)

// parseLogin returns what data asks for when it is a request to log in with
// this very key or a certificate of it, whole and with nothing after it, and nil
// when it is anything else. Nothing of data is copied but the user's name.
func parseLogin(data, key []byte) *agent.Login {
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
		if host = in.bytes(); len(host) == 0 {
			return nil
		}
	default:
		return nil
	}
	kind := reader{rest: blob}
	switch {
	case in.end() != nil, signed != 1, string(service) != serviceConnection, bytes.IndexByte(user, 0) >= 0,
		!bytes.Equal(blob, key) && !certifies(blob, key), !algorithmFits(string(algorithm), string(kind.bytes())):
		return nil
	}
	return &agent.Login{User: string(user), SessionID: session, HostKey: host}
}

// certifies tells whether blob is a certificate of the key. ssh has the plain key
// sign for one that it has from a file (CertificateFile).
func certifies(blob, key []byte) bool {
	kind := reader{rest: blob}
	if !bytes.HasSuffix(kind.bytes(), certSuffix) {
		return false
	}
	pub, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return false
	}
	cert, ok := pub.(*ssh.Certificate)
	return ok && bytes.Equal(cert.Key.Marshal(), key)
}

// algorithmFits tells whether a signature algorithm is one for keys of a type
// (RFC 8332 section 3 for the RSA ones).
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
