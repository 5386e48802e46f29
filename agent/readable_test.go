package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

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

func securityKey(t testing.TB, application string) ssh.PublicKey {
	t.Helper()
	point := strings.Repeat("p", 32)
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct{ Type, Point, Application string }{ssh.KeyAlgoSKED25519, point, application}))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Readable says of a key what ssh-keygen says of a file with it.
func TestReadable(t *testing.T) {
	k, ca := newTestKey(t), newTestKey(t)
	authority, err := ssh.NewSignerFromSigner(ca.private)
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
	cert := func(change func(*ssh.Certificate)) ssh.PublicKey { return k.certificate(t, ca, ssh.UserCert, change) }
	// The certificate says that a key has signed it, and another one has. x/crypto signs no
	// such certificates.
	signedBy := func(s ssh.Signer, says ssh.PublicKey) ssh.PublicKey {
		c := &ssh.Certificate{Key: k.public, CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity, SignatureKey: says, Nonce: []byte("nonce")}
		data := c.Marshal()
		if c.Signature, err = s.Sign(rand.Reader, data[:len(data)-4]); err != nil {
			t.Fatal(err)
		}
		return c
	}
	after := func(change func(*ssh.Certificate)) ssh.PublicKey {
		c := k.certificate(t, ca, ssh.UserCert, nil)
		change(c)
		return c
	}
	for _, test := range []struct {
		name string
		key  ssh.PublicKey
		want bool
	}{
		{"Ed25519", k.public, true},
		{"ECDSA", ecPublic, true},
		{"RSA of 1024 bits", rsaOf(t, 1024), true},
		{"RSA of 1023 bits", rsaOf(t, 1023), false},
		{"RSA of 16384 bits", rsaOf(t, 16384), true},
		{"RSA of 16392 bits", rsaOf(t, 16392), false},
		{"FIDO", securityKey(t, "ssh:"), true},
		{"FIDO, NUL in the application", securityKey(t, "ssh:\x00x"), false},
		{"certificate", cert(nil), true},
		{"of a host", k.certificate(t, ca, ssh.HostCert, nil), true},
		{"of nobody", k.certificate(t, ca, 3, nil), false},
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
		{"another authority", signedBy(authority, k.public), false},
		{"an authority that is a certificate", signedBy(authority, ca.certificate(t, ca, ssh.UserCert, nil)), false},
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

// A certificate that OpenSSH does not read is not shown, whatever directory it is in.
func TestUnreadableCertificateFile(t *testing.T) {
	k, ca := newTestKey(t), newTestKey(t)
	dir := t.TempDir()
	good, bad := k.certificate(t, ca, ssh.UserCert, nil), k.certificate(t, ca, ssh.UserCert, nil)
	bad.Serial++
	many := k.certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) { c.ValidPrincipals = slices.Repeat([]string{"a"}, 257) })
	for i, c := range []*ssh.Certificate{bad, good, many} {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i, ".pub")), ssh.MarshalAuthorizedKey(c), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := newFixture(Options{}, &fakeKey{Signer: k.private, uri: "pkcs11:token=a", insertions: 1})
	f.opts.Certificates = NewCertificateDir(dir, f.opts.Log)
	list, err := f.List(t.Context(), local)
	if err != nil || len(list.Identities) != 2 || list.Identities[1].Key.Type() != ssh.CertAlgoED25519v01 {
		t.Fatalf("%+v, %v", list, err)
	}
	if got := f.log.String(); strings.Count(got, "certificate cannot be used") != 2 {
		t.Errorf("the log has %s", got)
	}
	files, err := ReadCertificates(dir)
	if err != nil || len(files) != 3 || files[0].Err == nil || files[1].Err != nil || files[2].Err == nil {
		t.Errorf("%+v, %v", files, err)
	}
}

// A key of a token that OpenSSH does not read is not shown.
func TestUnreadableTokenKey(t *testing.T) {
	n := new(big.Int).SetBit(big.NewInt(1), 16391, 1)
	huge := &fakeKey{Signer: hugeKey{&rsa.PublicKey{N: n, E: 65537}}, uri: "pkcs11:token=huge", insertions: 1}
	f := newFixture(Options{}, edKey("pkcs11:token=a"), huge)
	f.wantList(t, "pkcs11:token=a")
}

// Certificates that are for none of the keys are no addition when nothing else is to be
// added.
func TestForeignCertificatesOnly(t *testing.T) {
	k, other, ca := newTestKey(t), newTestKey(t), newTestKey(t)
	key := &fakeKey{Signer: k.private, uri: "pkcs11:token=a", insertions: 1}
	foreign := other.certificate(t, ca, ssh.UserCert, nil)
	own := k.certificate(t, ca, ssh.UserCert, nil)
	over := k.certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) { c.ValidBefore = 1 })
	for _, test := range []struct {
		name  string
		certs []*ssh.Certificate
		only  bool
		list  []string // nil: it is refused
	}{
		{"foreign ones only", []*ssh.Certificate{foreign}, true, nil},
		{"none", nil, true, nil},
		{"only what is not valid any more", []*ssh.Certificate{over, foreign}, true, nil},
		{"one of them fits", []*ssh.Certificate{foreign, own}, true, []string{ssh.CertAlgoED25519v01}},
		{"foreign ones and the keys", []*ssh.Certificate{foreign}, false, []string{ssh.KeyAlgoED25519}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, key)
			err := f.AddToken(t.Context(), local, request.Token{
				Provider: []byte(key.uri), Constraints: request.Constraints{Certificates: test.certs, CertificatesOnly: test.only},
			})
			if (err != nil) != (test.list == nil) || err != nil && !errors.Is(err, errCertifiesNone) {
				t.Errorf("%v", err)
			}
			list, err := f.List(t.Context(), local)
			if err != nil {
				t.Fatal(err)
			}
			var types []string
			for _, id := range list.Identities {
				types = append(types, id.Key.Type())
			}
			if !slices.Equal(types, test.list) {
				t.Errorf("listed %q, want %q", types, test.list)
			}
		})
	}
}

// hugeKey has a public half only.
type hugeKey struct{ public *rsa.PublicKey }

func (k hugeKey) Public() crypto.PublicKey { return k.public }

func (hugeKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("it signs nothing")
}
