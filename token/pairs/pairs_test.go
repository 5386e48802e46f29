package pairs

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"p11-agent/token/wire"
)

// ring is one key of each kind, and a second of one.
type ring struct {
	rsa                           *rsa.PrivateKey
	p224, p256, other, p384, p521 *ecdsa.PrivateKey
	ed                            ed25519.PrivateKey
}

var testRing = sync.OnceValue(func() ring {
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(c, rand.Reader)) }
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	return ring{
		rsa:  must(rsa.GenerateKey(rand.Reader, 2048)),
		p224: ec(elliptic.P224()), p256: ec(elliptic.P256()), other: ec(elliptic.P256()),
		p384: ec(elliptic.P384()), p521: ec(elliptic.P521()), ed: must(ed, err),
	}
})

// name is what the tables call a public key.
func (r ring) name(pub crypto.PublicKey) string {
	for name, k := range map[string]crypto.Signer{
		"rsa": r.rsa, "p256": r.p256, "other": r.other, "p384": r.p384, "p521": r.p521, "ed": r.ed,
	} {
		if Equal(pub, k.Public()) {
			return name
		}
	}
	return "unknown"
}

// must is for what cannot fail in a test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// der is the DER of v, of a kind that params of encoding/asn1 may choose.
func der(v any, params ...string) []byte {
	return must(asn1.MarshalWithParams(v, strings.Join(params, ",")))
}

var oidP224 = asn1.ObjectIdentifier{1, 3, 132, 0, 33}

// half is an object of a class that shows all of a public half, as the standard
// wants it.
func half(class uint64, k crypto.Signer, id, label string) wire.Object {
	o := wire.Object{Class: class, Label: label, Sign: wire.True}
	if id != "" {
		o.ID = []byte(id)
	}
	switch pub := k.Public().(type) {
	case *rsa.PublicKey:
		o.KeyType, o.Modulus, o.Exponent = wire.CKKRSA, pub.N.Bytes(), big.NewInt(int64(pub.E)).Bytes()
	case *ecdsa.PublicKey:
		oid := map[elliptic.Curve]asn1.ObjectIdentifier{
			elliptic.P224(): oidP224, elliptic.P256(): OIDP256, elliptic.P384(): OIDP384, elliptic.P521(): OIDP521,
		}[pub.Curve]
		o.KeyType, o.ECParams, o.ECPoint = wire.CKKEC, der(oid), der(must(pub.Bytes()))
	case ed25519.PublicKey:
		o.KeyType, o.ECParams, o.ECPoint = wire.CKKECEdwards, der(OIDEd25519), der([]byte(pub))
	}
	return o
}

func public(k crypto.Signer, id, label string) wire.Object {
	return half(wire.CKOPublicKey, k, id, label)
}

func private(k crypto.Signer, id, label string) wire.Object {
	o := half(wire.CKOPrivateKey, k, id, label)
	o.Private = wire.True
	return o
}

// bare is a private key object that shows nothing of its public half.
func bare(k crypto.Signer, id, label string) wire.Object {
	o := private(k, id, label)
	o.Modulus, o.Exponent, o.ECParams, o.ECPoint = nil, nil, nil, nil
	return o
}

// with changes an object.
func with(o wire.Object, set func(o *wire.Object)) wire.Object {
	set(&o)
	return o
}

// A kind of certificate.
const (
	noUsage = iota
	login
	encryption
	authority
)

// cert is a certificate object with a key.
func cert(k crypto.Signer, kind int, id, label string) wire.Object {
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: label}}
	switch kind {
	case login:
		c.KeyUsage = x509.KeyUsageDigitalSignature
	case encryption:
		c.KeyUsage = x509.KeyUsageKeyEncipherment
	case authority:
		c.KeyUsage, c.IsCA, c.BasicConstraintsValid = x509.KeyUsageCertSign, true, true
	}
	o := wire.Object{
		Class: wire.CKOCertificate, Label: label,
		Value: must(x509.CreateCertificate(rand.Reader, c, c, k.Public(), testRing().ed)),
	}
	if id != "" {
		o.ID = []byte(id)
	}
	return o
}

// A summary is what a table says of a Pair. unfit is a part of the reason.
type summary struct {
	id, label, key        string
	visible, open, always bool
	certs                 int
	unfit                 string
}

type pairTest struct {
	name    string
	objects []wire.Object
	token   wire.TokenID
	hidden  bool
	want    []summary
	skips   []string // pieces of the reasons
}

