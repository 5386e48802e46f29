package token_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

// newPair makes a key for an import into a token.
func newPair(t *testing.T, kind string) (crypto.Signer, []byte) {
	t.Helper()
	var key crypto.Signer
	var err error
	if kind == tokentest.RSA2048 {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	noError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	noError(t, err)
	return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// certify makes a certificate for a key. issuer issues it; nil: the key itself.
func certify(t *testing.T, name string, key, issuer crypto.Signer, authority bool) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true, IsCA: authority,
	}
	parent := template
	if issuer == nil {
		issuer = key
	} else {
		parent = &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "issuer"}, IsCA: true, BasicConstraintsValid: true}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), issuer)
	noError(t, err)
	return der
}

// hsmStore returns a Store with one token of SoftHSM, and the person that it asks.
func hsmStore(t *testing.T, hsm *tokentest.SoftHSM) (*token.Store, *tokentest.Person) {
	t.Helper()
	person := &tokentest.Person{Always: tokentest.PIN}
	return tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("softhsm", hsm.Module(), hsm.Env()...)}, Command: self, PINs: person,
	}, tokentest.PIN), person
}

// A certificate may have another ID than its private key, or no ID. A login shows the private key.
// The signature that caused the login uses it, and the key stays in the list.
func TestLoginShowsOtherID(t *testing.T) {
	tokentest.Parallel(t)
	for _, kind := range []string{tokentest.RSA2048, tokentest.P256} {
		for _, id := range []string{"02", ""} {
			for _, label := range []string{"login", "certificate"} {
				t.Run(fmt.Sprintf("%s/%q/%s", kind, id, label), func(t *testing.T) {
					hsm := tokentest.NewSoftHSM(t)
					hsm.AddToken("work", tokentest.PIN)
					key, pkcs8 := newPair(t, kind)
					hsm.ImportKey("work", "01", "login", pkcs8)
					hsm.DeletePublic("work", "01")
					ca, _ := newPair(t, tokentest.P256)
					hsm.ImportCertificate("work", id, label, certify(t, "me", key, ca, false))
					s, person := hsmStore(t, hsm)
					k := tokentest.Keys(t, s, 1)[0]
					before := k.URI()
					for range 2 {
						noError(t, tokentest.Sign(t.Context(), k))
						k = tokentest.Keys(t, s, 1)[0]
					}
					noError(t, s.LogoutAll(t.Context()))
					noError(t, s.Rescan(t.Context()))
					k = tokentest.Keys(t, s, 1)[0]
					noError(t, tokentest.Sign(t.Context(), k))
					want(t, "prompts", person.Prompts(), 2)
					u, err := pkcs11uri.Parse(before)
					noError(t, err)
					if !k.Matches(u) {
						t.Errorf("%s does not match the key any more", before)
					}
				})
			}
		}
	}
}

// No attribute links an EC key to its certificate: their IDs and labels differ.
func TestCertificatesOfOtherIDs(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", tokentest.PIN)
	ca, _ := newPair(t, tokentest.P256)
	for i := range 3 {
		key, pkcs8 := newPair(t, tokentest.P256)
		id := fmt.Sprintf("0%d", i+1)
		hsm.ImportKey("work", id, "key "+id, pkcs8)
		hsm.DeletePublic("work", id)
		hsm.ImportCertificate("work", fmt.Sprintf("1%d", 3-i), "certificate", certify(t, "me", key, ca, false))
	}
	s, person := hsmStore(t, hsm)
	for range 2 {
		for _, k := range tokentest.Keys(t, s, 3) {
			noError(t, tokentest.Sign(t.Context(), k))
		}
	}
	tokentest.Keys(t, s, 3)
	want(t, "prompts", person.Prompts(), 1)
}

