package agent

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/certdir"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
)

// types lists the types of keys that are listed, and their serial numbers.
func (f *fixture) types(t *testing.T) (all []string) {
	t.Helper()
	list, err := f.List(t.Context(), local)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range list.Identities {
		key, err := ssh.ParsePublicKey(id.Key.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		if cert, ok := key.(*ssh.Certificate); ok {
			all = append(all, fmt.Sprintf("cert %d", cert.Serial))
		} else {
			all = append(all, "key")
		}
	}
	return all
}

func (f *fixture) wantTypes(t *testing.T, want ...string) {
	t.Helper()
	if got := f.types(t); !slices.Equal(got, want) {
		t.Errorf("listed: %q, want %q", got, want)
	}
}

func serial(n uint64) func(*ssh.Certificate) { return func(c *ssh.Certificate) { c.Serial = n } }

func TestAssociatedCertificates(t *testing.T) {
	k, other, ca := keytest.New(t), keytest.New(t), keytest.New(t)
	one, two := k.Certificate(t, ca, ssh.UserCert, serial(1)), k.Certificate(t, ca, ssh.UserCert, serial(2))
	foreign := other.Certificate(t, ca, ssh.UserCert, serial(3))
	expired := k.Certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) { c.Serial, c.ValidBefore = 4, 1 })
	newF := func() *fixture {
		return newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1})
	}
	all := []*ssh.Certificate{one, foreign, two, expired}

	f := newF()
	f.add(t, "pkcs11:token=a", request.Constraints{Certificates: all})
	f.wantTypes(t, "key", "cert 1", "cert 2")
	for _, key := range []ssh.PublicKey{k.Public, one, two} {
		sig, err := f.Sign(t.Context(), local, request.Sign{Key: key.Marshal(), Data: []byte("data")})
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Public.Verify([]byte("data"), sig); err != nil {
			t.Error(err)
		}
	}
	if err := f.Remove(t.Context(), local, one.Marshal()); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "cert 2")
	f.add(t, "pkcs11:token=a", request.Constraints{Certificates: all, CertificatesOnly: true})
	f.wantTypes(t, "cert 1", "cert 2")
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: k.Public.Marshal()}); err == nil {
		t.Error("the plain key signs")
	}
	if err := f.RemoveToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a")}); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t)

	f = newF()
	if err := f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:"), Constraints: request.Constraints{CertificatesOnly: true}}); err == nil {
		t.Error("only certificates, of which there are none")
	}
	f.wantTypes(t)
}

func TestCertificateDir(t *testing.T) {
	k, soft, ca := keytest.New(t), keytest.New(t), keytest.New(t)
	dir := filepath.Join(t.TempDir(), "certs")
	log := slog.New(slog.DiscardHandler)
	token := &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1}
	f := newFixture(Options{SoftwareKeys: true, Certificates: certdir.New(dir, log)}, token)
	if err := f.Add(t.Context(), local, addKey(soft, request.Constraints{})); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "key") // the directory is not there
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(name string, key ssh.PublicKey) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name+".new"), ssh.MarshalAuthorizedKey(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, name+".new"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	cert := func(n uint64) *ssh.Certificate { return k.Certificate(t, ca, ssh.UserCert, serial(n)) }
	put("b-cert.pub", cert(1))
	put("plain.pub", k.Public)
	put("other-cert.pub", keytest.New(t).Certificate(t, ca, ssh.UserCert, nil))
	put("soft-cert.pub", soft.Certificate(t, ca, ssh.UserCert, nil)) // for keys of tokens only
	put("ignored", cert(9))
	if err := os.WriteFile(filepath.Join(dir, "garbage.pub"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "huge.pub"), make([]byte, 64<<10+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "directory.pub"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "cert 1", "key")
	put("a-cert.pub", cert(2))
	f.wantTypes(t, "key", "cert 2", "cert 1", "key")
	put("b-cert.pub", cert(3)) // renewed
	f.wantTypes(t, "key", "cert 2", "cert 3", "key")

	// A certificate that came after the last list signs, too.
	late := cert(4)
	put("a-cert.pub", late)
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: late.Marshal()}); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "b-cert.pub")); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "cert 4", "key")
	if err := f.Remove(t.Context(), local, late.Marshal()); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "key")
	f.add(t, "pkcs11:token=a", request.Constraints{Confirm: true}) // brings it back, limited as the key is
	f.wantTypes(t, "key", "cert 4", "key")
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: late.Marshal()}); err == nil || len(f.confirm.asked) != 1 {
		t.Errorf("not asked for: %v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t, "key", "key")
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	f.wantTypes(t)
}

// The agent shows a certificate from ValidAfter until just before ValidBefore.
func TestCertificateValidity(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		k, ca := keytest.New(t), keytest.New(t)
		start := time.Now().Truncate(time.Second)
		cert := k.Certificate(t, ca, ssh.UserCert, func(c *ssh.Certificate) {
			c.ValidAfter, c.ValidBefore = uint64(start.Unix()+10), uint64(start.Unix()+20)
		})
		if err := os.WriteFile(filepath.Join(dir, "cert.pub"), ssh.MarshalAuthorizedKey(cert), 0o600); err != nil {
			t.Fatal(err)
		}
		f := newFixture(Options{Certificates: certdir.New(dir, slog.New(slog.DiscardHandler))},
			&fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1})
		for _, test := range []struct {
			at    time.Duration
			shown bool
		}{{0, false}, {10*time.Second - 1, false}, {10 * time.Second, true}, {20*time.Second - 1, true}, {20 * time.Second, false}} {
			time.Sleep(time.Until(start.Add(test.at)))
			if got := f.types(t); slices.Contains(got, "cert 1") != test.shown {
				t.Errorf("after %v: %q", test.at, got)
			}
		}
	})
}