func pairTests() []pairTest {
	k := testRing()
	const none = "no private key"
	// The OIDs of these curves differ from Ed25519's in the last byte.
	curve := func(last byte) wire.Object {
		return with(cert(k.ed, noUsage, "1", "curve"), func(o *wire.Object) {
			o.Value = bytes.ReplaceAll(o.Value, []byte{0x2b, 0x65, 0x70}, []byte{0x2b, 0x65, last})
		})
	}
	x25519, ed448 := curve(0x6e), curve(0x71)
	whole := cert(k.p256, login, "1", "one").Value

	return []pairTest{
		{name: "nothing"},

		// Where the public half comes from.
		{
			name:    "all three",
			objects: []wire.Object{cert(k.p256, login, "1", "cert"), private(k.p256, "1", "one"), public(k.p256, "1", "pub")},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, certs: 1}},
		},
		{
			name:    "public key object",
			objects: []wire.Object{bare(k.rsa, "1", "one"), public(k.rsa, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true}},
		},
		{
			name:    "certificate",
			objects: []wire.Object{bare(k.p384, "1", "one"), cert(k.p384, login, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p384", visible: true, certs: 1}},
		},
		{
			name:    "private key object, RSA",
			objects: []wire.Object{private(k.rsa, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true}},
		},
		{
			name:    "private key object, EC",
			objects: []wire.Object{private(k.p521, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p521", visible: true}},
		},
		{
			name:    "private key object, Ed25519",
			objects: []wire.Object{private(k.ed, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "ed", visible: true}},
		},
		{
			name:    "nowhere",
			objects: []wire.Object{bare(k.p256, "1", "one")},
			skips:   []string{"no public key or certificate"},
		},
		{
			name:    "a certificate where the private key's own is broken",
			objects: []wire.Object{with(private(k.p256, "1", "one"), func(o *wire.Object) { o.ECPoint = []byte{4} }), cert(k.p256, login, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, certs: 1}},
		},

		// Before and after a login.
		{
			name:    "public key alone, before",
			objects: []wire.Object{public(k.p256, "1", "one")},
			hidden:  true,
			want:    []summary{{id: "1", label: "one", key: "p256"}},
		},
		{
			name:    "public key alone, after",
			objects: []wire.Object{public(k.p256, "1", "one")},
			skips:   []string{none},
		},
		{
			name:    "certificate alone, before",
			objects: []wire.Object{cert(k.rsa, login, "1", "one")},
			hidden:  true,
			want:    []summary{{id: "1", label: "one", key: "rsa", certs: 1}},
		},
		{
			name:    "certificate alone, after",
			objects: []wire.Object{cert(k.rsa, login, "1", "one")},
			skips:   []string{none},
		},
		{
			name:    "private key that shows before",
			objects: []wire.Object{private(k.p256, "1", "one")},
			hidden:  true,
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, open: true}},
		},
		{
			name:    "private key that is public, after",
			objects: []wire.Object{with(private(k.p256, "1", "one"), func(o *wire.Object) { o.Private = wire.False })},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, open: true}},
		},
		{
			name:    "private key that does not say, after",
			objects: []wire.Object{with(private(k.p256, "1", "one"), func(o *wire.Object) { o.Private = wire.Unknown })},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true}},
		},
		{
			name:    "always authenticate",
			objects: []wire.Object{with(private(k.p256, "1", "one"), func(o *wire.Object) { o.AlwaysAuth = wire.True })},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, always: true}},
		},

		// Which belong together.
		{
			name: "one ID for keys of three types",
			objects: []wire.Object{
				bare(k.rsa, "1", "a"), bare(k.p256, "1", "a"), bare(k.ed, "1", "a"),
				public(k.ed, "1", "a"), public(k.rsa, "1", "a"), cert(k.p256, login, "1", "a"),
			},
			want: []summary{
				{id: "1", label: "a", key: "ed", visible: true},
				{id: "1", label: "a", key: "rsa", visible: true},
				{id: "1", label: "a", key: "p256", visible: true, certs: 1},
			},
		},
		{
			name: "one ID for two keys, told apart by label",
			objects: []wire.Object{
				public(k.p256, "1", "a"), public(k.other, "1", "b"),
				with(bare(k.other, "1", "b"), func(o *wire.Object) { o.AlwaysAuth = wire.True }), bare(k.p256, "1", "a"),
			},
			want: []summary{
				{id: "1", label: "a", key: "p256", visible: true},
				{id: "1", label: "b", key: "other", visible: true, always: true},
			},
		},
		{
			name: "one ID and label for two keys, told apart by what they show",
			objects: []wire.Object{
				public(k.p256, "1", "a"), public(k.other, "1", "a"),
				with(private(k.other, "1", "a"), func(o *wire.Object) { o.AlwaysAuth = wire.True }), private(k.p256, "1", "a"),
			},
			want: []summary{
				{id: "1", label: "a", key: "p256", visible: true},
				{id: "1", label: "a", key: "other", visible: true, always: true},
			},
		},
		{
			name:    "one ID for two private keys, one public half",
			objects: []wire.Object{public(k.p256, "1", "a"), bare(k.p256, "1", "a"), bare(k.other, "1", "a")},
			want:    []summary{{id: "1", label: "a", key: "p256", visible: true}},
			skips:   []string{"no public key or certificate"},
		},
		{
			name:    "one key under two IDs",
			objects: []wire.Object{private(k.p256, "1", "a"), private(k.p256, "2", "b"), public(k.p256, "2", "b")},
			want: []summary{
				{id: "2", label: "b", key: "p256", visible: true},
				{id: "1", label: "a", key: "p256", visible: true},
			},
		},
		{
			name:    "the same twice",
			objects: []wire.Object{private(k.p256, "1", "a"), public(k.p256, "1", "a"), private(k.p256, "1", "a"), public(k.p256, "1", "a")},
			want:    []summary{{id: "1", label: "a", key: "p256", visible: true}},
		},
		{
			name:    "two certificates of one key",
			objects: []wire.Object{private(k.p256, "1", "a"), cert(k.p256, login, "1", "a"), cert(k.p256, noUsage, "1", "b")},
			want:    []summary{{id: "1", label: "a", key: "p256", visible: true, certs: 2}},
		},
		{
			name:    "public key without an ID takes that of its private key",
			objects: []wire.Object{public(k.p256, "", "pub"), private(k.p256, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true}},
		},
		{
			name:    "certificate without an ID joins its key",
			objects: []wire.Object{cert(k.p256, login, "", "cert"), private(k.p256, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true, certs: 1}},
		},
		{
			name:    "no IDs, told apart by label",
			objects: []wire.Object{public(k.p256, "", "a"), public(k.other, "", "b"), bare(k.other, "", "b")},
			want:    []summary{{label: "b", key: "other", visible: true}},
			skips:   []string{none},
		},
		{
			name:    "an ID and none make one by the label",
			objects: []wire.Object{public(k.p256, "", "a"), bare(k.p256, "1", "a")},
			want:    []summary{{id: "1", label: "a", key: "p256", visible: true}},
		},
		{
			name:    "two IDs make one of the only two that are left",
			objects: []wire.Object{cert(k.p256, login, "2", "b"), bare(k.p256, "1", "a")},
			want:    []summary{{id: "1", label: "a", key: "p256", visible: true, certs: 1}},
		},
		{
			name:    "a certificate of one of two that are left",
			objects: []wire.Object{cert(k.p256, login, "2", "b"), bare(k.p256, "1", "a"), bare(k.p256, "3", "c")},
			want:    []summary{{id: "2", label: "b", key: "p256", visible: true, certs: 1}},
			skips:   []string{"no public key or certificate", "no public key or certificate"},
		},
		{
			name:    "label of the public key where the private has none",
			objects: []wire.Object{public(k.p256, "1", "pub"), private(k.p256, "1", "")},
			want:    []summary{{id: "1", label: "pub", key: "p256", visible: true}},
		},

		// Contradictions.
		{
			name:    "certificate of another key, after a login",
			objects: []wire.Object{cert(k.other, login, "1", "one"), public(k.p256, "1", "one"), bare(k.p256, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true}},
			skips:   []string{none},
		},
		{
			name:    "certificate of another key, before a login",
			objects: []wire.Object{cert(k.other, login, "1", "one"), public(k.p256, "1", "one")},
			hidden:  true,
			want: []summary{
				{id: "1", label: "one", key: "p256"},
				{id: "1", label: "one", key: "other", certs: 1},
			},
		},
		{
			name:    "public key object of another key",
			objects: []wire.Object{public(k.p256, "1", "one"), private(k.other, "1", "one"), cert(k.other, login, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "other", visible: true, certs: 1}},
			skips:   []string{none},
		},
		{
			name: "authority with the ID of the key that it vouches for",
			objects: []wire.Object{
				cert(k.other, authority, "1", "ca"), bare(k.p256, "1", "one"), cert(k.p256, login, "1", "one"),
			},
			want:  []summary{{id: "1", label: "one", key: "p256", visible: true, certs: 1}},
			skips: []string{none},
		},

		// What is not fit.
		{
			name:    "key for decryption",
			objects: []wire.Object{with(private(k.rsa, "1", "one"), func(o *wire.Object) { o.Sign = wire.False })},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true, unfit: "not for signing"}},
		},
		{
			name:    "key that does not say what for",
			objects: []wire.Object{with(private(k.rsa, "1", "one"), func(o *wire.Object) { o.Sign = wire.Unknown })},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true}},
		},
		{
			name:    "public key for encryption",
			objects: []wire.Object{with(public(k.rsa, "1", "one"), func(o *wire.Object) { o.Sign = wire.False })},
			hidden:  true,
			want:    []summary{{id: "1", label: "one", key: "rsa", unfit: "not for verifying"}},
		},
		{
			name:    "the private key knows better than the public",
			objects: []wire.Object{with(public(k.rsa, "1", "one"), func(o *wire.Object) { o.Sign = wire.False }), private(k.rsa, "1", "one")},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true}},
		},
		{
			name:    "certificate for encryption",
			objects: []wire.Object{public(k.rsa, "1", "one"), cert(k.rsa, encryption, "1", "one")},
			hidden:  true,
			want:    []summary{{id: "1", label: "one", key: "rsa", certs: 1, unfit: "not for signing"}},
		},
		{
			name:    "authority alone",
			objects: []wire.Object{cert(k.rsa, authority, "1", "ca")},
			hidden:  true,
			want:    []summary{{id: "1", label: "ca", key: "rsa", certs: 1, unfit: "authority"}},
		},
		{
			name:    "authority with its private key",
			objects: []wire.Object{cert(k.rsa, authority, "1", "ca"), private(k.rsa, "1", "ca")},
			want:    []summary{{id: "1", label: "ca", key: "rsa", visible: true, certs: 1, unfit: "authority"}},
		},
		{
			name:    "attestation key by label",
			objects: []wire.Object{private(k.rsa, "1", "Private key for PIV Attestation")},
			want:    []summary{{id: "1", label: "Private key for PIV Attestation", key: "rsa", visible: true, unfit: "attestation"}},
		},
		{
			name:    "attestation key by the label of its certificate alone",
			objects: []wire.Object{cert(k.rsa, login, "1", "X.509 Certificate for PIV Attestation")},
			hidden:  true,
			want:    []summary{{id: "1", label: "X.509 Certificate for PIV Attestation", key: "rsa", certs: 1, unfit: "attestation"}},
		},
		{
			name:    "key with a statement of a YubiKey about it",
			objects: []wire.Object{private(k.rsa, "1", "one"), cert(k.rsa, login, "1", "X.509 Certificate for PIV Attestation 9a")},
			want:    []summary{{id: "1", label: "one", key: "rsa", visible: true, certs: 1}},
		},
		{
			name:    "attestation key by slot",
			objects: []wire.Object{private(k.rsa, "\x19", "one")},
			token:   wire.TokenID{Manufacturer: "Yubico (www.yubico.com)"},
			want:    []summary{{id: "\x19", label: "one", key: "rsa", visible: true, unfit: "attestation"}},
		},

		// What is left out.
		{
			name:    "garbage for a certificate",
			objects: []wire.Object{private(k.p256, "1", "one"), {Class: wire.CKOCertificate, ID: []byte("1"), Value: []byte("garbage")}},
			want:    []summary{{id: "1", label: "one", key: "p256", visible: true}},
			skips:   []string{"read certificate"},
		},
		{
			name: "certificates that are cut off, empty or longer than they say",
			objects: []wire.Object{
				{Class: wire.CKOCertificate, ID: []byte("1"), Value: whole[:len(whole)-1]},
				{Class: wire.CKOCertificate, ID: []byte("1")},
				{Class: wire.CKOCertificate, ID: []byte("1"), Value: append(slices.Clone(whole), 0)},
			},
			hidden: true,
			skips:  []string{"read certificate", "read certificate", "read certificate"},
		},
		{
			name:    "certificates of keys without a use in SSH",
			objects: []wire.Object{x25519, ed448},
			hidden:  true,
			skips:   []string{"in this certificate cannot be used", "in this certificate cannot be used"},
		},
		{
			name:    "curve without a use in SSH",
			objects: []wire.Object{public(k.p224, "1", "one"), cert(k.p224, login, "1", "one")},
			hidden:  true,
			skips:   []string{"no use in SSH", "no use in SSH"},
		},
		{
			name:    "short RSA key",
			objects: []wire.Object{with(private(k.rsa, "1", "one"), func(o *wire.Object) { o.Modulus = o.Modulus[1:] })},
			skips:   []string{"an RSA key of"},
		},
		{
			name: "other types and classes",
			objects: []wire.Object{
				{Class: wire.CKOPrivateKey, KeyType: 0x41, ID: []byte("1")},
				{Class: wire.CKOPublicKey, KeyType: 0x41, ID: []byte("1")},
				{Class: 0, ID: []byte("1")}, // CKO_DATA
			},
			hidden: true,
			skips:  []string{"CKK 0x41", "CKK 0x41"},
		},
	}
}

