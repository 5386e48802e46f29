package module

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"log"
	"math/big"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// A testKey is a key of the test token, with the ways to sign with it and to check a
// signature.
type testKey struct {
	name, kind, id string
	keyType        uint64
}

var testKeys = []testKey{
	{"rsa 2048", tokentest.RSA2048, "01", wire.CKKRSA},
	{"rsa 4096", tokentest.RSA4096, "02", wire.CKKRSA},
	{"p256", tokentest.P256, "03", wire.CKKEC},
	{"p384", tokentest.P384, "04", wire.CKKEC},
	{"p521", tokentest.P521, "05", wire.CKKEC},
	{"ed25519", tokentest.Ed25519, "06", wire.CKKECEdwards},
}

// curves holds curves by their DER object identifier.
var curves = map[string]elliptic.Curve{
	"06082a8648ce3d030107": elliptic.P256(),
	"06052b81040022":       elliptic.P384(),
	"06052b81040023":       elliptic.P521(),
}

// publicKey makes a Go key from a public key object.
func publicKey(t testing.TB, o wire.Object) any {
	t.Helper()
	switch o.KeyType {
	case wire.CKKRSA:
		return &rsa.PublicKey{N: new(big.Int).SetBytes(o.Modulus), E: int(new(big.Int).SetBytes(o.Exponent).Int64())}
	case wire.CKKEC:
		k, err := ecdsa.ParseUncompressedPublicKey(curves[hex.EncodeToString(o.ECParams)], point(t, o))
		if err != nil {
			t.Fatal(err)
		}
		return k
	case wire.CKKECEdwards:
		return ed25519.PublicKey(point(t, o))
	}
	t.Fatalf("key type %#x", o.KeyType)
	return nil
}

func point(t testing.TB, o wire.Object) []byte {
	t.Helper()
	var p []byte
	if _, err := asn1.Unmarshal(o.ECPoint, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func keyID(t testing.TB, id wire.TokenID, o wire.Object) wire.KeyID {
	t.Helper()
	k := wire.KeyID{Token: id, ID: o.ID, Label: o.Label, KeyType: o.KeyType, Modulus: o.Modulus}
	if o.KeyType != wire.CKKRSA {
		k.ECPoint = point(t, o)
	}
	return k
}

// A way is a request for a signature, and the check of the answer.
type way struct {
	name  string
	sign  wire.Operate
	check func(signature []byte) error
}

// ways returns the ways to sign a message with a key.
func ways(public any, message []byte) []way {
	h1, h256, h384, h512 := sha1.Sum(message), sha256.Sum256(message), sha512.Sum384(message), sha512.Sum512(message)
	switch k := public.(type) {
	case *rsa.PublicKey:
		size := uint32(k.Size())
		info := func(oid asn1.ObjectIdentifier, sum []byte) []byte {
			b, err := asn1.Marshal(struct {
				Algorithm pkix.AlgorithmIdentifier
				Digest    []byte
			}{pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.NullRawValue}, sum})
			if err != nil {
				panic(err)
			}
			return b
		}
		pkcs := func(h crypto.Hash, sum []byte) func([]byte) error {
			return func(s []byte) error { return rsa.VerifyPKCS1v15(k, h, sum, s) }
		}
		pss := func(h crypto.Hash, sum []byte) func([]byte) error {
			return func(s []byte) error {
				return rsa.VerifyPSS(k, h, sum, s, &rsa.PSSOptions{SaltLength: len(sum)})
			}
		}
		oid256, oid512 := asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}
		return []way{
			{"raw sha1", wire.Operate{Mechanism: wire.CKMRSAPKCS, ResultLen: size, Data: info(asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}, h1[:])}, pkcs(crypto.SHA1, h1[:])},
			{"raw sha256", wire.Operate{Mechanism: wire.CKMRSAPKCS, ResultLen: size, Data: info(oid256, h256[:])}, pkcs(crypto.SHA256, h256[:])},
			{"raw sha512", wire.Operate{Mechanism: wire.CKMRSAPKCS, ResultLen: size, Data: info(oid512, h512[:])}, pkcs(crypto.SHA512, h512[:])},
			{"sha256", wire.Operate{Mechanism: wire.CKMSHA256RSAPKCS, ResultLen: size, Data: message}, pkcs(crypto.SHA256, h256[:])},
			{"sha512", wire.Operate{Mechanism: wire.CKMSHA512RSAPKCS, ResultLen: size, Data: message}, pkcs(crypto.SHA512, h512[:])},
			{"pss raw", wire.Operate{Mechanism: wire.CKMRSAPKCSPSS, Params: wire.Params{Hash: wire.CKMSHA256, MGF: wire.CKGMGF1SHA256, Salt: 32}, ResultLen: size, Data: h256[:]}, pss(crypto.SHA256, h256[:])},
			{"pss sha512", wire.Operate{Mechanism: wire.CKMSHA512RSAPSS, Params: wire.Params{Hash: wire.CKMSHA512, MGF: wire.CKGMGF1SHA512, Salt: 64}, ResultLen: size, Data: message}, pss(crypto.SHA512, h512[:])},
		}
	case *ecdsa.PublicKey:
		sum := map[int][]byte{256: h256[:], 384: h384[:], 521: h512[:]}[k.Params().BitSize]
		n := (k.Params().BitSize + 7) / 8
		return []way{{"ecdsa", wire.Operate{Mechanism: wire.CKMECDSA, ResultLen: uint32(2 * n), Data: sum}, func(s []byte) error {
			if len(s) != 2*n || !ecdsa.Verify(k, sum, new(big.Int).SetBytes(s[:n]), new(big.Int).SetBytes(s[n:])) {
				return fmt.Errorf("the signature %x is wrong", s)
			}
			return nil
		}}}
	case ed25519.PublicKey:
		return []way{{"eddsa", wire.Operate{Mechanism: wire.CKMEdDSA, ResultLen: 64, Data: message}, func(s []byte) error {
			if !ed25519.Verify(k, message, s) {
				return fmt.Errorf("the signature %x is wrong", s)
			}
			return nil
		}}}
	}
	panic("no such key")
}

