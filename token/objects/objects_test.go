package objects

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"p11-agent/token/bounds"
	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

func uri(t *testing.T, text string) *pkcs11uri.URI {
	t.Helper()
	u, err := pkcs11uri.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestFit checks that named keys come first if there is no room for all keys, and that certificates give way.
func TestFit(t *testing.T) {
	named := func(p *pairs.Pair) bool { return Names(uri(t, "pkcs11:token=bare;object=named"), p) }
	some := func(n, certificate int) (all []*pairs.Pair) {
		for i := range n {
			all = append(all, &pairs.Pair{
				ID: fmt.Append(nil, i), Members: []pairs.Member{{Name: pairs.Name{Label: fmt.Sprint(i)}}}, Public: ed25519.PublicKey{},
				Certificates: []*pairs.Certificate{{DER: make([]byte, certificate)}},
			})
		}
		all[n-1].Members = []pairs.Member{{Name: pairs.Name{Label: "other"}}, {Name: pairs.Name{Label: "named"}}}
		return all
	}
	room := bounds.Size{}.Room()
	t.Run("keys", func(t *testing.T) {
		var left leftOut
		all := some(bounds.MaxKeys+10, 0)
		got := fitPairs(all, room, named, &left)
		if len(got) != bounds.MaxKeys || left.keys != 10 || got[len(got)-1] != all[len(all)-1] {
			t.Errorf("%d keys are used, %d are left out", len(got), left.keys)
		}
	})
	t.Run("certificates", func(t *testing.T) {
		var left leftOut
		got := fitPairs(some(100, 400<<10), room, nil, &left)
		if len(got) != 100 || left.keys != 0 || left.certificates != 60 || weight(got) > bounds.MaxKeyBytes {
			t.Errorf("%d keys are used, %d and %d certificates are left out, %d bytes", len(got), left.keys, left.certificates, weight(got))
		}
	})
}

// TestLeftOut checks that the sentences for the status name what is left out, and the bound.
func TestLeftOut(t *testing.T) {
	if got := new(leftOut).sentences(); len(got) > 0 {
		t.Errorf("nothing is left out, and told is %q", got)
	}
	left := leftOut{objects: true, long: 1, keys: 2, certificates: 3, others: 4}
	left.skipped(fmt.Errorf("token: %w", pairs.ErrLongText))
	left.skipped(fmt.Errorf("another reason"))
	all := strings.Join(left.sentences(), "\n")
	for _, want := range []string{
		"objects of the token: 32768 of them", "2 keys: of one module 8192", "1 certificate: 1 MiB", "1 object: an ID or a label has 4096",
		"3 certificates of keys", "4 objects of no key",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not told:\n%s", want, all)
		}
	}
}

// A key is a key pair with the objects that a token has of it.
type key struct {
	signer *ecdsa.PrivateKey
	id     string
	label  string
}

func newKey(t *testing.T, id, label string) key {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key{k, id, label}
}

func (k key) public(t *testing.T) wire.Object {
	t.Helper()
	point, err := k.signer.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	curve, err := asn1.Marshal(pairs.OIDP256)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Object{Class: wire.CKOPublicKey, KeyType: wire.CKKEC, ID: []byte(k.id), Label: k.label, ECParams: curve, ECPoint: point}
}

func (k key) private() wire.Object {
	return wire.Object{Class: wire.CKOPrivateKey, KeyType: wire.CKKEC, ID: []byte(k.id), Label: k.label}
}

// certificate returns a certificate of the key that issuer has signed.
func (k key) certificate(t *testing.T, issuer key, authority bool) wire.Object {
	t.Helper()
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: k.label}, NotAfter: time.Now().Add(time.Hour),
		IsCA: authority, BasicConstraintsValid: true,
	}
	by := &x509.Certificate{Subject: pkix.Name{CommonName: issuer.label}}
	der, err := x509.CreateCertificate(rand.Reader, cert, by, crypto.PublicKey(&k.signer.PublicKey), issuer.signer)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Object{Class: wire.CKOCertificate, ID: []byte(k.id), Label: k.label, Value: der}
}