func TestPair(t *testing.T) {
	for _, tt := range pairTests() {
		t.Run(tt.name, func(t *testing.T) {
			var skips []string
			got := Find(tt.objects, Options{Token: tt.token, Hidden: tt.hidden, Skip: func(_ wire.Object, reason error) { skips = append(skips, reason.Error()) }}).Pairs
			if len(got) != len(tt.want) {
				t.Fatalf("%d keys, want %d; skipped: %q", len(got), len(tt.want), skips)
			}
			for i, p := range got {
				s := summary{
					id: string(p.ID), label: p.Label, key: testRing().name(p.Public),
					visible: p.Visible, open: p.Open, always: p.Always, certs: len(p.Certificates), unfit: p.Unfit,
				}
				if w := tt.want[i].unfit; w != "" && strings.Contains(s.unfit, w) {
					s.unfit = w
				}
				if s != tt.want[i] {
					t.Errorf("key %d: got %+v, want %+v", i, s, tt.want[i])
				}
				checkPair(t, p, tt.objects, tt.hidden)
			}
			if len(skips) != len(tt.skips) {
				t.Fatalf("skipped %q, want %q", skips, tt.skips)
			}
			for i, s := range skips {
				if !strings.Contains(s, tt.skips[i]) {
					t.Errorf("skipped as %q, want %q", s, tt.skips[i])
				}
			}
		})
	}
}

