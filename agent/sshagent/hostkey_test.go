package sshagent

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// hostMLDSA is a public key of type ssh-mldsa44-ed25519@openssh.com, which OpenSSH
// 10.5's ssh-keygen has made. Nothing here knows that type.
//
//go:embed testdata/mldsa44-ed25519.pub
var hostMLDSA string

func mldsa(t testing.TB) []byte {
	t.Helper()
	blob, err := base64.StdEncoding.DecodeString(strings.Fields(hostMLDSA)[1])
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// A fidoKey is a host key on a FIDO device. It signs with these flags. Bit 0 says that a
// person has touched the device (OpenSSH's PROTOCOL.u2f).
type fidoKey struct {
	private crypto.Signer
	public  ssh.PublicKey
	flags   byte
	// of is the application that it signs for.
	of string
}

func newFIDOKey(t testing.TB, kind string, flags byte) *fidoKey {
	t.Helper()
	k := &fidoKey{flags: flags, of: "ssh:"}
	var blob []byte
	switch kind {
	case ssh.KeyAlgoSKED25519:
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		k.private, blob = private, encode(kind, []byte(public), k.of)
	case ssh.KeyAlgoSKECDSA256:
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point, err := private.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		k.private, blob = private, encode(kind, "nistp256", point, k.of)
	}
	var err error
	if k.public, err = ssh.ParsePublicKey(blob); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *fidoKey) PublicKey() ssh.PublicKey { return k.public }

func (k *fidoKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	rest := []byte{k.flags, 0x12, 0x34, 0x56, 0x78}
	of, message := sha256.Sum256([]byte(k.of)), sha256.Sum256(data)
	signed := slices.Concat(of[:], rest, message[:])
	sig := &ssh.Signature{Format: k.public.Type(), Rest: rest}
	var err error
	switch private := k.private.(type) {
	case ed25519.PrivateKey:
		sig.Blob = ed25519.Sign(private, signed)
	case *ecdsa.PrivateKey:
		digest := sha256.Sum256(signed)
		var rs struct{ R, S *big.Int }
		rs.R, rs.S, err = ecdsa.Sign(rand.Reader, private, digest[:])
		sig.Blob = ssh.Marshal(rs)
	}
	return sig, err
}

// A host with a FIDO key binds a connection, with or without a touch. A signature that does
// not match the key binds none.
func TestBindFIDO(t *testing.T) {
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		for name, test := range map[string]struct {
			flags  byte
			change func(*fidoKey, *ssh.Signature)
			want   bool
		}{
			"touched":             {1, nil, true},
			"not touched":         {0, nil, true},
			"verified":            {5, nil, true},
			"other flags":         {0, func(_ *fidoKey, s *ssh.Signature) { s.Rest[0] = 1 }, false},
			"another counter":     {1, func(_ *fidoKey, s *ssh.Signature) { s.Rest[4]++ }, false},
			"no counter":          {1, func(_ *fidoKey, s *ssh.Signature) { s.Rest = s.Rest[:1] }, false},
			"bytes left over":     {1, func(_ *fidoKey, s *ssh.Signature) { s.Rest = append(s.Rest, 0) }, false},
			"another signature":   {1, func(_ *fidoKey, s *ssh.Signature) { s.Blob[len(s.Blob)-1] ^= 1 }, false},
			"no signature":        {1, func(_ *fidoKey, s *ssh.Signature) { s.Blob = nil }, false},
			"another algorithm":   {1, func(_ *fidoKey, s *ssh.Signature) { s.Format = ssh.KeyAlgoED25519 }, false},
			"another application": {1, func(k *fidoKey, _ *ssh.Signature) { k.of = "web:" }, false},
		} {
			t.Run(kind+", "+name, func(t *testing.T) {
				k := newFIDOKey(t, kind, test.flags)
				sig, err := k.Sign(rand.Reader, []byte("session"))
				if err != nil {
					t.Fatal(err)
				}
				if test.change != nil {
					test.change(k, sig)
					if k.of != "ssh:" {
						if sig, err = k.Sign(rand.Reader, []byte("session")); err != nil {
							t.Fatal(err)
						}
					}
				}
				checkBind(t, bindMessage(k.public.Marshal(), "session", ssh.Marshal(sig), false), test.want)
			})
		}
	}
}

// checkBind sends a bind for logging in. If the bind fails, the connection counts as
// forwarded.
func checkBind(t *testing.T, bind []byte, want bool) {
	t.Helper()
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	conn := r.dial()
	answer := ask(t, conn, bind)[0]
	ask(t, conn, message(18, "key"))
	c := keyring.noted()[0].caller
	if bound := len(c.Binds) == 1; (answer[0] == msgSuccess) != want || bound != want || c.BindFailed == want || c.Forwarded == want {
		t.Errorf("answer %d, binds %d, failed: %v, forwarded: %v, want it to be bound: %v", answer[0], len(c.Binds), c.BindFailed, c.Forwarded, want)
	}
}

