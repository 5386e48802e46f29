package agent

import (
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/certdir"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
)

// The agent shows no certificate that OpenSSH does not read, from any directory.
func TestUnreadableCertificateFile(t *testing.T) {
	k, ca := keytest.New(t), keytest.New(t)
	dir := t.TempDir()
	good, bad := k.Certificate(t, ca, ssh.UserCert, nil), k.Certificate(t, ca, ssh.UserCert, nil)
	bad.Serial++
	many := k.Certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) { c.ValidPrincipals = slices.Repeat([]string{"a"}, 257) })
	for i, c := range []*ssh.Certificate{bad, good, many} {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i, ".pub")), ssh.MarshalAuthorizedKey(c), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := newFixture(Options{}, &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1})
	f.opts.Certificates = certdir.New(dir, f.opts.Log)
	list, err := f.List(t.Context(), local)
	if err != nil || len(list.Identities) != 2 || list.Identities[1].Key.Type() != ssh.CertAlgoED25519v01 {
		t.Fatalf("%+v, %v", list, err)
	}
	if got := f.log.String(); strings.Count(got, "certificate cannot be used") != 2 {
		t.Errorf("the log has %s", got)
	}
	files, err := certdir.Read(dir)
	if err != nil || len(files) != 3 || files[0].Err == nil || files[1].Err != nil || files[2].Err == nil {
		t.Errorf("%+v, %v", files, err)
	}
}

// The agent shows no key of a token that OpenSSH does not read.
func TestUnreadableTokenKey(t *testing.T) {
	n := new(big.Int).SetBit(big.NewInt(1), 16391, 1)
	huge := &fakeKey{Signer: hugeKey{&rsa.PublicKey{N: n, E: 65537}}, uri: "pkcs11:token=huge", insertions: 1}
	f := newFixture(Options{}, edKey("pkcs11:token=a"), huge)
	f.wantList(t, "pkcs11:token=a")
}

// If a client adds certificates only, and none is for a key, the agent refuses the addition.
func TestForeignCertificatesOnly(t *testing.T) {
	k, other, ca := keytest.New(t), keytest.New(t), keytest.New(t)
	key := &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1}
	foreign := other.Certificate(t, ca, ssh.UserCert, nil)
	own := k.Certificate(t, ca, ssh.UserCert, nil)
	over := k.Certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) { c.ValidBefore = 1 })
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
