// Package keytest makes SSH keys and certificates for tests.
package keytest

import (
	"crypto/ed25519"
	"crypto/rand"
	"testing"

	"golang.org/x/crypto/ssh"
)

// A Key is a new Ed25519 key in the forms that tests need.
type Key struct {
	Private ed25519.PrivateKey
	Public  ssh.PublicKey
	Signer  ssh.Signer
}

// New makes a Key.
func New(t testing.TB) Key {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return Key{priv, signer.PublicKey(), signer}
}

// Certificate returns a certificate of the key that ca has signed. change may be nil.
func (k Key) Certificate(t testing.TB, ca Key, kind uint32, change func(*ssh.Certificate)) *ssh.Certificate {
	t.Helper()
	c := &ssh.Certificate{Key: k.Public, CertType: kind, ValidBefore: ssh.CertTimeInfinity, Serial: 1}
	if change != nil {
		change(c)
	}
	if err := c.SignCert(rand.Reader, ca.Signer); err != nil {
		t.Fatal(err)
	}
	return c
}