// The door refuses a bind with a certificate that OpenSSH does not read.
func TestBindCertificate(t *testing.T) {
	authority, other := newHost(t), newHost(t)
	fido := newFIDOKey(t, ssh.KeyAlgoSKED25519, 0)
	sign := func(s ssh.Signer) func(testing.TB, *ssh.Certificate) {
		return func(t testing.TB, c *ssh.Certificate) {
			if err := c.SignCert(rand.Reader, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		kind       uint32
		principals []string
		sign       func(testing.TB, *ssh.Certificate)
		want       bool
	}{
		"right":               {ssh.HostCert, []string{"a"}, sign(authority), true},
		"of a FIDO authority": {ssh.HostCert, []string{"a"}, sign(fido), true},
		"without principals":  {ssh.HostCert, nil, sign(authority), true},
		"many principals":     {ssh.HostCert, slices.Repeat([]string{"a"}, 256), sign(authority), true},
		"one more":            {ssh.HostCert, slices.Repeat([]string{"a"}, 257), sign(authority), false},
		"NUL in a principal":  {ssh.HostCert, []string{"a\x00b"}, sign(authority), false},
		"another kind":        {3, []string{"a"}, sign(authority), false},
		"changed afterwards": {ssh.HostCert, []string{"a"}, func(t testing.TB, c *ssh.Certificate) {
			sign(authority)(t, c)
			c.ValidPrincipals = []string{"b"}
		}, false},
		"of another authority": {ssh.HostCert, []string{"a"}, func(t testing.TB, c *ssh.Certificate) {
			sign(other)(t, c)
			c.SignatureKey = authority.PublicKey()
		}, false},
		"a signature of nothing": {ssh.HostCert, []string{"a"}, func(t testing.TB, c *ssh.Certificate) {
			sign(authority)(t, c)
			c.Signature = &ssh.Signature{Format: ssh.KeyAlgoED25519}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			cert := &ssh.Certificate{Key: h.PublicKey(), CertType: test.kind, ValidPrincipals: test.principals, ValidBefore: ssh.CertTimeInfinity}
			test.sign(t, cert)
			sig, err := h.Sign(rand.Reader, []byte("session"))
			if err != nil {
				t.Fatal(err)
			}
			checkBind(t, bindMessage(cert.Marshal(), "session", ssh.Marshal(sig), false), test.want)
		})
	}
}

// A key of an unknown type proves nothing. The agent compares it with others by its bytes.
func TestUnknownKeys(t *testing.T) {
	blob := mldsa(t)
	key, err := parseAnyKey(blob, maxHostKey)
	if err != nil {
		t.Fatal(err)
	}
	if key.Type() != "ssh-mldsa44-ed25519@openssh.com" || !bytes.Equal(key.Marshal(), blob) || key.Verify(nil, &ssh.Signature{}) == nil {
		t.Errorf("%+v", key)
	}
	checkBind(t, bindMessage(blob, "session", encode("ssh-mldsa44-ed25519@openssh.com", "signature"), false), false)

	known := makeSigners()[0].PublicKey().Marshal()
	c, err := parseConstraints(&reader{rest: destinationsOf(encodeDestination(encodeHop("", ""), encodeHop("", "h", blob, false, known, false, blob, true)))}, true)
	if err != nil {
		t.Fatal(err)
	}
	keys := c.Destinations[0].To.Keys
	if len(keys) != 3 || !bytes.Equal(keys[0].Key.Marshal(), blob) || !bytes.Equal(keys[1].Key.Marshal(), known) || !keys[2].CA {
		t.Errorf("host keys %+v", keys)
	}
	for name, blob := range map[string][]byte{
		"a known type":             encode("ssh-ed25519", "short"),
		"a known FIDO type":        encode(ssh.KeyAlgoSKED25519, "short", "ssh:"),
		"a known certificate type": encode(ssh.CertAlgoED25519v01, "short"),
		"nothing but a type":       encode("ssh-nothing"),
		"no type":                  encode("", "x"),
		"an odd type":              encode("ssh nothing", "x"),
		"a long type":              encode(strings.Repeat("x", 65), "x"),
		"a type cut short":         {0, 0, 0, 9, 'x'},
		"nothing":                  nil,
	} {
		if k, err := parseAnyKey(blob, maxHostKey); err == nil {
			t.Errorf("%s is read as %+v", name, k)
		}
	}
}

// FuzzAnyKey checks that a key of an unknown type keeps the bytes of the input.
func FuzzAnyKey(f *testing.F) {
	f.Add(mldsa(f))
	f.Add(makeSigners()[0].PublicKey().Marshal())
	f.Add(encode("x", "y"))
	f.Fuzz(func(t *testing.T, blob []byte) {
		key, err := parseAnyKey(blob, maxHostKey)
		if err != nil {
			return
		}
		if _, unknown := key.(*unknownKey); unknown && !bytes.Equal(key.Marshal(), blob) {
			t.Errorf("%x became %x", blob, key.Marshal())
		}
	})
}