func TestSoftHSM(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", "")
	for _, k := range testKeys {
		hsm.GenerateKey("work", k.kind, k.id, k.name)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<33, 0)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	hsm.ImportCertificate("work", "01", "my cert", cert)

	p := start(t, hsm.Env()...)
	hello := p.hello(hsm.Module())
	if hello.Version != wire.Version || !strings.HasPrefix(hello.Manufacturer, "SoftHSM") || strings.HasSuffix(hello.Description, " ") || hello.Cryptoki>>8 < 2 {
		t.Errorf("hello: %+v", hello)
	}

	// Slots: the token and a free slot.
	var slot wire.Slot
	free := false
	for _, s := range p.slots(false) {
		if s.HasToken {
			slot = s
		} else {
			free = true
		}
	}
	id := slot.Token
	if id.Label != "work" || id.Serial == "" || !strings.HasPrefix(id.Model, "SoftHSM") || !free {
		t.Fatalf("slots: %+v, free slot: %v", slot, free)
	}
	if slot.Info.Flags&wire.CKFLoginRequired == 0 || slot.Info.MinPIN != 4 || slot.Info.LoggedIn {
		t.Errorf("token: %+v", slot.Info)
	}
	mechanisms := map[uint64]wire.Mechanism{}
	for _, m := range slot.Mechanisms {
		mechanisms[m.Type] = m
	}
	if m, ok := mechanisms[wire.CKMRSAPKCS]; !ok || m.MaxKey < 4096 {
		t.Errorf("CKM_RSA_PKCS: %+v", m)
	}
	if _, ok := mechanisms[wire.CKMSHA256]; ok {
		t.Error("a mechanism that does not sign is listed")
	}

	// Objects: public ones before the login, all after it.
	publics := map[string]wire.Object{}
	for _, o := range p.objects(id) {
		switch o.Class {
		case wire.CKOPublicKey:
			publics[hex.EncodeToString(o.ID)] = o
		case wire.CKOCertificate:
			if !bytes.Equal(o.Value, cert) || o.Label != "my cert" || !bytes.Equal(o.ID, []byte{1}) {
				t.Errorf("certificate: %+v", o)
			}
			cert = nil
		default:
			t.Errorf("an object of class %d is listed before the login", o.Class)
		}
	}
	if cert != nil {
		t.Error("no certificate is listed")
	}
	if len(publics) != len(testKeys) {
		t.Fatalf("%d public keys, want %d", len(publics), len(testKeys))
	}
	first := publics["03"]
	probe := ways(publicKey(t, first), []byte("x"))[0].sign
	probe.Key = keyID(t, id, first)
	e := failure(t, func() error { _, err := p.sign(&probe); return err }())
	if e.Reason != wire.ReasonNoKey || !e.HasInfo || e.Info.LoggedIn {
		t.Errorf("a signature before the login: %+v", e)
	}

	// Login: the wrong PIN, then the right one, then once more.
	_, err = p.login(id, "9999")
	wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
	if e := failure(t, err); !e.HasInfo || e.Info.Flags&wire.CKFUserPINCountLow == 0 || e.Info.LoggedIn {
		t.Errorf("after a wrong PIN: %+v", e)
	}
	for range 2 {
		info, err := p.login(id, tokentest.PIN)
		if err != nil || !info.LoggedIn || info.Flags&wire.CKFUserPINCountLow != 0 {
			t.Fatalf("login: %+v, %v", info, err)
		}
	}
	privates := 0
	for _, o := range p.objects(id) {
		if o.Class == wire.CKOPrivateKey {
			privates++
			if o.Sign != wire.True || o.Private != wire.True || o.AlwaysAuth == wire.True || len(o.ID) != 1 {
				t.Errorf("private key: %+v", o)
			}
			if o.KeyType == wire.CKKRSA && len(o.Modulus) == 0 {
				t.Error("an RSA private key has no modulus")
			}
		}
	}
	if privates != len(testKeys) {
		t.Errorf("%d private keys, want %d", privates, len(testKeys))
	}

	// Reinitialize does nothing while the user is logged in.
	p.slots(true)
	var state wire.TokenReply
	if err := p.do(wire.TypeToken, &wire.Token{Token: id}, &state); err != nil || !state.Info.LoggedIn {
		t.Errorf("after reinitialize: %+v, %v", state, err)
	}

	for _, k := range testKeys {
		o := publics[k.id]
		if o.KeyType != k.keyType || o.Label != k.name {
			t.Errorf("%s: %+v", k.name, o)
		}
		message := []byte("a message for " + k.name)
		for _, w := range ways(publicKey(t, o), message) {
			t.Run(k.name+" "+w.name, func(t *testing.T) {
				w.sign.Key = keyID(t, id, o)
				s, err := p.sign(&w.sign)
				if err != nil {
					t.Fatal(err)
				}
				if err := w.check(s); err != nil {
					t.Error(err)
				}
				if w.check(append([]byte{s[0] ^ 1}, s[1:]...)) == nil {
					t.Error("the check is no check")
				}
			})
		}
	}

	t.Run("side by side", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				for n := range 12 {
					k := testKeys[(i+n)%len(testKeys)]
					o := publics[k.id]
					w := ways(publicKey(t, o), fmt.Append(nil, i, n))[0]
					w.sign.Key = keyID(t, id, o)
					s, err := p.sign(&w.sign)
					if err == nil {
						err = w.check(s)
					}
					if err != nil {
						t.Errorf("%s: %v", k.name, err)
					}
				}
			})
		}
		all.Wait()
	})

	t.Run("refused", func(t *testing.T) {
		o := publics["01"]
		good := ways(publicKey(t, o), []byte("m"))[1].sign
		good.Key = keyID(t, id, o)
		tests := []struct {
			name   string
			change func(*wire.Operate)
			want   func(*testing.T, error)
		}{
			{"room too small", func(s *wire.Operate) { s.ResultLen = 255 }, func(t *testing.T, err error) { wantRV(t, err, "C_Sign", 0) }},
			{"unknown mechanism", func(s *wire.Operate) { s.Mechanism = 0x7ffffff }, func(t *testing.T, err error) { wantRV(t, err, "C_SignInit", wire.CKRMechanismInvalid) }},
			{"data too long", func(s *wire.Operate) { s.Data = make([]byte, 300) }, func(t *testing.T, err error) {
				if e := failure(t, err); e.Function != "C_Sign" || e.RV == wire.CKROK { // SoftHSM returns CKR_GENERAL_ERROR
					t.Fatal(err)
				}
			}},
			{"no room", func(s *wire.Operate) { s.ResultLen = 0 }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonProtocol) }},
			{"other modulus", func(s *wire.Operate) { s.Key.Modulus = []byte{0xc1} }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonNoKey) }},
			{"other ID", func(s *wire.Operate) { s.Key.ID = []byte{77} }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonNoKey) }},
			{"other token", func(s *wire.Operate) { s.Key.Token.Serial = "0" }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonNoToken) }},
			{"PIN for nothing", func(s *wire.Operate) { s.PIN = secrettest.Of(t, "1234") }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonProtocol) }},
			{"no PIN", func(s *wire.Operate) { s.ContextLogin = true }, func(t *testing.T, err error) { wantReason(t, err, wire.ReasonProtocol) }},
			{"no reader to type on", func(s *wire.Operate) { s.ContextLogin, s.Pad = true, true }, func(t *testing.T, err error) { wantRV(t, err, "C_Login", wire.CKRArgumentsBad) }},
		}
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				bad := good
				tt.change(&bad)
				_, err := p.sign(&bad)
				tt.want(t, err)
				if _, err := p.sign(&good); err != nil {
					t.Errorf("the next signature: %v", err)
				}
			})
		}
	})

	t.Run("logout", func(t *testing.T) {
		for range 2 {
			if err := p.do(wire.TypeLogout, &wire.Token{Token: id}, &state); err != nil || state.Info.LoggedIn {
				t.Errorf("logout: %+v, %v", state, err)
			}
		}
		_, err := p.sign(&probe)
		if e := failure(t, err); e.Reason != wire.ReasonNoKey && e.RV != wire.CKRUserNotLoggedIn {
			t.Errorf("a signature after the logout: %v", err)
		}
		if _, err := p.login(id, tokentest.PIN); err != nil {
			t.Fatal(err)
		}
		if _, err := p.sign(&probe); err != nil {
			t.Errorf("a signature after the next login: %v", err)
		}
	})

	p.conn.Close()
	if status := p.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	// SoftHSM reports a wrong PIN and data that are too long in the system log: see
	// words.c.
	for line := range strings.Lines(p.stderr.String()) {
		if !strings.Contains(line, ".cpp(") {
			t.Errorf("standard error: %s", line)
		}
	}
}