// A login does not change whether a key is fit.
func TestFitBeforeAndAfter(t *testing.T) {
	ca, _ := newPair(t, tokentest.P256)
	for _, tt := range []struct {
		name   string
		issuer crypto.Signer
		public bool // the token has a public key object
		fit    bool
	}{
		{"OwnAuthority", nil, false, true},
		{"OwnAuthorityWithPublicKey", nil, true, true},
		{"ForeignAuthority", ca, false, false},
		{"ForeignAuthorityWithPublicKey", ca, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			hsm := tokentest.NewSoftHSM(t)
			hsm.AddToken("work", tokentest.PIN)
			key, pkcs8 := newPair(t, tokentest.P256)
			hsm.ImportKey("work", "01", "login", pkcs8)
			if !tt.public {
				hsm.DeletePublic("work", "01")
			}
			hsm.ImportCertificate("work", "01", "login", certify(t, "me", key, tt.issuer, true))
			s, _ := hsmStore(t, hsm)
			for _, when := range []string{"before the login", "after the login", "after the logout"} {
				k := tokentest.Keys(t, s, 1)[0]
				want(t, "fit "+when, k.Unfit() == "", tt.fit)
				if when == "after the login" {
					noError(t, s.LogoutAll(t.Context()))
				} else {
					noError(t, tokentest.Sign(t.Context(), k))
				}
				noError(t, s.Rescan(t.Context()))
			}
		})
	}
}

// A root certificate of another owner on the token does not become a key for logins.
func TestForeignRoot(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", tokentest.PIN)
	key, pkcs8 := newPair(t, tokentest.P256)
	hsm.ImportKey("work", "01", "login", pkcs8)
	ca, _ := newPair(t, tokentest.P256)
	root, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "issuer"}, IsCA: true, BasicConstraintsValid: true,
	}, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "issuer"}}, ca.Public(), ca)
	noError(t, err)
	hsm.ImportCertificate("work", "01", "login", certify(t, "me", key, ca, false))
	hsm.ImportCertificate("work", "02", "root", root)
	s, _ := hsmStore(t, hsm)
	for _, k := range s.Keys() {
		want(t, fmt.Sprintf("fit %x", k.ID()), k.Unfit() == "", bytes.Equal(k.ID(), []byte{1}))
	}
}

// The agent keeps the chain of a certificate, although no key of the token belongs to it. A login and
// a logout change nothing.
func TestChainIsKept(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", tokentest.PIN)
	key, pkcs8 := newPair(t, tokentest.P256)
	hsm.ImportKey("work", "01", "login", pkcs8)
	ca, _ := newPair(t, tokentest.P256)
	middle, _ := newPair(t, tokentest.P256)
	hsm.ImportCertificate("work", "01", "login", certify(t, "me", key, middle, false))
	hsm.ImportCertificate("work", "02", "middle", certify(t, "issuer", middle, ca, true))
	hsm.ImportCertificate("work", "03", "root", certify(t, "root", ca, nil, true))
	s, _ := hsmStore(t, hsm)
	k := s.Keys()[slices.IndexFunc(s.Keys(), func(k *token.Key) bool { return k.Unfit() == "" })]
	check := func(when string) {
		t.Helper()
		labels, keys := token.Certificates(k)
		slices.Sort(labels)
		want(t, "certificates "+when, strings.Join(labels, " "), "login middle root")
		want(t, "public keys "+when, keys, 1)
	}
	check("before a login")
	noError(t, tokentest.Sign(t.Context(), k))
	noError(t, s.Rescan(t.Context()))
	check("after a login")
	want(t, "keys", len(s.Keys()), 1)
	noError(t, s.LogoutAll(t.Context()))
	noError(t, s.Rescan(t.Context()))
	check("after a logout")
}

// Two pairs have one ID and one label. Each key still signs with its own private key.
func TestSameIDAndLabel(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", tokentest.PIN)
	for range 3 {
		hsm.GenerateKey("work", tokentest.P256, "01", "login")
	}
	hsm.GenerateKey("work", tokentest.Ed25519, "01", "login")
	hsm.GenerateKey("work", tokentest.Ed25519, "01", "login")
	s, person := hsmStore(t, hsm)
	for range 2 {
		for _, k := range tokentest.Keys(t, s, 5) {
			noError(t, tokentest.Sign(t.Context(), k))
		}
	}
	want(t, "prompts", person.Prompts(), 1)
}

// selects returns the IDs of the keys that a URI selects.
func selects(t *testing.T, s *token.Store, uri string) string {
	t.Helper()
	u, err := pkcs11uri.Parse(uri)
	noError(t, err)
	keys, err := s.Select(t.Context(), selection.New(u))
	if err != nil {
		return err.Error()
	}
	var ids []byte
	for _, k := range keys {
		ids = append(ids, k.ID()...)
	}
	return fmt.Sprintf("%x", ids)
}

