package sshagent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

var errSignature = errors.New("the signature is wrong")

// verify checks the signature of a key, or of the key in a certificate, as ssh-agent
// does for session-bind: a security key need not have been touched for it. sshd has
// nobody who could touch its own (OpenSSH's sshd.c clears SSH_SK_USER_PRESENCE_REQD of
// host keys), and x/crypto/ssh refuses such signatures.
func verify(key ssh.PublicKey, data []byte, sig *ssh.Signature) error {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	switch key.Type() {
	case ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		return verifySecurityKey(key, data, sig)
	}
	return key.Verify(data, sig)
}

// verifySecurityKey checks a signature of a security key, without a look at its flags
// (OpenSSH's PROTOCOL.u2f, "SSH U2F Signatures").
func verifySecurityKey(key ssh.PublicKey, data []byte, sig *ssh.Signature) error {
	crypto, ok := key.(ssh.CryptoPublicKey)
	if !ok || sig.Format != key.Type() {
		return errSignature
	}
	const flagsAndCounter = 1 + 4
	if len(sig.Rest) != flagsAndCounter {
		return errMalformed
	}
	// The application is the last field of the key.
	in := reader{rest: key.Marshal()}
	var application []byte
	for len(in.rest) > 0 {
		application = in.bytes()
	}
	of, message := sha256.Sum256(application), sha256.Sum256(data)
	signed := slices.Concat(of[:], sig.Rest, message[:])
	switch public := crypto.CryptoPublicKey().(type) {
	case ed25519.PublicKey:
		if len(public) == ed25519.PublicKeySize && ed25519.Verify(public, signed, sig.Blob) {
			return nil
		}
	case *ecdsa.PublicKey:
		var rs struct{ R, S *big.Int }
		if err := ssh.Unmarshal(sig.Blob, &rs); err != nil {
			return errMalformed
		}
		digest := sha256.Sum256(signed)
		if ecdsa.Verify(public, digest[:], rs.R, rs.S) {
			return nil
		}
	}
	return errSignature
}

const maxPrincipals = 256 // of a certificate, as OpenSSH (SSHKEY_CERT_MAX_PRINCIPALS)

// checkCertificate tells why OpenSSH reads no such certificate (cert_parse in its
// sshkey.c): mostly, its authority has not signed it. When the certificate is valid,
// and for which hosts, matters where its names are used.
func checkCertificate(cert *ssh.Certificate) error {
	switch {
	case cert.CertType != ssh.UserCert && cert.CertType != ssh.HostCert:
		return fmt.Errorf("a certificate of type %d is for neither users nor hosts", cert.CertType)
	case len(cert.ValidPrincipals) > maxPrincipals:
		return fmt.Errorf("a certificate has more than %d principals", maxPrincipals)
	case strings.Contains(cert.KeyId, "\x00"),
		slices.ContainsFunc(cert.ValidPrincipals, func(p string) bool { return strings.Contains(p, "\x00") }):
		return errNUL
	}
	unsigned := *cert
	unsigned.Signature = nil
	data, ok := bytes.CutSuffix(unsigned.Marshal(), make([]byte, 4)) // the length of the signature
	if !ok || cert.Signature == nil || verify(cert.SignatureKey, data, cert.Signature) != nil {
		return fmt.Errorf("the certificate of the key %s is not signed by its authority", ssh.FingerprintSHA256(cert.Key))
	}
	return nil
}

// An unknownKey is a public key of a type that is not known here: its wire form. It is
// equal to itself and has signed nothing.
type unknownKey struct {
	kind string
	wire []byte
}

func (k *unknownKey) Type() string { return k.kind }

func (k *unknownKey) Marshal() []byte { return k.wire }

func (k *unknownKey) Verify([]byte, *ssh.Signature) error {
	return fmt.Errorf("signatures of keys of type %q cannot be verified", k.kind)
}

// knownTypes are the types of keys, and of certificates, that can be read here. The names
// of DSA are written out, as x/crypto/ssh wants nobody to use its constants.
var knownTypes = []string{
	ssh.KeyAlgoRSA, "ssh-dss", ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoSKED25519,
	ssh.CertAlgoRSAv01, "ssh-dss-cert-v01@openssh.com", ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
	ssh.CertAlgoED25519v01, ssh.CertAlgoSKECDSA256v01, ssh.CertAlgoSKED25519v01,
}

// parseAnyKey reads a public key to compare others with. It may be of a type that a
// newer OpenSSH has. Nothing of it lies in blob.
func parseAnyKey(blob []byte, limit int) (ssh.PublicKey, error) {
	key, err := parseKey(blob, limit)
	if err == nil || len(blob) > limit {
		return key, err
	}
	in := reader{rest: blob}
	kind := in.bytes()
	// A name has up to 64 letters, digits and signs (RFC 4251 section 6).
	named := len(kind) > 0 && len(kind) <= 64 && !bytes.ContainsFunc(kind, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ',' })
	if !named || slices.Contains(knownTypes, string(kind)) || len(in.rest) == 0 {
		return nil, err
	}
	return &unknownKey{kind: string(kind), wire: bytes.Clone(blob)}, nil
}