// The public half decides between keys that share an ID. If the token does not show it,
// the label decides. If the label is the same, the signature decides.
func TestSameID(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("twins", "")
	for _, k := range []struct{ kind, label string }{
		{tokentest.RSA2048, "a"},
		{tokentest.RSA2048, "b"},
		{tokentest.P256, "a"},
		{tokentest.P256, "b"},
		{tokentest.P384, "c"},
		{tokentest.P384, "c"},
	} {
		hsm.GenerateKey("twins", k.kind, "01", k.label)
	}
	p := start(t, hsm.Env()...)
	p.hello(hsm.Module())
	id := p.token("twins")
	if _, err := p.login(id, tokentest.PIN); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, o := range p.objects(id) {
		if o.Class != wire.CKOPublicKey {
			continue
		}
		w := ways(publicKey(t, o), []byte("m"))[0]
		w.sign.Key = keyID(t, id, o)
		s, err := p.sign(&w.sign)
		if err == nil {
			err = w.check(s)
		}
		if err != nil {
			t.Errorf("key of type %d, label %q: %v", o.KeyType, o.Label, err)
		}
		n++
	}
	if n != 6 {
		t.Errorf("%d keys, want 6", n)
	}
}

// SoftHSM sees the new token of another program only after a restart.
func TestReinitialize(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("first", "")
	p := start(t, hsm.Env()...)
	p.hello(hsm.Module())
	first := p.token("first")
	p.objects(first) // leaves sessions open
	hsm.AddToken("second", "")
	labels := func(again bool) string {
		var l []string
		for _, s := range p.slots(again) {
			if s.HasToken {
				l = append(l, s.Token.Label)
			}
		}
		return strings.Join(l, " ")
	}
	if got := labels(false); strings.Contains(got, "second") {
		t.Logf("this SoftHSM notices by itself: %s", got)
	}
	got := labels(true)
	if !strings.Contains(got, "first") || !strings.Contains(got, "second") {
		t.Errorf("tokens: %s", got)
	}
	if _, err := p.login(first, tokentest.PIN); err != nil {
		t.Errorf("login afterwards: %v", err)
	}
}