// p11tool prints the labels of private keys, which show only after a login. Before the login, a URI
// with such a label selects each key that may have it. After the login, it selects the keys that
// have it.
func TestNamesOfHiddenKeys(t *testing.T) {
	tokentest.Parallel(t)
	_, _, _, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN})
	for _, tt := range []struct{ uri, before, after string }{
		{"pkcs11:token=piv;id=%01;object=PIV%20AUTH%20key;type=private", "01", "01"},
		{"pkcs11:id=%02;object=SIGN%20key;type=private", "02", "02"},
		{"pkcs11:object=SIGN%20key", "0102", "02"},
		{"pkcs11:object=SIGN%20key;type=private", "0102", "02"},
		{"pkcs11:id=%02;object=PIV%20AUTH%20key;type=private", "02", "no"},
		{"pkcs11:object=SIGN%20key;type=public", "no", "02"}, // by any object of the pair
		{"pkcs11:id=%02;object=SIGN%20pubkey", "02", "02"},
		{"pkcs11:id=%01;object=SIGN%20pubkey", "no", "no"},
	} {
		if got := selects(t, s, tt.uri); !(got == tt.before || tt.before == "no" && len(got) > 20) {
			t.Errorf("before the login %s selects %s, want %s", tt.uri, got, tt.before)
		}
		defer func() {
			if got := selects(t, s, tt.uri); !(got == tt.after || tt.after == "no" && len(got) > 20) {
				t.Errorf("after the login %s selects %s, want %s", tt.uri, got, tt.after)
			}
		}()
	}
	noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
	noError(t, s.LogoutAll(t.Context())) // the agent remembers the labels
	noError(t, s.Rescan(t.Context()))
}

// A label must match exactly. The names of tokens have padding, which p11tool prints.
func TestPadding(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("demo", tokentest.PIN)
	hsm.GenerateKey("demo", tokentest.P256, "01", "door ")
	hsm.GenerateKey("demo", tokentest.P256, "02", "door")
	s, _ := hsmStore(t, hsm)
	for uri, ids := range map[string]string{
		"pkcs11:token=demo%20%20;object=door%20":                               "01",
		"pkcs11:token=demo;object=door":                                        "02",
		"pkcs11:model=SoftHSM%20v2%20%00%00;manufacturer=SoftHSM%20project%20": "0102",
	} {
		want(t, uri, selects(t, s, uri), ids)
	}
	for _, k := range s.Keys() {
		noError(t, tokentest.Sign(t.Context(), k))
	}
}

// A gate is a log handler that waits at a message, once, after it was armed.
type gate struct {
	slog.Handler
	message          string
	armed            *atomic.Bool
	reached, release chan struct{}
}

func (g gate) Handle(_ context.Context, r slog.Record) error {
	if r.Message == g.message && g.armed.CompareAndSwap(true, false) {
		close(g.reached)
		<-g.release
	}
	return nil
}

func (g gate) WithAttrs([]slog.Attr) slog.Handler { return g }

// A look that began before a login ends after it. It does not hide again what the login has shown.
func TestLookFromBeforeLogin(t *testing.T) {
	debug := slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug})
	look := gate{debug, "object is not used", new(atomic.Bool), make(chan struct{}), make(chan struct{})}
	b := newBench(t, &tokentest.Person{Always: rightPIN}, func(b *bench, o *token.Options) {
		b.card.Change(1, func(k *tokentest.FakeKey) { k.Public, k.Cert = false, [][]byte{[]byte("no certificate")} })
		o.Log = slog.New(look)
	})
	want(t, "hidden before a login", b.key(1).Hidden(), true)
	look.armed.Store(true)
	looked := make(chan error, 1)
	go func() { looked <- b.store.Rescan(t.Context()) }()
	tokentest.Wait(t, look.reached)
	b.mustSign()
	want(t, "hidden after the login", b.key(1).Hidden(), false)
	close(look.release)
	noError(t, <-looked)
	want(t, "hidden after the old look", b.key(1).Hidden(), false)
}