// A URI may name any label and any class of a key's objects.
func TestPairKeepsLabelsAndClasses(t *testing.T) {
	k := testRing()
	got := Find([]wire.Object{
		cert(k.p256, login, "1", "cert"), private(k.p256, "1", "private"), public(k.p256, "1", "public"),
	}, Options{Skip: func(_ wire.Object, reason error) { t.Error(reason) }}).Pairs
	if len(got) != 1 {
		t.Fatalf("%d keys, want 1", len(got))
	}
	id := []byte("1")
	want := []Member{
		{wire.CKOPublicKey, Name{id, "public"}}, {wire.CKOPrivateKey, Name{id, "private"}}, {wire.CKOCertificate, Name{id, "cert"}},
	}
	if diff := cmp.Diff(want, got[0].Members); diff != "" {
		t.Errorf("members:\n%s", diff)
	}
}

// checkPair checks what holds for each pair.
func checkPair(t *testing.T, p *Pair, objects []wire.Object, hidden bool) {
	t.Helper()
	if err := Usable(p.Public); err != nil {
		t.Errorf("unusable: %v", err)
	}
	if _, err := ssh.NewPublicKey(p.Public); err != nil {
		t.Errorf("no key of SSH: %v", err)
	}
	if kind, ok := KeyType(p.Public); !ok || kind != p.KeyType {
		t.Errorf("a %T of type %#x", p.Public, p.KeyType)
	}
	if (len(p.Modulus) > 0) == (len(p.Point) > 0) {
		t.Errorf("modulus %x and point %x, want one of them", p.Modulus, p.Point)
	}
	some := func(what string, fits func(o wire.Object) bool) {
		t.Helper()
		if !slices.ContainsFunc(objects, fits) {
			t.Errorf("no object on the token is %s", what)
		}
	}
	if p.Visible {
		some("its private key", func(o wire.Object) bool { return o.Class == wire.CKOPrivateKey && o.KeyType == p.KeyType })
	} else if !hidden {
		t.Error("a key without its private key")
	}
	if p.Open {
		some("private and open", func(o wire.Object) bool {
			return o.Class == wire.CKOPrivateKey && (hidden || o.Private == wire.False)
		})
	}
	if p.Always {
		some("private and always to authenticate", func(o wire.Object) bool {
			return o.Class == wire.CKOPrivateKey && o.AlwaysAuth == wire.True
		})
	}
	for _, c := range p.Certificates {
		if c, err := x509.ParseCertificate(c.DER); err != nil || !Equal(c.PublicKey, p.Public) {
			t.Errorf("a certificate of another key (%v)", err)
		}
	}
}