// After a refused login, the memory of the module process does not contain the PIN.
func TestNoPINLeftBehind(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("only root may read the memory of a process that forbids it")
	}
	hsm := tokentest.NewSoftHSM(t)
	pin := func() string { // not a constant: the child runs this program, too
		b := make([]byte, 10)
		_, _ = rand.Read(b)
		return hex.EncodeToString(b)
	}
	right, wrong := pin(), pin()
	hsm.AddToken("work", right)
	hsm.GenerateKey("work", tokentest.P256, "01", "key")
	p := start(t, hsm.Env()...)
	p.hello(hsm.Module())
	id := p.token("work")
	var key wire.Object
	for _, o := range p.objects(id) {
		key = o
	}
	_, err := p.login(id, wrong)
	wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
	if n := inMemory(t, p.cmd.Process.Pid, []byte(wrong)); n != 0 {
		t.Errorf("the wrong PIN is in the memory %d times", n)
	}
	if _, err := p.login(id, right); err != nil {
		t.Fatal(err)
	}
	context := ways(publicKey(t, key), []byte("m"))[0].sign
	context.Key, context.ContextLogin, context.PIN = keyID(t, id, key), true, secrettest.Of(t, right)
	// SoftHSM refuses this for a key that needs no login for each signature.
	if _, err := p.sign(&context); err == nil {
		t.Log("a login for one signature was accepted")
	}
	if n := inMemory(t, p.cmd.Process.Pid, []byte(right)); n != 0 {
		t.Errorf("the right PIN is in the memory %d times", n)
	}
	if n := inMemory(t, p.cmd.Process.Pid, []byte(hsm.Module())); n == 0 {
		t.Error("the search finds nothing: the module's path must be in the memory")
	}
	for _, file := range []string{"environ", "cmdline"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, file))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(right)) || bytes.Contains(b, []byte(wrong)) {
			t.Errorf("a PIN is in %s", file)
		}
	}
}