// TestOthers checks that the chain of a certificate stays in the Set, although no key of the token belongs to it.
func TestOthers(t *testing.T) {
	root, middle, own, foreign := newKey(t, "", "root"), newKey(t, "9", "middle"), newKey(t, "1", "own"), newKey(t, "2", "foreign")
	list := []wire.Object{
		root.certificate(t, root, true), middle.certificate(t, root, true), own.certificate(t, middle, false),
		own.private(), own.public(t), foreign.public(t),
	}
	s := Read(Look{Objects: list})
	if len(s.Pairs()) != 1 || len(s.Pairs()[0].Certificates) != 1 {
		t.Fatalf("%d pairs", len(s.Pairs()))
	}
	var labels []string
	for c := range s.Certificates() {
		labels = append(labels, c.Label)
		if len(c.DER) == 0 {
			t.Errorf("%s has no value", c.Label)
		}
	}
	if got := strings.Join(labels, " "); got != "own root middle" {
		t.Errorf("the certificates are %q", got)
	}
	public := make(map[string]crypto.PublicKey)
	for name, k := range s.PublicKeys() {
		public[name.Label] = k
	}
	if len(public) != 2 || !pairs.Equal(public["own"], &own.signer.PublicKey) || !pairs.Equal(public["foreign"], &foreign.signer.PublicKey) {
		t.Errorf("the public keys are %v", public)
	}
	if s.size.OtherBytes < len(list[0].Value)+len(list[1].Value) {
		t.Errorf("they count as %d bytes", s.size.OtherBytes)
	}
}

// TestManyCertificates checks that certificates of authorities stay within their bound, and take no room of keys.
func TestManyCertificates(t *testing.T) {
	root, middle, own := newKey(t, "", "root"), newKey(t, "", "middle"), newKey(t, "1", "own")
	one := middle.certificate(t, root, true)
	list := []wire.Object{own.private(), own.public(t)}
	for i := range 10_000 {
		one.Label = fmt.Sprintf("%d%s", i, strings.Repeat("x", 1<<10))
		list = append(list, one)
	}
	used := bounds.Size{Keys: 7, KeyBytes: 1 << 20, OtherBytes: 1 << 20}
	s := Read(Look{Objects: list, Used: used})
	if got := s.Size().OtherBytes; got > bounds.MaxOtherBytes-used.OtherBytes || got < bounds.MaxOtherBytes/2 {
		t.Errorf("%d bytes are kept", got)
	}
	if len(s.Pairs()) != 1 || s.Size().Keys != 1 || s.Unused() != 0 {
		t.Error("the key is left out")
	}
	if got := strings.Join(s.LeftOut(), "\n"); !strings.Contains(got, "objects of no key: there is room for 8 MiB") {
		t.Errorf("told is %q", got)
	}
}

// TestRecall checks that a look without a login keeps what a login has shown of a private key.
func TestRecall(t *testing.T) {
	own := newKey(t, "1", "shown")
	private := own.private()
	private.Label, private.AlwaysAuth = "hidden", wire.True
	in := Read(Look{Objects: []wire.Object{own.public(t), private}})
	out := Read(Look{Objects: []wire.Object{own.public(t)}, Hidden: true, Before: in})
	if p := out.Pairs()[0]; p.Label != "hidden" || !p.Always || Hidden(p) || !out.Hides() {
		t.Errorf("the private key is %q, always %v", p.Label, p.Always)
	}
	if i := out.Find(in.Pairs()[0]); i != 0 {
		t.Errorf("the key has index %d", i)
	}
	if i := (*Set)(nil).Find(in.Pairs()[0]); i >= 0 {
		t.Errorf("a token that was never read has the key: %d", i)
	}
}

