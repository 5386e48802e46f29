package sshkey

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/sshkey/keytest"
)

// Readable says of a key what ssh-keygen says of a file with it.
func TestReadable(t *testing.T) {
	k, ca := keytest.New(t), keytest.New(t)
	authority, err := ssh.NewSignerFromSigner(ca.Private)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecPublic, err := ssh.NewPublicKey(ec.Public())
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaAuthority, err := ssh.NewSignerFromSigner(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := func(change func(*ssh.Certificate)) ssh.PublicKey { return k.Certificate(t, ca, ssh.UserCert, change) }
	// The certificate says that a key has signed it, and another one has. x/crypto signs no
	// such certificates.
	signedBy := func(s ssh.Signer, says ssh.PublicKey) ssh.PublicKey {
		c := &ssh.Certificate{Key: k.Public, CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity, SignatureKey: says, Nonce: []byte("nonce")}
		data := c.Marshal()
		if c.Signature, err = s.Sign(rand.Reader, data[:len(data)-4]); err != nil {
			t.Fatal(err)
		}
		return c
	}
	after := func(change func(*ssh.Certificate)) ssh.PublicKey {
		c := k.Certificate(t, ca, ssh.UserCert, nil)
		change(c)
		return c
	}
	for _, test := range []struct {
		name string
		key  ssh.PublicKey
		want bool
	}{
		{"Ed25519", k.Public, true},
		{"ECDSA", ecPublic, true},
		{"RSA of 1024 bits", rsaOf(t, 1024), true},
		{"RSA of 1023 bits", rsaOf(t, 1023), false},
		{"RSA of 16384 bits", rsaOf(t, 16384), true},
		{"RSA of 16392 bits", rsaOf(t, 16392), false},
		{"FIDO", securityKey(t, "ssh:"), true},
		{"FIDO, NUL in the application", securityKey(t, "ssh:\x00x"), false},
		{"certificate", cert(nil), true},
		{"of a host", k.Certificate(t, ca, ssh.HostCert, nil), true},
		{"of an unknown type", k.Certificate(t, ca, 3, nil), false},
		{"not valid any more", cert(func(c *ssh.Certificate) { c.ValidBefore = 1 }), true},
		{"without principals", cert(func(c *ssh.Certificate) { c.ValidPrincipals = nil }), true},
		{"256 principals", cert(func(c *ssh.Certificate) { c.ValidPrincipals = slices.Repeat([]string{"a"}, 256) }), true},
		{"257 principals", cert(func(c *ssh.Certificate) { c.ValidPrincipals = slices.Repeat([]string{"a"}, 257) }), false},
		{"NUL in a principal", cert(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"a", "b\x00c"} }), false},
		{"NUL at the end of a principal", cert(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"a\x00"} }), true},
		{"NUL in the key ID", cert(func(c *ssh.Certificate) { c.KeyId = "a\x00b" }), false},
		{"two NULs in the key ID", cert(func(c *ssh.Certificate) { c.KeyId = "a\x00\x00" }), false},
		{"signed by RSA", signedBy(rsaAuthority, rsaAuthority.PublicKey()), true},
		{"changed after it was signed", after(func(c *ssh.Certificate) { c.Serial++ }), false},
		{"signature cut short", after(func(c *ssh.Certificate) { c.Signature.Blob = c.Signature.Blob[:63] }), false},
		{"another authority", signedBy(authority, k.Public), false},
		{"an authority that is a certificate", signedBy(authority, ca.Certificate(t, ca, ssh.UserCert, nil)), false},
		{"of a short RSA key", signedBy(authority, rsaOf(t, 1023)), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			key, err := ssh.ParsePublicKey(test.key.Marshal())
			if err == nil {
				err = Readable(key)
			}
			if (err == nil) != test.want {
				t.Errorf("%v", err)
			}
			program, err := exec.LookPath("ssh-keygen")
			if err != nil {
				return
			}
			file := filepath.Join(t.TempDir(), "key.pub")
			if err := os.WriteFile(file, ssh.MarshalAuthorizedKey(test.key), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(program, "-lf", file).CombinedOutput(); (err == nil) != test.want {
				t.Errorf("ssh-keygen: %v, %s", err, out)
			}
		})
	}
}

func securityKey(t testing.TB, application string) ssh.PublicKey {
	t.Helper()
	point := strings.Repeat("p", 32)
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct{ Type, Point, Application string }{ssh.KeyAlgoSKED25519, point, application}))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rsaOf is a public RSA key of a size. It has no private half.
func rsaOf(t testing.TB, bits uint) ssh.PublicKey {
	t.Helper()
	n := new(big.Int).SetBit(big.NewInt(1), int(bits)-1, 1)
	key, err := ssh.NewPublicKey(&rsa.PublicKey{N: n, E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	return key
}