// A token may be full, and its module may lie. To compare each key with each as
// numbers copies both each time, so the work shows in what is allocated.
func TestPairManyObjects(t *testing.T) {
	const pairs, same = 4000, 1000 // and two objects of each
	k := testRing()
	id := func(i int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(i)) }
	modulus := func(i int) []byte {
		// The differences are in the end, where comparing comes last.
		return append(bytes.Repeat([]byte{0xc3}, 252), id(i)...)
	}
	point := func(i int) []byte { return append(make([]byte, 28), id(i)...) }

	var objects []wire.Object
	for i := range pairs {
		o := with(public(k.rsa, "", "many"), func(o *wire.Object) { o.ID, o.Modulus = id(i), modulus(i) })
		objects = append(objects, o)
	}
	for i := range pairs {
		o := with(private(k.rsa, "", "many"), func(o *wire.Object) { o.ID, o.Modulus = id(pairs-1-i), modulus(pairs-1-i) })
		objects = append(objects, o)
	}
	for i := range same {
		objects = append(objects, bare(k.ed, "same", "same"))
		objects = append(objects, with(public(k.ed, "same", "same"), func(o *wire.Object) { o.ECPoint = point(i) }))
	}
	if len(objects) != 10_000 {
		t.Fatalf("%d objects", len(objects))
	}

	var got []*Pair
	allocs := testing.AllocsPerRun(1, func() {
		got = Find(objects, Options{Skip: func(_ wire.Object, reason error) { t.Error(reason) }}).Pairs
	})
	if most := 100 * len(objects); allocs > float64(most) {
		t.Errorf("%.0f allocations, want %d at most", allocs, most)
	}
	if len(got) != pairs+same {
		t.Fatalf("%d keys, want %d", len(got), pairs+same)
	}
	for i, p := range got {
		if !p.Visible || len(p.Members) != 2 {
			t.Fatalf("key %d: visible %v, %d members", i, p.Visible, len(p.Members))
		}
		if i < pairs && (!bytes.Equal(p.ID, id(i)) || !bytes.Equal(p.Modulus, modulus(i))) {
			t.Fatalf("key %d has ID %x and modulus …%x", i, p.ID, p.Modulus[len(p.Modulus)-4:])
		}
		if i >= pairs && !bytes.Equal(p.Point, point(i-pairs)) {
			t.Fatalf("key %d has point %x", i, p.Point)
		}
	}
}