// inMemory counts how often the memory of a process contains some bytes.
func inMemory(t *testing.T, pid int, what []byte) int {
	t.Helper()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	n, used := 0, false
	var from, to uint64
	for line := range strings.Lines(string(smaps)) {
		name, value, _ := strings.Cut(line, " ")
		switch {
		case name == "Rss:" || name == "Swap:":
			used = used || strings.Fields(value)[0] != "0"
		case name == "VmFlags:": // the last line about a region
			// The race detector's shadow memory has terabytes, and contains no bytes of
			// the test.
			if used && to-from <= 1<<30 {
				b := make([]byte, to-from)
				got, _ := mem.ReadAt(b, int64(from)) // memory that cannot be read does not count
				n += bytes.Count(b[:got], what)
			}
			used = false
		case !strings.HasSuffix(name, ":"):
			if _, err := fmt.Sscanf(name, "%x-%x", &from, &to); err != nil {
				t.Fatalf("line of smaps: %s", line)
			}
		}
	}
	return n
}

// OpenSC's module loads on a machine without a reader and without a smart card service.
func TestOpenSCWithoutReader(t *testing.T) {
	path := tokentest.Module(t, "opensc-pkcs11.so")
	p := start(t)
	hello := p.hello(path)
	if !strings.HasPrefix(hello.Manufacturer, "OpenSC") {
		t.Errorf("hello: %+v", hello)
	}
	for _, s := range p.slots(false) {
		t.Logf("a slot: %+v", s)
	}
}