// TestFind checks which of several keys with one public key is taken.
func TestFind(t *testing.T) {
	pair := func(id, label string) *pairs.Pair {
		pub := ed25519.PublicKey(make([]byte, ed25519.PublicKeySize))
		return &pairs.Pair{ID: []byte(id), Label: label, Public: pub, Sum: pairs.Digest(pub)}
	}
	s := Known([]*pairs.Pair{pair("1", "a"), pair("1", "b"), pair("2", "c")})
	for _, tt := range []struct {
		p    *pairs.Pair
		want int
	}{{pair("1", "b"), 1}, {pair("1", "x"), 0}, {pair("2", "x"), 2}, {pair("3", "x"), -1}} {
		if got := s.Find(tt.p); got != tt.want {
			t.Errorf("key %s %s: %d, want %d", tt.p.ID, tt.p.Label, got, tt.want)
		}
	}
	if got := Known([]*pairs.Pair{pair("1", "a")}).Find(pair("3", "x")); got != 0 {
		t.Errorf("the only key has index %d", got)
	}
	if s.Alone(pair("1", "")) || !s.Alone(pair("2", "")) || s.Alone(pair("", "")) {
		t.Error("the keys with the ID 1 are two")
	}
}

// TestMayName checks which hidden key a URI may mean.
func TestMayName(t *testing.T) {
	own, noID, authority := newKey(t, "1", "own"), newKey(t, "", "bare"), newKey(t, "9", "authority")
	list := []wire.Object{own.public(t), noID.public(t), authority.certificate(t, authority, true)}
	s := Read(Look{Objects: list, Hidden: true})
	find := func(label string) *pairs.Pair {
		for _, p := range s.Pairs() {
			if p.Label == label {
				return p
			}
		}
		t.Fatalf("there is no pair %q", label)
		return nil
	}
	for _, tt := range []struct {
		uri  string
		pair string
		want bool
	}{
		{"pkcs11:object=unknown", "own", true},
		{"pkcs11:object=own", "own", true},
		{"pkcs11:object=bare", "own", false},
		{"pkcs11:object=authority", "own", false},
		{"pkcs11:id=%31;object=unknown", "own", true},
		{"pkcs11:id=%37", "own", false},
		{"pkcs11:id=%37;type=private", "own", true},
		{"pkcs11:id=%37", "bare", true},
		{"pkcs11:id=%31", "bare", false},
		{"pkcs11:object=unknown;type=cert", "own", false},
		{"pkcs11:token=x", "own", false},
	} {
		if got := s.MayName(uri(t, tt.uri), find(tt.pair)); got != tt.want {
			t.Errorf("%s may name %s: %v", tt.uri, tt.pair, got)
		}
	}
	cut := Read(Look{Objects: list, Hidden: true, Cut: true})
	if cut.MayName(uri(t, "pkcs11:object=unknown"), find("own")) || (*Set)(nil).MayName(uri(t, "pkcs11:object=unknown"), find("own")) {
		t.Error("a name that may belong to an object outside the listing counts")
	}
}

// A label of an object that SSH cannot use belongs to that object, and not to a hidden key.
func TestMayNameOthers(t *testing.T) {
	own, short := newKey(t, "1", "own"), wire.Object{Class: wire.CKOPublicKey, KeyType: wire.CKKRSA, Label: "short", Modulus: []byte{200, 1}, Exponent: []byte{3}}
	s := Read(Look{Objects: []wire.Object{own.public(t), short}, Hidden: true})
	if s.MayName(uri(t, "pkcs11:object=short"), s.Pairs()[0]) {
		t.Error("the label of a short RSA key may name another key")
	}
}

// TestSearchNames checks which names a module process searches for.
func TestSearchNames(t *testing.T) {
	got := SearchNames([]*pkcs11uri.URI{
		uri(t, "pkcs11:id=%31"), uri(t, "pkcs11:object=one;id=%32"), uri(t, "pkcs11:object=%EF%BF%BD"), uri(t, "pkcs11:token=x"),
	})
	if len(got) != 2 || string(got[0].ID) != "1" || got[1].Label != "one" {
		t.Errorf("the names are %v", got)
	}
	many := make([]*pkcs11uri.URI, wire.MaxNames+1)
	for i := range many {
		many[i] = uri(t, "pkcs11:object=one")
	}
	if n := len(SearchNames(many)); n != wire.MaxNames {
		t.Errorf("%d names", n)
	}
}