func TestPublicKey(t *testing.T) {
	k := testRing()
	const read, use = "read", "use" // the function that refuses the key
	rsaKey := func(modulus, exponent []byte) wire.Object {
		return wire.Object{KeyType: wire.CKKRSA, Modulus: modulus, Exponent: exponent}
	}
	bits := func(n int) []byte {
		i := new(big.Int).Lsh(big.NewInt(1), uint(n-1))
		return i.SetBit(i, 0, 1).Bytes()
	}
	ec := func(params, point []byte) wire.Object {
		return wire.Object{KeyType: wire.CKKEC, ECParams: params, ECPoint: point}
	}
	ed := func(params, point []byte) wire.Object {
		return wire.Object{KeyType: wire.CKKECEdwards, ECParams: params, ECPoint: point}
	}
	n, e := k.rsa.N.Bytes(), []byte{1, 0, 1}
	p := must(k.p256.PublicKey.Bytes())
	p256 := der(OIDP256)
	compressed := elliptic.MarshalCompressed(elliptic.P256(), k.p256.X, k.p256.Y) //nolint:staticcheck // there is no other way to make one
	off := slices.Clone(p)
	off[len(off)-1] ^= 1
	hybrid := slices.Clone(p)
	hybrid[0] = 6 + p[len(p)-1]&1
	q := k.ed.Public().(ed25519.PublicKey)
	params := der(OIDEd25519)
	// A raw point that has the form of an OCTET STRING is still a raw point.
	likeDER := append([]byte{4, 30}, make([]byte, 30)...)

	tests := []struct {
		name    string
		object  wire.Object
		want    crypto.PublicKey // nil: any key
		refused string
	}{
		{"RSA", rsaKey(n, e), k.rsa.Public(), ""},
		{"RSA with leading zeros", rsaKey(append([]byte{0, 0}, n...), append([]byte{0, 0, 0, 0, 0, 0}, e...)), k.rsa.Public(), ""},
		{"RSA without a modulus", rsaKey(nil, e), nil, read},
		{"RSA without an exponent", rsaKey(n, nil), nil, read},
		{"RSA of modulus 0", rsaKey([]byte{0, 0}, e), nil, use},
		{"RSA of 1024 bits", rsaKey(bits(1024), e), nil, use},
		{"RSA of 2047 bits", rsaKey(bits(2047), e), nil, use},
		{"RSA of 2047 bits with leading zeros", rsaKey(append([]byte{0}, bits(2047)...), e), nil, use},
		{"RSA of 2048 bits", rsaKey(bits(2048), e), nil, ""},
		{"RSA of 16384 bits", rsaKey(bits(16384), e), nil, ""},
		{"RSA of 16385 bits", rsaKey(bits(16385), e), nil, use},
		{"RSA exponent 0", rsaKey(n, []byte{0}), nil, use},
		{"RSA exponent 1", rsaKey(n, []byte{1}), nil, use},
		{"RSA exponent 2", rsaKey(n, []byte{2}), nil, use},
		{"RSA exponent 3", rsaKey(n, []byte{3}), nil, ""},
		{"RSA exponent 65536", rsaKey(n, []byte{1, 0, 0}), nil, use},
		{"RSA exponent 2^31-1", rsaKey(n, []byte{0x7f, 0xff, 0xff, 0xff}), nil, ""},
		{"RSA exponent 2^31+1", rsaKey(n, []byte{0x80, 0, 0, 1}), nil, read},
		{"RSA exponent 2^64+3", rsaKey(n, []byte{1, 0, 0, 0, 0, 0, 0, 0, 3}), nil, read},

		{"P-256", ec(p256, der(p)), k.p256.Public(), ""},
		{"P-384", ec(der(OIDP384), der(must(k.p384.PublicKey.Bytes()))), k.p384.Public(), ""},
		{"P-521", ec(der(OIDP521), der(must(k.p521.PublicKey.Bytes()))), k.p521.Public(), ""},
		{"EC point as it is", ec(p256, p), k.p256.Public(), ""},
		{"EC point in a BIT STRING", ec(p256, der(asn1.BitString{Bytes: p, BitLength: 8 * len(p)})), k.p256.Public(), ""},
		{"EC point in a BIT STRING with bits to spare", ec(p256, der(asn1.BitString{Bytes: p, BitLength: 8*len(p) - 1})), nil, read},
		{"EC point in two OCTET STRINGs", ec(p256, der(der(p))), nil, read},
		{"EC point with a trailing byte", ec(p256, append(der(p), 0)), nil, read},
		{"EC point, raw, with a trailing byte", ec(p256, append(slices.Clone(p), 0)), nil, read},
		{"EC point one byte short", ec(p256, der(p[:len(p)-1])), nil, read},
		{"no EC point", ec(p256, nil), nil, read},
		{"empty EC point", ec(p256, der([]byte{})), nil, read},
		{"EC point at infinity", ec(p256, der([]byte{0})), nil, read},
		{"EC point, compressed", ec(p256, der(compressed)), nil, read},
		{"EC point, compressed and raw", ec(p256, compressed), nil, read},
		{"EC point, hybrid", ec(p256, der(hybrid)), nil, read},
		{"EC point not on the curve", ec(p256, der(off)), nil, read},
		{"EC point of another curve", ec(p256, der(must(k.p384.PublicKey.Bytes()))), nil, read},
		{"no curve", ec(nil, der(p)), nil, read},
		{"curve by a printable name", ec(der("secp256r1", "printable"), der(p)), nil, read},
		{"curve in parameters", ec(der(struct{ Version int }{1}), der(p)), nil, read},
		{"curve of the authority", ec([]byte{5, 0}, der(p)), nil, read}, // implicitlyCA
		{"curve with a trailing byte", ec(append(slices.Clone(p256), 0), der(p)), nil, read},
		{"curve P-224", ec(der(oidP224), der(must(k.p224.PublicKey.Bytes()))), nil, read},
		{"curve secp256k1", ec(der(asn1.ObjectIdentifier{1, 3, 132, 0, 10}), der(p)), nil, read},

		{"Ed25519", ed(params, der([]byte(q))), q, ""},
		{"Ed25519 by its printable name", ed(der("edwards25519", "printable"), der([]byte(q))), q, ""},
		{"Ed25519 by its name in capitals", ed(der("EDWARDS25519", "printable"), der([]byte(q))), q, ""},
		{"Ed25519 by its other name", ed(der("Ed25519", "printable"), der([]byte(q))), q, ""},
		{"Ed25519 by its name in UTF-8", ed(der("edwards25519", "utf8"), der([]byte(q))), q, ""}, // encoding/asn1 takes it for a PrintableString
		{"Ed25519 by the OID of GnuPG", ed(der(OIDEdwards25519), der([]byte(q))), q, ""},
		{"Ed25519 point as it is", ed(params, q), q, ""},
		{"Ed25519 point in a BIT STRING", ed(params, der(asn1.BitString{Bytes: q, BitLength: 256})), q, ""},
		{"Ed25519 point that looks like an OCTET STRING", ed(params, likeDER), ed25519.PublicKey(likeDER), ""},
		{"Ed25519 point of 31 bytes", ed(params, der([]byte(q[:31]))), nil, read},
		{"Ed25519 point of 33 bytes", ed(params, der(append([]byte{0x40}, q...))), nil, read},
		{"no Ed25519 point", ed(params, nil), nil, read},
		{"no Edwards curve", ed(nil, der([]byte(q))), nil, read},
		{"Edwards curve with a trailing byte", ed(append(slices.Clone(params), 0), der([]byte(q))), nil, read},
		{"Ed448", ed(der(asn1.ObjectIdentifier{1, 3, 101, 113}), der(make([]byte, 57))), nil, read},
		{"Ed448 by its name", ed(der("edwards448", "printable"), der(make([]byte, 57))), nil, read},
		{"Ed448 with a point of Ed25519", ed(der("edwards448", "printable"), der([]byte(q))), nil, read},
		{"P-256 as an Edwards curve", ed(p256, der([]byte(q))), nil, read},

		{"type of another key", wire.Object{KeyType: 0x41, ECParams: params, ECPoint: der([]byte(q))}, nil, read},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := PublicKey(tt.object)
			if (err != nil) != (tt.refused == read) {
				t.Fatalf("read: %v", err)
			}
			if err != nil {
				return
			}
			if err := Usable(got); (err != nil) != (tt.refused == use) {
				t.Errorf("use: %v", err)
			}
			if tt.want != nil && !Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// What a key is made of is the module's own memory no more.
func TestPublicKeyIsACopy(t *testing.T) {
	k := testRing()
	for _, s := range []crypto.Signer{k.rsa, k.p256, k.ed} {
		for _, raw := range []bool{false, true} {
			o := public(s, "1", "one")
			if pub, ok := s.Public().(ed25519.PublicKey); ok && raw {
				o.ECPoint = slices.Clone(pub)
			}
			got := must(PublicKey(o))
			clear(o.Modulus)
			clear(o.Exponent)
			clear(o.ECPoint)
			if !Equal(got, s.Public()) {
				t.Errorf("%T changed with its object", got)
			}
		}
	}
}

func TestPoints(t *testing.T) {
	raw := []byte{4, 5, 6}
	tests := []struct {
		name string
		give []byte
		want [][]byte
	}{
		{"raw", raw, [][]byte{raw}},
		{"OCTET STRING", der(raw), [][]byte{raw, der(raw)}},
		{"BIT STRING", []byte{3, 4, 0, 4, 5, 6}, [][]byte{raw, {3, 4, 0, 4, 5, 6}}},
		{"BIT STRING with bits to spare", []byte{3, 4, 1, 4, 5, 6}, [][]byte{{3, 4, 1, 4, 5, 6}}},
		{"OCTET STRING and more", append(der(raw), 0), [][]byte{append(der(raw), 0)}},
		{"OCTET STRING cut off", der(raw)[:4], [][]byte{der(raw)[:4]}},
		{"length not in its shortest form", []byte{4, 0x81, 3, 4, 5, 6}, [][]byte{{4, 0x81, 3, 4, 5, 6}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := Points(tt.give); !slices.EqualFunc(got, tt.want, bytes.Equal) {
				t.Errorf("got %x, want %x", got, tt.want)
			}
		})
	}
}

func TestObjectsNamedCurve(t *testing.T) {
	for _, c := range []struct {
		oid  asn1.ObjectIdentifier
		want elliptic.Curve
	}{{OIDP256, elliptic.P256()}, {OIDP384, elliptic.P384()}, {OIDP521, elliptic.P521()}, {oidP224, nil}, {OIDEd25519, nil}} {
		got, err := namedCurve(der(c.oid))
		if got != c.want || (err == nil) != (c.want != nil) {
			t.Errorf("%v: got %v, %v; want %v", c.oid, got, err, c.want)
		}
	}
}

// explicitCurve gives a curve by its numbers.
type explicitCurve struct {
	Version int
	Field   struct {
		Type  asn1.ObjectIdentifier
		Prime *big.Int
	}
	Curve    struct{ A, B []byte }
	Base     []byte
	Order    *big.Int
	Cofactor *big.Int
}

func explicit(c *elliptic.CurveParams) (e explicitCurve) {
	size := (c.BitSize + 7) / 8
	e.Version, e.Field.Type, e.Field.Prime, e.Order, e.Cofactor = 1, oidPrimeField, new(big.Int).Set(c.P), new(big.Int).Set(c.N), big.NewInt(1)
	e.Curve.A = new(big.Int).Sub(c.P, big.NewInt(3)).FillBytes(make([]byte, size))
	e.Curve.B = c.B.FillBytes(make([]byte, size))
	e.Base = slices.Concat([]byte{4}, c.Gx.FillBytes(make([]byte, size)), c.Gy.FillBytes(make([]byte, size)))
	return e
}

// A curve is also known by all its numbers, and by nothing less.
func TestObjectsExplicitCurve(t *testing.T) {
	curves := []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}
	for _, curve := range curves {
		if got, err := namedCurve(der(explicit(curve.Params()))); got != curve || err != nil {
			t.Errorf("%s: got %v, %v", curve.Params().Name, got, err)
		}
		for name, change := range map[string]func(e *explicitCurve){
			"prime":     func(e *explicitCurve) { e.Field.Prime.Add(e.Field.Prime, big.NewInt(2)) },
			"field":     func(e *explicitCurve) { e.Field.Type = OIDP256 },
			"a":         func(e *explicitCurve) { e.Curve.A[0] ^= 1 },
			"b":         func(e *explicitCurve) { e.Curve.B[0] ^= 1 },
			"base":      func(e *explicitCurve) { e.Base[len(e.Base)-1] ^= 1 },
			"no base":   func(e *explicitCurve) { e.Base = nil },
			"order":     func(e *explicitCurve) { e.Order.Sub(e.Order, big.NewInt(1)) },
			"cofactor":  func(e *explicitCurve) { e.Cofactor = big.NewInt(2) },
			"prime < 0": func(e *explicitCurve) { e.Field.Prime.Neg(e.Field.Prime) },
		} {
			e := explicit(curve.Params())
			change(&e)
			if got, err := namedCurve(der(e)); got != nil || err == nil {
				t.Errorf("%s with another %s is taken for %v", curve.Params().Name, name, got)
			}
		}
		whole := der(explicit(curve.Params()))
		if got, err := namedCurve(append(whole, 0)); err == nil {
			t.Errorf("with a byte after it: %v", got)
		}
	}
	if got, err := namedCurve(der(explicit(elliptic.P224().Params()))); err == nil {
		t.Errorf("P-224: %v", got)
	}
	// As OpenSSL writes it, with the seed.
	written, err := hex.DecodeString(
		"3081f7020101302c06072a8648ce3d0101022100ffffffff00000001000000000000000000000000ffffffffffffffffffff" +
			"ffff305b0420ffffffff00000001000000000000000000000000fffffffffffffffffffffffc04205ac635d8aa3a93e7b3eb" +
			"bd55769886bc651d06b0cc53b0f63bce3c3e27d2604b031500c49d360886e704936a6678e1139d26b7819f7e900441046b17" +
			"d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c2964fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce3357" +
			"6b315ececbb6406837bf51f5022100ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551020101")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := namedCurve(written); got != elliptic.P256() {
		t.Errorf("OpenSSL's P-256: %v, %v", got, err)
	}
}

func TestObjectsUsableKey(t *testing.T) {
	k := testRing()
	for _, s := range []crypto.Signer{k.rsa, k.p256, k.p384, k.p521, k.ed} {
		if err := Usable(s.Public()); err != nil {
			t.Errorf("%T: %v", s.Public(), err)
		}
	}
	if err := Usable(k.p224.Public()); err == nil {
		t.Error("a key of P-224 is usable")
	}
}

func TestObjectsDigest(t *testing.T) {
	k := testRing()
	n := k.rsa.N
	keys := []crypto.PublicKey{
		k.rsa.Public(), &rsa.PublicKey{N: n, E: 3}, &rsa.PublicKey{N: new(big.Int).Rsh(n, 8), E: k.rsa.E},
		k.p256.Public(), k.other.Public(), k.p384.Public(), k.ed.Public(), ed25519.PublicKey(make([]byte, 32)),
	}
	for i, a := range keys {
		for j, b := range keys {
			if (Digest(a) == Digest(b)) != (i == j) {
				t.Errorf("keys %d and %d: same digest is %v", i, j, i != j)
			}
		}
	}
	if Digest(&rsa.PublicKey{N: new(big.Int).Set(n), E: k.rsa.E}) != Digest(k.rsa.Public()) {
		t.Error("a copy has another digest")
	}
}

func TestObjectsAuthority(t *testing.T) {
	k := testRing()
	ca := cert(k.p256, authority, "1", "ca")
	tests := []struct {
		name   string
		object wire.Object
		want   bool
	}{
		{"authority", ca, true},
		{"login", cert(k.p256, login, "1", "one"), false},
		{"public key", with(ca, func(o *wire.Object) { o.Class = wire.CKOPublicKey }), false},
		{"cut off", with(ca, func(o *wire.Object) { o.Value = o.Value[:len(o.Value)/2] }), false},
		{"nothing", wire.Object{Class: wire.CKOCertificate}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := IsAuthority(tt.object); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestObjectsUnfitCertificate(t *testing.T) {
	tests := []struct {
		name string
		cert x509.Certificate
		want string // a piece of it; empty: fit
	}{
		{"no usage", x509.Certificate{}, ""},
		{"signature", x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature}, ""},
		{"commitment", x509.Certificate{KeyUsage: x509.KeyUsageContentCommitment}, ""},
		{"signature and encryption", x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment}, ""},
		{"encryption", x509.Certificate{KeyUsage: x509.KeyUsageKeyEncipherment}, "not for signing"},
		{"agreement", x509.Certificate{KeyUsage: x509.KeyUsageKeyAgreement}, "not for signing"},
		{"authority", x509.Certificate{IsCA: true}, "authority"},
		{"authority that signs", x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageDigitalSignature}, "authority"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := unfitCertificate(&tt.cert)
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestObjectsAttestation(t *testing.T) {
	yubico := "Yubico (www.yubico.com)"
	tests := []struct {
		name         string
		pair         Pair
		manufacturer string
		want         bool
	}{
		{"slot of a YubiKey", Pair{ID: []byte{0x19}}, yubico, true},
		{"another slot", Pair{ID: []byte{0x01}}, yubico, false},
		{"longer ID", Pair{ID: []byte{0x19, 0}}, yubico, false},
		{"no ID", Pair{}, yubico, false},
		{"slot of another maker", Pair{ID: []byte{0x19}}, "piv_II", false},
		{"label", Pair{Members: []Member{{wire.CKOPublicKey, Name{Label: ""}}, {wire.CKOPrivateKey, Name{Label: "PIV ATTESTATION"}}}}, "piv_II", true},
		{"label of a lone certificate", Pair{Members: []Member{{wire.CKOCertificate, Name{Label: "PIV Attestation"}}}}, "piv_II", true},
		{"label of a certificate beside a key", Pair{Members: []Member{{wire.CKOCertificate, Name{Label: "PIV Attestation"}}, {wire.CKOPublicKey, Name{Label: "x"}}}}, "piv_II", false},
		{"other labels", Pair{Members: []Member{{wire.CKOPublicKey, Name{Label: "test"}}, {wire.CKOPrivateKey, Name{Label: "attest"}}}}, "piv_II", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.pair.isAttestation(wire.TokenID{Manufacturer: tt.manufacturer}); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// maxFuzzObjects is the most that split makes, to keep the fuzzer fast.
const maxFuzzObjects = 64

// encode writes objects as split reads them: class, type and flags in a byte each,
// and the rest with its length in two.
func encode(objects []wire.Object) []byte {
	var b []byte
	for _, o := range objects {
		b = append(b, byte(o.Class), byte(o.KeyType), byte(o.Sign)|byte(o.Private)<<2|byte(o.AlwaysAuth)<<4)
		for _, field := range [][]byte{o.ID, []byte(o.Label), o.Modulus, o.Exponent, o.ECParams, o.ECPoint, o.Value} {
			b = binary.BigEndian.AppendUint16(b, uint16(len(field)))
			b = append(b, field...)
		}
	}
	return b
}

// split makes objects of any bytes.
func split(b []byte) []wire.Object {
	var objects []wire.Object
	next := func() []byte {
		if len(b) < 2 {
			b = nil
			return nil
		}
		n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
		field := b[2 : 2+n]
		b = b[2+n:]
		return field
	}
	for len(b) >= 3 && len(objects) < maxFuzzObjects {
		o := wire.Object{
			Class: uint64(b[0]), KeyType: uint64(b[1]),
			Sign: wire.Tri(b[2] & 3 % 3), Private: wire.Tri(b[2] >> 2 & 3 % 3), AlwaysAuth: wire.Tri(b[2] >> 4 & 3 % 3),
		}
		b = b[3:]
		o.ID, o.Label = next(), string(next())
		o.Modulus, o.Exponent, o.ECParams, o.ECPoint, o.Value = next(), next(), next(), next(), next()
		objects = append(objects, o)
	}
	return objects
}

// FuzzObjects lets a token show any objects.
func FuzzObjects(f *testing.F) {
	seeds := 0
	for _, tt := range pairTests() {
		objects := tt.objects
		b := encode(objects)
		if got := split(b); !bytes.Equal(encode(got), b) || len(got) != len(objects) {
			f.Fatalf("%s: the seed is not what it was made of", tt.name)
		}
		f.Add(b, tt.token.Manufacturer, tt.hidden)
		seeds += len(Find(split(b), Options{Token: tt.token, Hidden: tt.hidden}).Pairs)
	}
	if seeds == 0 {
		f.Fatal("no seed with a key")
	}
	f.Fuzz(func(t *testing.T, b []byte, manufacturer string, hidden bool) {
		objects := split(b)
		before := encode(objects)
		got := Find(objects, Options{Token: wire.TokenID{Manufacturer: manufacturer}, Hidden: hidden, Skip: func(_ wire.Object, reason error) {
			if reason == nil {
				t.Error("Skip gets no reason")
			}
		}}).Pairs
		if !bytes.Equal(encode(objects), before) {
			t.Error("the objects were changed")
		}
		seen := make(map[string]bool)
		visible := 0
		for _, k := range got {
			checkPair(t, k, objects, hidden)
			if k.Visible {
				visible++
			}
			name := fmt.Sprintf("%x %#x %x", k.ID, k.KeyType, Digest(k.Public))
			if seen[name] {
				t.Errorf("two keys %s", name)
			}
			seen[name] = true
		}
		private := 0
		for _, o := range objects {
			if o.Class == wire.CKOPrivateKey {
				private++
			}
		}
		if visible > private {
			t.Errorf("%d private keys, of %d objects", visible, private)
		}
	})
}