// The module process decrypts and derives, does not tell why a ciphertext is wrong, and leaves no
// secret in the session.
func TestDecryptAndDerive(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", "")
	hsm.GenerateKey("work", tokentest.RSA2048, "01", "rsa")
	hsm.GenerateKey("work", tokentest.P256, "02", "ec")
	for _, v := range hsm.Env() {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value) // this process runs the module
	}
	lib, err := load(hsm.Module())
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.initialize(""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := lib.finalize(); err != nil {
			t.Error(err)
		}
	}()
	slots, err := lib.slots(true)
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := lib.tokenInfo(slots[0])
	if err != nil {
		t.Fatal(err)
	}
	tok := newToken(id)
	live, err := tok.find(t.Context(), lib, func() place { return place{} })
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.login(live.anchor, pkcs11.CKU_USER, []byte(tokentest.PIN)); err != nil {
		t.Fatal(err)
	}
	r := &reading{lib: lib, session: live.anchor, log: log.New(t.Output(), "", 0)}
	r.begin()
	if err := r.all(nil); err != nil {
		t.Fatal(err)
	}
	for _, o := range r.part.Objects {
		if use := map[uint64]wire.Tri{wire.CKKRSA: o.Decrypt, wire.CKKEC: o.Derive}[o.KeyType]; o.Class == wire.CKOPrivateKey && use != wire.True {
			t.Errorf("a key of type %d does not say what it is for", o.KeyType)
		}
		if o.Class != wire.CKOPublicKey {
			continue
		}
		m := &wire.Operate{Key: keyID(t, id, o)}
		operate := func() ([]byte, error) { return new(server).operate(t.Context(), lib, tok, m, nil) }
		switch pub := publicKey(t, o).(type) {
		case *rsa.PublicKey:
			m.Function, m.Mechanism, m.ResultLen = wire.Decrypt, wire.CKMRSAPKCSOAEP, 256
			m.Params = wire.Params{Hash: wire.CKMSHA1, MGF: wire.CKGMGF1SHA1}
			if m.Data, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, nil, nil); err != nil {
				t.Fatal(err)
			}
			if got, err := operate(); err != nil || len(got) != 0 {
				t.Errorf("decrypt nothing: %x, %v", got, err)
			}
			m.Data[200] ^= 1
			if got, err := operate(); got != nil || failure(t, err).Reason != wire.ReasonCiphertext || failure(t, err).RV != 0 {
				t.Errorf("a wrong ciphertext: %x, %v", got, err)
			}
		case *ecdsa.PublicKey:
			m.Function, m.Mechanism, m.ResultLen, m.Data = wire.Derive, wire.CKMECDH1Derive, 32, m.Key.ECPoint
			if got, err := operate(); err != nil || len(got) != 32 {
				t.Errorf("derive: %v", err)
			}
			m.ResultLen = 33
			if got, err := operate(); err == nil {
				t.Errorf("a secret of 33 bytes: %x", got)
			}
		}
	}
	for range 2 { // sessions
		session, err := live.session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		left, _, err := lib.find(session, wire.MaxList, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
		if err != nil || len(left) > 0 {
			t.Errorf("%d secrets are left, %v", len(left), err)
		}
	}
}

// BenchmarkSign compares signatures through the process with a loop of C_Sign. No agent
// can be faster than the loop.
func BenchmarkSign(b *testing.B) {
	hsm := tokentest.NewSoftHSM(b)
	hsm.AddToken("work", "")
	hsm.GenerateKey("work", tokentest.P256, "01", "key")
	p := start(b, hsm.Env()...)
	p.hello(hsm.Module())
	id := p.token("work")
	if _, err := p.login(id, tokentest.PIN); err != nil {
		b.Fatal(err)
	}
	m := &wire.Operate{Mechanism: wire.CKMECDSA, ResultLen: 64, Data: make([]byte, 32)}
	for _, o := range p.objects(id) {
		if o.Class == wire.CKOPublicKey {
			m.Key = keyID(b, id, o)
		}
	}
	b.Run("process", func(b *testing.B) {
		for b.Loop() {
			if _, err := p.sign(m); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("process side by side", func(b *testing.B) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := p.sign(m); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
	b.Run("loop", func(b *testing.B) {
		for _, v := range hsm.Env() {
			name, value, _ := strings.Cut(v, "=")
			b.Setenv(name, value) // this process runs the module
		}
		lib, err := load(hsm.Module())
		if err != nil {
			b.Fatal(err)
		}
		if err := lib.initialize(""); err != nil {
			b.Fatal(err)
		}
		defer func() {
			if err := lib.finalize(); err != nil {
				b.Error(err)
			}
		}()
		live, err := newToken(id).find(b.Context(), lib, func() place { return place{} })
		if err != nil {
			b.Fatal(err)
		}
		if err := lib.login(live.anchor, pkcs11.CKU_USER, []byte(tokentest.PIN)); err != nil {
			b.Fatal(err)
		}
		key, _, err := live.key(live.anchor, &m.Key)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if err := lib.signInit(live.anchor, m.Mechanism, new(wire.Params), key); err != nil {
				b.Fatal(err)
			}
			if _, err := lib.sign(live.anchor, m.Data, make([]byte, 64)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
