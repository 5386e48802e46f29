// Package sshkey knows which SSH public keys and certificates OpenSSH reads, and verifies
// their signatures.
//
// An OpenSSH client gives up a whole list of keys when it cannot read one of them
// (ssh_fetch_identitylist in OpenSSH's authfd.c). So the agent takes and lists no key
// that OpenSSH does not read. The rules are those of OpenSSH 9.2 and of 10.5.
package sshkey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

// maxPrincipals bounds the principals of a certificate (SSHKEY_CERT_MAX_PRINCIPALS in
// OpenSSH's sshkey.h).
const maxPrincipals = 256

// The sizes of the RSA keys that OpenSSH reads, in bits (SSH_RSA_MINIMUM_MODULUS_SIZE in
// OpenSSH's sshkey.h, and OPENSSL_RSA_MAX_MODULUS_BITS).
const (
	MinRSABits = 1024
	MaxRSABits = 16384
)

var (
	errSignature = errors.New("the signature is wrong")
	errNUL       = errors.New("a text in it has a NUL byte")
)

// Readable returns an error that says why OpenSSH does not read a parsed public key
// (sshkey_from_blob in OpenSSH's sshkey.c). nil means that OpenSSH reads the key.
// Readable verifies the signature of a certificate. It ignores the time in which a
// certificate is valid.
func Readable(key ssh.PublicKey) error {
	if cert, ok := key.(*ssh.Certificate); ok {
		return readableCertificate(cert)
	}
	crypto, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil
	}
	if pub, ok := crypto.CryptoPublicKey().(*rsa.PublicKey); ok {
		// sshkey_check_rsa_length, and sshbuf_get_bignum2, which reads no negative number.
		if bits := pub.N.BitLen(); pub.N.Sign() <= 0 || bits < MinRSABits || bits > MaxRSABits {
			return fmt.Errorf("an RSA key of %d bits: OpenSSH reads keys of %d to %d bits", bits, MinRSABits, MaxRSABits)
		}
	}
	if isSecurityKey(key) {
		application, err := applicationOf(key)
		if err != nil || !ReadableText(application) {
			return errors.Join(errNUL, err)
		}
	}
	return nil
}

// ReadableText tells whether OpenSSH reads a text of a message: it has no NUL byte but
// at its end (sshbuf_get_cstring in OpenSSH's sshbuf-getput-basic.c).
func ReadableText[T string | []byte](text T) bool {
	i := strings.IndexByte(string(text), 0)
	return i < 0 || i == len(text)-1
}

// readableCertificate is Readable for certificates (cert_parse in OpenSSH's sshkey.c).
func readableCertificate(cert *ssh.Certificate) error {
	switch {
	case cert.CertType != ssh.UserCert && cert.CertType != ssh.HostCert:
		return fmt.Errorf("a certificate of type %d is for neither users nor hosts", cert.CertType)
	case len(cert.ValidPrincipals) > maxPrincipals:
		return fmt.Errorf("a certificate has %d principals: the limit is %d", len(cert.ValidPrincipals), maxPrincipals)
	case !ReadableText(cert.KeyId), slices.ContainsFunc(cert.ValidPrincipals, func(p string) bool { return !ReadableText(p) }):
		return errNUL
	case cert.Signature == nil || cert.SignatureKey == nil:
		return errors.New("a certificate has no signature")
	}
	if err := Readable(cert.Key); err != nil {
		return fmt.Errorf("the key in a certificate: %w", err)
	}
	// sshkey_type_is_valid_ca: no certificate, and since OpenSSH 10 no DSA key.
	if _, ok := cert.SignatureKey.(*ssh.Certificate); ok || cert.SignatureKey.Type() == "ssh-dss" {
		return fmt.Errorf("a certificate is signed by a key of type %s, which OpenSSH does not take", cert.SignatureKey.Type())
	}
	if err := Readable(cert.SignatureKey); err != nil {
		return fmt.Errorf("the key that has signed a certificate: %w", err)
	}
	unsigned := *cert
	unsigned.Signature = nil
	data, ok := bytes.CutSuffix(unsigned.Marshal(), make([]byte, 4)) // the length of the signature
	if !ok || Verify(cert.SignatureKey, data, cert.Signature) != nil {
		return fmt.Errorf("the certificate of the key %s is not signed by its authority", ssh.FingerprintSHA256(cert.Key))
	}
	return nil
}

// Verify checks the signature of a key, or of the key in a certificate, as
// OpenSSH does for session-bind and for certificates: a security key need not have been
// touched for it. No person can touch the key of sshd (OpenSSH's sshd.c clears
// SSH_SK_USER_PRESENCE_REQD of host keys), and x/crypto/ssh refuses such signatures.
func Verify(key ssh.PublicKey, data []byte, sig *ssh.Signature) error {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	if isSecurityKey(key) {
		return verifySecurityKey(key, data, sig)
	}
	return key.Verify(data, sig)
}

// isSecurityKey tells whether a key, which is no certificate, is that of a FIDO device.
func isSecurityKey(key ssh.PublicKey) bool {
	return key.Type() == ssh.KeyAlgoSKED25519 || key.Type() == ssh.KeyAlgoSKECDSA256
}

// applicationOf returns the application of a security key (OpenSSH's PROTOCOL.u2f).
func applicationOf(key ssh.PublicKey) (string, error) {
	if key.Type() == ssh.KeyAlgoSKECDSA256 {
		var k struct{ Type, Curve, Point, Application string }
		err := ssh.Unmarshal(key.Marshal(), &k)
		return k.Application, err
	}
	var k struct{ Type, Point, Application string }
	err := ssh.Unmarshal(key.Marshal(), &k)
	return k.Application, err
}

// verifySecurityKey checks a signature of a security key, without a look at its flags
// (OpenSSH's PROTOCOL.u2f, "SSH U2F Signatures").
func verifySecurityKey(key ssh.PublicKey, data []byte, sig *ssh.Signature) error {
	crypto, ok := key.(ssh.CryptoPublicKey)
	const flagsAndCounter = 1 + 4
	if !ok || sig.Format != key.Type() || len(sig.Rest) != flagsAndCounter {
		return errSignature
	}
	application, err := applicationOf(key)
	if err != nil {
		return err
	}
	of, message := sha256.Sum256([]byte(application)), sha256.Sum256(data)
	signed := slices.Concat(of[:], sig.Rest, message[:])
	switch public := crypto.CryptoPublicKey().(type) {
	case ed25519.PublicKey:
		if len(public) == ed25519.PublicKeySize && ed25519.Verify(public, signed, sig.Blob) {
			return nil
		}
	case *ecdsa.PublicKey:
		var rs struct{ R, S *big.Int }
		if err := ssh.Unmarshal(sig.Blob, &rs); err != nil {
			return errSignature
		}
		digest := sha256.Sum256(signed)
		if ecdsa.Verify(public, digest[:], rs.R, rs.S) {
			return nil
		}
	}
	return errSignature
}
