package tokentest

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/token/tokentest/pivcard"
)

// A stack is a pcscd and a module, as pkcs11-tool uses them.
type stack struct {
	*testing.T
	pcscd  *PCSCD
	module string
}

func newStack(t *testing.T, module string, readers ...string) stack {
	t.Helper()
	program(t, "pkcs11-tool")
	return stack{t, StartPCSCD(t, readers...), Module(t, module)}
}

// run runs pkcs11-tool, and fails the test when it does not succeed as expected.
func (s stack) run(succeeds bool, args ...string) string {
	s.Helper()
	cmd := exec.Command("pkcs11-tool", append([]string{"--module", s.module}, args...)...)
	cmd.Env = append(os.Environ(), s.pcscd.Env()...)
	out, err := cmd.CombinedOutput()
	if (err == nil) != succeeds {
		s.Fatalf("pkcs11-tool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sign signs with a key, and checks the signature with the certificate that the
// card has.
func (s stack) sign(c *pivcard.Card, ref pivcard.Ref, id, pin string) error {
	s.Helper()
	cert, err := x509.ParseCertificate(c.Certificate(ref))
	if err != nil {
		s.Fatal(err)
	}
	msg := []byte("sign me")
	digest := sha256.Sum256(msg)
	dir := s.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	args := []string{"--login", "--pin", pin, "--sign", "--id", id, "--input-file", in, "--output-file", out}
	data := msg
	if _, ok := cert.PublicKey.(*ecdsa.PublicKey); ok {
		data = digest[:]
		args = append(args, "--mechanism", "ECDSA", "--signature-format", "openssl")
	} else {
		args = append(args, "--mechanism", "SHA256-RSA-PKCS")
	}
	if err := os.WriteFile(in, data, 0o600); err != nil {
		s.Fatal(err)
	}
	s.run(true, args...)
	sig, err := os.ReadFile(out)
	if err != nil {
		s.Fatal(err)
	}
	return verify(cert.PublicKey, msg, crypto.SHA256, sig)
}

func (s stack) want(what string, got, want any) {
	s.Helper()
	if got != want {
		s.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestOpenSCSigns(t *testing.T) {
	s := newStack(t, "opensc-pkcs11.so")
	for _, algorithm := range []pivcard.Algorithm{pivcard.RSA2048, pivcard.P256, pivcard.P384} {
		key := pivcard.Key{Algorithm: algorithm}
		c := NewCard(t, pivcard.Options{Name: "a card", Keys: map[pivcard.Ref]pivcard.Key{
			pivcard.Authentication: key, pivcard.Signature: key, pivcard.KeyManagement: {}, pivcard.CardAuthentication: key,
		}})
		s.pcscd.Insert(0, c)
		list := s.run(true, "--list-objects")
		for _, label := range []string{"PIV AUTH pubkey", "SIGN pubkey", "KEY MAN pubkey", "CARD AUTH key", "CN=a card"} {
			if !strings.Contains(list, label) {
				t.Errorf("algorithm %x: %q is not listed:\n%s", algorithm, label, list)
			}
		}
		for id, ref := range map[string]pivcard.Ref{
			"01": pivcard.Authentication, "02": pivcard.Signature, "04": pivcard.CardAuthentication,
		} {
			for range 2 {
				before := c.Counts()
				if err := s.sign(c, ref, id, pivcard.PIN); err != nil {
					t.Errorf("algorithm %x, key %x: %v", algorithm, ref, err)
				}
				after := c.Counts()
				s.want("signatures", after.Signatures-before.Signatures, 1)
				s.want("wrong PINs", after.Wrong, 0)
				if ref == pivcard.Signature { // by C_Login, and just before the signature
					s.want("PINs given", after.Right-before.Right, 2)
				}
			}
		}
	}
}

func TestOpenSCAgrees(t *testing.T) {
	s := newStack(t, "opensc-pkcs11.so")
	c := NewCard(t, pivcard.Options{})
	s.pcscd.Insert(0, c)
	cert, err := x509.ParseCertificate(c.Certificate(pivcard.KeyManagement))
	if err != nil {
		t.Fatal(err)
	}
	own, err := ecdh.P384().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(own.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, spki, 0o600); err != nil {
		t.Fatal(err)
	}
	s.run(true, "--login", "--pin", pivcard.PIN, "--derive", "--mechanism", "ECDH1-COFACTOR-DERIVE", "--id", "03",
		"--input-file", in, "--output-file", out)
	other, err := cert.PublicKey.(*ecdsa.PublicKey).ECDH()
	if err != nil {
		t.Fatal(err)
	}
	want, err := own.ECDH(other)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	s.want("secret", fmt.Sprintf("%x", got), fmt.Sprintf("%x", want))
	s.want("agreements", c.Counts().Agreements, 1)
}

func TestOpenSCPIN(t *testing.T) {
	s := newStack(t, "opensc-pkcs11.so")
	c := NewCard(t, pivcard.Options{})
	s.pcscd.Insert(0, c)
	login := func(pin string, succeeds bool) { s.run(succeeds, "--login", "--pin", pin, "--list-objects") }
	login("000000", false)
	s.want("wrong PINs", c.Counts().Wrong, 1)
	s.want("tries left", c.Tries(), 2)
	s.run(true, "--list-objects") // costs nothing
	s.want("tries left", c.Tries(), 2)
	login(pivcard.PIN, true)
	s.want("tries left", c.Tries(), 3)

	s.run(true, "--login", "--pin", pivcard.PIN, "--change-pin", "--new-pin", "654321")
	login("654321", true)
	if err := c.SetPIN("111111"); err != nil {
		t.Fatal(err)
	}
	login("654321", false)
	login("111111", true)
	for range 3 {
		login("000000", false)
	}
	s.want("tries left", c.Tries(), 0)
	wrong := c.Counts().Wrong
	login("111111", false)
	s.want("wrong PINs", c.Counts().Wrong, wrong)
	if flags := s.run(true, "--list-token-slots"); !strings.Contains(flags, "user PIN locked") {
		t.Errorf("the PIN is not locked:\n%s", flags)
	}
	cmd := exec.Command(program(t, "pkcs15-tool"), "--unblock-pin", "--puk", pivcard.PUK, "--new-pin", "222222")
	cmd.Env = append(os.Environ(), s.pcscd.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pkcs15-tool: %v\n%s", err, out)
	}
	login("222222", true)
}

func TestOpenSCCardsComeAndGo(t *testing.T) {
	s := newStack(t, "opensc-pkcs11.so")
	one, two := NewCard(t, pivcard.Options{Name: "card one"}), NewCard(t, pivcard.Options{Name: "card two"})
	labels := func(want ...string) {
		t.Helper()
		var got []string
		Until(t, fmt.Sprintf("the cards %q are listed", want), func() bool { // pcscd looks from time to time
			got = nil
			for line := range strings.Lines(s.run(true, "--list-slots")) {
				if name, label, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "token label" {
					got = append(got, strings.TrimSpace(label))
				}
			}
			return strings.Join(got, "|") == strings.Join(want, "|")
		})
	}
	slot := s.pcscd.Slots[0]
	labels()
	for range 2 {
		s.pcscd.Insert(0, one)
		labels("card one")
		slot.Remove()
		labels()
	}
	s.pcscd.Insert(0, one)
	s.pcscd.Insert(0, two) // at once
	labels("card two")
	s.pcscd.Insert(1, one)
	labels("card two", "card one")
	slot.Remove()
	labels("card one")

	ups := one.Counts().PowerUps
	s.pcscd.Restart()
	Until(t, "the card is found again", func() bool { return one.Counts().PowerUps > ups })
	labels("card one")
	s.pcscd.Kill()
	s.pcscd.Start()
	labels("card one")
	if got := s.pcscd.Slots[1].Card(); got != one {
		t.Error("the slot does not know its card")
	}
}

func TestOpenSCFaults(t *testing.T) {
	s := newStack(t, "opensc-pkcs11.so")
	c := NewCard(t, pivcard.Options{Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	s.pcscd.Insert(0, c)
	sign := []string{"--login", "--pin", pivcard.PIN, "--sign", "--mechanism", "ECDSA", "--id", "01", "--input-file", "/proc/self/comm"}
	s.run(true, sign...)

	fault := pivcard.Fault{INS: pivcard.GeneralAuthenticate, SW: 0x6F00}
	c.Inject(slices.Repeat([]pivcard.Fault{fault}, 20)...) // OpenSC and pkcs11-tool try again
	s.run(false, sign...)
	c.ClearFaults()
	s.want("signatures", c.Counts().Signatures, 1)
	c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, Corrupt: true})
	if err := s.sign(c, pivcard.Authentication, "01", pivcard.PIN); err == nil {
		t.Error("a corrupt signature is right")
	}

	ups := c.Counts().PowerUps
	c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, Drop: true})
	s.run(false, sign...)
	Until(t, "the contact is there again", func() bool { return c.Counts().PowerUps > ups })
	s.run(true, sign...)

	c.SetHook(func(cmd pivcard.Command) {
		if cmd.INS == pivcard.GeneralAuthenticate {
			s.pcscd.Slots[0].Remove()
		}
	})
	signed := c.Counts().Signatures
	s.run(false, sign...)
	s.want("signatures of a pulled card", c.Counts().Signatures, signed)
}

func TestYubico(t *testing.T) {
	s := newStack(t, "libykcs11.so*", "Yubico YubiKey")
	for _, algorithm := range []pivcard.Algorithm{pivcard.RSA2048, pivcard.P256} {
		key := pivcard.Key{Algorithm: algorithm}
		c := NewCard(t, pivcard.Options{Name: "a card", YubiKey: true, Keys: map[pivcard.Ref]pivcard.Key{
			pivcard.Authentication: key, pivcard.Signature: key,
			pivcard.CardAuthentication: {Algorithm: algorithm, Imported: true, NoCertificate: true},
		}})
		s.pcscd.Insert(0, c)
		if list := s.run(true, "--list-token-slots"); !strings.Contains(list, fmt.Sprintf("YubiKey PIV #%d", c.Serial())) {
			t.Errorf("the card is not called by its number:\n%s", list)
		}
		list := s.run(true, "--login", "--pin", pivcard.PIN, "--list-objects")
		for label, want := range map[string]bool{
			"Private key for PIV Authentication":       true,
			"Public key for Digital Signature":         true,
			"X.509 Certificate for PIV Authentication": true,
			"X.509 Certificate for PIV Attestation 9a": true,
			"Private key for Card Authentication":      true, // by GET METADATA
			"X.509 Certificate for PIV Attestation 9e": false,
		} {
			s.want("listed is "+label, strings.Contains(list, label), want)
		}
		for id, ref := range map[string]pivcard.Ref{"01": pivcard.Authentication, "02": pivcard.Signature} {
			for range 2 {
				if err := s.sign(c, ref, id, pivcard.PIN); err != nil {
					t.Errorf("algorithm %x, key %x: %v", algorithm, ref, err)
				}
			}
		}
		s.run(false, "--login", "--pin", "000000", "--list-objects")
		s.want("wrong PINs", c.Counts().Wrong, 1)
		s.want("tries left", c.Tries(), 2)
	}
}

// A machine where tests may not mount anything.
func TestPCSCDInTheMachinesPlace(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("only root may have a socket there")
	}
	pkcs11 := Module(t, "opensc-pkcs11.so")
	for range 2 { // the lock is given back
		t.Run("", func(t *testing.T) {
			p := startPCSCD(t, false, nil)
			s := stack{t, p, pkcs11}
			p.Insert(1, NewCard(t, pivcard.Options{Name: "a card"}))
			if list := s.run(true, "--list-token-slots"); !strings.Contains(list, "a card") {
				t.Errorf("the card is not listed:\n%s", list)
			}
			p.Kill()
			p.Start()
		})
	}
}
