package pivcard

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func newCard(t testing.TB, o Options) *Card {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// send sends a command, given in hexadecimal and bytes, collects the whole
// answer and returns it with its status word.
func send(t testing.TB, c *Card, header string, data ...[]byte) ([]byte, uint16) {
	t.Helper()
	h, err := hex.DecodeString(strings.ReplaceAll(header, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	body := slices.Concat(data...)
	for len(body) > 255 { // a chain
		part := append([]byte{h[0] | chained, h[1], h[2], h[3], 255}, body[:255]...)
		if answer := c.Transmit(t.Context(), part); !bytes.Equal(answer, []byte{0x90, 0x00}) {
			t.Fatalf("a chain is answered by %x", answer)
		}
		body = body[255:]
	}
	if len(body) > 0 {
		h = append(append(h, byte(len(body))), body...)
	}
	var all []byte
	for answer := c.Transmit(t.Context(), h); ; answer = c.Transmit(t.Context(), []byte{0, GetResponse, 0, 0, 0}) {
		if len(answer) < 2 {
			t.Fatalf("the answer is %x", answer)
		}
		all = append(all, answer[:len(answer)-2]...)
		sw := binary.BigEndian.Uint16(answer[len(answer)-2:])
		if sw&0xff00 != swMore {
			return all, sw
		}
	}
}

func wantSW(t testing.TB, c *Card, want uint16, header string, data ...[]byte) []byte {
	t.Helper()
	answer, sw := send(t, c, header, data...)
	if sw != want {
		t.Fatalf("%s: %04x, want %04x", header, sw, want)
	}
	return answer
}

func padded(pin string) []byte {
	b, err := pad(pin)
	if err != nil {
		panic(err)
	}
	return b[:]
}

func selectPIV(t testing.TB, c *Card) {
	t.Helper()
	wantSW(t, c, swOK, "00A40400", aidPIV[:9])
}

func verifyPIN(t testing.TB, c *Card, pin string, want uint16) {
	t.Helper()
	wantSW(t, c, want, "00200080", padded(pin))
}

func challenge(b []byte) []byte { return tlv(0x7C, tlv(0x82), tlv(0x81, b)) }

// result takes a result out of its template.
func result(t testing.TB, answer []byte) []byte {
	t.Helper()
	_, template, _, err := parseTLV(answer)
	if err != nil {
		t.Fatal(err)
	}
	tag, value, rest, err := parseTLV(template)
	if err != nil || tag != 0x82 || len(rest) > 0 {
		t.Fatalf("the result is %x", template)
	}
	return value
}

func public(t testing.TB, c *Card, r Ref) any {
	t.Helper()
	cert, err := x509.ParseCertificate(c.Certificate(r))
	if err != nil {
		t.Fatal(err)
	}
	return cert.PublicKey
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestParseCommand(t *testing.T) {
	tests := []struct {
		name, apdu string
		data       string
		le         int
		ok         bool
	}{
		{"nothing", "", "", 0, false},
		{"no header", "00A404", "", 0, false},
		{"case 1", "00200080", "", 256, true},
		{"case 2", "00C0000010", "", 16, true},
		{"case 2, all", "00C0000000", "", 256, true},
		{"case 3", "0020008002ABCD", "abcd", 256, true},
		{"case 4", "0020008002ABCD10", "abcd", 16, true},
		{"case 4, all", "0020008002ABCD00", "abcd", 256, true},
		{"too short", "0020008003ABCD", "", 0, false},
		{"too long", "0020008001ABCDEF", "", 0, false},
		{"case 2, extended", "00C00000000123", "", 0x123, true},
		{"case 2, extended, all", "00C00000000000", "", 65536, true},
		{"case 3, extended", "00C00000000002ABCD", "abcd", 65536, true},
		{"case 4, extended", "00C00000000002ABCD0123", "abcd", 0x123, true},
		{"case 4, extended, all", "00C00000000002ABCD0000", "abcd", 65536, true},
		{"extended, too short", "00C00000000003ABCD", "", 0, false},
		{"extended, half of Le", "00C00000000002ABCD00", "", 0, false},
		{"extended, no length", "00C000000001", "", 0, false},
		{"extended, empty", "00C00000000000ABCD", "", 0, false},
	}
	for _, tt := range tests {
		b, err := hex.DecodeString(tt.apdu)
		if err != nil {
			t.Fatal(err)
		}
		c, ok := parseCommand(b)
		if ok != tt.ok || ok && (hex.EncodeToString(c.data) != tt.data || c.le != tt.le) {
			t.Errorf("%s: got %x, le %d, %v", tt.name, c.data, c.le, ok)
		}
	}
	if _, ok := parseCommand(make([]byte, maxMessage+1)); ok {
		t.Error("a command without bounds")
	}
}

func TestTLV(t *testing.T) {
	for _, n := range []int{0, 1, 127, 128, 255, 256, 5000} {
		value := bytes.Repeat([]byte{7}, n)
		tag, got, rest, err := parseTLV(append(tlv(0x53, value), 1, 2))
		if err != nil || tag != 0x53 || !bytes.Equal(got, value) || !bytes.Equal(rest, []byte{1, 2}) {
			t.Errorf("%d bytes: %x %d %x %v", n, tag, len(got), rest, err)
		}
	}
	for _, text := range []string{"", "53", "5301", "5381", "538180", "5382", "538201", "53820100", "5380", "5383000000", "5F2F00"} {
		b, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := parseTLV(b); err == nil {
			t.Errorf("%s is read", text)
		}
	}
}

func TestObjects(t *testing.T) {
	c := newCard(t, Options{Name: "somebody", Serial: 4711})
	_, sw := send(t, c, "00CB3FFF", tlv(0x5C, []byte{0x7E}))
	equal(t, "before SELECT", sw, swInstruction)
	if answer := wantSW(t, c, swOK, "00A40400", aidPIV); !bytes.HasPrefix(answer, []byte{0x61}) {
		t.Errorf("SELECT answers %x", answer)
	}
	for name, want := range map[string]uint16{
		"7E": swOK, "5FC102": swOK, "5FC107": swOK, "5FC10C": swOK, // discovery, CHUID, CCC, key history
		"5FC105": swOK, "5FC10A": swOK, "5FC10B": swOK, "5FC101": swOK, // certificates
		"5FC109": swNotFound, "5FC10D": swNotFound, "7F61": swNotFound, "5FFF01": swNotFound, "": swData, "01020304": swData,
	} {
		b, err := hex.DecodeString(name)
		if err != nil {
			t.Fatal(err)
		}
		object := wantSW(t, c, want, "00CB3FFF", tlv(0x5C, b))
		if want == swOK {
			if _, _, rest, err := parseTLV(object); err != nil || len(rest) > 0 {
				t.Errorf("%s is %x", name, object)
			}
		}
	}
	chuid := wantSW(t, c, swOK, "00CB3FFF", []byte{0x5C, 3, 0x5F, 0xC1, 0x02})
	if !bytes.Contains(chuid, []byte{0x34, 0x10, 'P', 'I', 'V', 'C', 'A', 'R', 'D', 1, 0, 0, 0, 0, 0, 0, 0x12, 0x67}) {
		t.Errorf("the CHUID has no GUID with the serial number: %x", chuid)
	}
	// All at once, by extended length.
	answer := c.Transmit(t.Context(), []byte{0, GetData, 0x3F, 0xFF, 0, 0, 5, 0x5C, 3, 0x5F, 0xC1, 0x05, 0, 0})
	if len(answer) < 300 || !bytes.HasSuffix(answer, []byte{0x90, 0x00}) {
		t.Errorf("%d bytes: %x", len(answer), answer)
	}
	wantSW(t, c, swSecurityStatus, "00DB3FFF", tlv(0x5C, []byte{0x7E}))
	wantSW(t, c, swParameters, "00CB0000", tlv(0x5C, []byte{0x7E}))
	wantSW(t, c, swInstruction, "00FD0000") // not a YubiKey
	wantSW(t, c, swClass, "80CB3FFF", tlv(0x5C, []byte{0x7E}))
	wantSW(t, c, swConditions, "00C00000")
	cert, err := x509.ParseCertificate(c.Certificate(Authentication))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "name", cert.Subject.CommonName, "somebody")
	if c.Certificate(Retired) != nil {
		t.Error("there is a certificate of no key")
	}
}

func TestPIN(t *testing.T) {
	c := newCard(t, Options{Tries: 4})
	selectPIV(t, c)
	query := func(want uint16) { t.Helper(); wantSW(t, c, want, "00200080") }
	query(0x63C4)
	verifyPIN(t, c, "000000", 0x63C3)
	query(0x63C3)
	wantSW(t, c, swData, "00200080", []byte("short"))
	wantSW(t, c, swReference, "00200096", padded(PIN))
	query(0x63C3)
	verifyPIN(t, c, PIN, swOK)
	query(swOK)
	equal(t, "tries", c.Tries(), 4)
	wantSW(t, c, swOK, "0020FF80")
	query(0x63C4)

	verifyPIN(t, c, PIN, swOK)
	verifyPIN(t, c, "000000", 0x63C3) // who gives a wrong one is not verified any more
	query(0x63C3)
	for want := uint16(0x63C2); want >= 0x63C0; want-- {
		verifyPIN(t, c, "000000", want)
	}
	verifyPIN(t, c, PIN, swBlocked)
	query(swBlocked)

	wantSW(t, c, 0x63C3, "002C0080", padded("wrong"), padded("222222"))
	wantSW(t, c, swOK, "002C0080", padded(PUK), padded("222222"))
	verifyPIN(t, c, "222222", swOK)
	wantSW(t, c, 0x63C3, "00240080", padded("wrong"), padded("333333"))
	wantSW(t, c, swOK, "00240080", padded("222222"), padded("333333"))
	verifyPIN(t, c, "333333", swOK)
	wantSW(t, c, swOK, "00240081", padded(PUK), padded("newpuk"))
	for want := uint16(0x63C3); want >= 0x63C0; want-- {
		wantSW(t, c, want, "002C0080", padded(PUK), padded("222222"))
	}
	wantSW(t, c, swBlocked, "002C0080", padded("newpuk"), padded("222222"))

	if err := c.SetPIN("444444"); err != nil {
		t.Fatal(err)
	}
	verifyPIN(t, c, "333333", 0x63C3)
	c.SetTries(1)
	verifyPIN(t, c, "333333", 0x63C0)
	c.SetTries(99)
	equal(t, "tries", c.Tries(), 4)
	verifyPIN(t, c, "444444", swOK)
	counts := c.Counts()
	equal(t, "blocked", counts.Blocked, 1)
	equal(t, "wrong", counts.Wrong, 7)
	equal(t, "right", counts.Right, 5)
	equal(t, "queries", counts.Queries, 7)
	if !slices.Contains(c.Events(), "PIN wrong, 3 left") {
		t.Errorf("events: %q", c.Events())
	}
}

func TestVerificationEnds(t *testing.T) {
	c := newCard(t, Options{Keys: map[Ref]Key{Authentication: {}}})
	tests := []struct {
		name string
		do   func()
		want uint16
	}{
		{"nothing", func() {}, swOK},
		{"PIV again", func() { selectPIV(t, c) }, swOK},
		{"an application that is not there", func() { wantSW(t, c, swNotFound, "00A40400", []byte{1, 2, 3, 4, 5, 6}) }, swOK},
		{"another application", func() { wantSW(t, c, swOK, "00A40400", aidManager) }, 0x63C3},
		{"reset", c.Reset, 0x63C3},
		{"power", func() { c.PowerOff(); c.PowerOn() }, 0x63C3},
	}
	for _, tt := range tests {
		selectPIV(t, c)
		verifyPIN(t, c, PIN, swOK)
		tt.do()
		selectPIV(t, c)
		if _, sw := send(t, c, "00200080"); sw != tt.want {
			t.Errorf("%s: %04x, want %04x", tt.name, sw, tt.want)
		}
	}
	counts := c.Counts()
	equal(t, "resets", counts.Reset, 1)
	equal(t, "power", counts.PowerUps+counts.PowerOffs, 2)
	equal(t, "selections", counts.Selects, 2*len(tests)+3)
}

func TestSign(t *testing.T) {
	digest := sha256.Sum256([]byte("sign me"))
	block := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, 254)...)
	for _, algorithm := range []Algorithm{RSA2048, P256, P384} {
		c := newCard(t, Options{Keys: map[Ref]Key{Authentication: {Algorithm: algorithm}}})
		selectPIV(t, c)
		in := digest[:]
		if algorithm == RSA2048 {
			in = block
		}
		header := fmt.Sprintf("0087%02X9A", byte(algorithm))
		wantSW(t, c, swSecurityStatus, header, challenge(in))
		verifyPIN(t, c, PIN, swOK)
		for range 2 {
			sig := result(t, wantSW(t, c, swOK, header, challenge(in)))
			switch p := public(t, c, Authentication).(type) {
			case *rsa.PublicKey:
				// Go has no bare operation in public: raise it back.
				if !bytes.Equal(raise(p, sig), in) {
					t.Error("the RSA result is wrong")
				}
			case *ecdsa.PublicKey:
				if !ecdsa.VerifyASN1(p, in, sig) {
					t.Error("the ECDSA signature is wrong")
				}
			}
		}
		for name, data := range map[string][]byte{
			"nothing": {}, "no template": {0x82, 0}, "no request": tlv(0x7C, tlv(0x81, in)),
			"two questions": tlv(0x7C, tlv(0x82), tlv(0x81, in), tlv(0x85, in)), "no question": tlv(0x7C, tlv(0x82)),
			"other": tlv(0x7C, tlv(0x82), tlv(0x81, in), tlv(0x83, in)), "rest": append(challenge(in), 0),
			"broken": tlv(0x7C, []byte{0x82, 0, 0x81, 9}), "too long": challenge(make([]byte, 300)),
			"greater than the modulus": challenge(bytes.Repeat([]byte{0xff}, 256)),
		} {
			if _, sw := send(t, c, header, data); sw != swData {
				t.Errorf("%s: %04x", name, sw)
			}
		}
		wantSW(t, c, swParameters, "0087059A", challenge(in))
		wantSW(t, c, swParameters, header[:6]+"9D", challenge(in))
		equal(t, "signatures", c.Counts().Signatures, 2)
		equal(t, "refused", c.Counts().Refused, 1)
	}
}

func TestAgree(t *testing.T) {
	c := newCard(t, Options{})
	selectPIV(t, c)
	own, err := ecdh.P384().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point := tlv(0x7C, tlv(0x82), tlv(0x85, own.PublicKey().Bytes()))
	wantSW(t, c, swSecurityStatus, "0087149D", point)
	verifyPIN(t, c, PIN, swOK)
	got := result(t, wantSW(t, c, swOK, "0087149D", point))
	other, err := public(t, c, KeyManagement).(*ecdsa.PublicKey).ECDH()
	if err != nil {
		t.Fatal(err)
	}
	want, err := own.ECDH(other)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("another secret")
	}
	wantSW(t, c, swData, "0087149D", tlv(0x7C, tlv(0x82), tlv(0x85, make([]byte, 97))))
	equal(t, "agreements", c.Counts().Agreements, 1)
}

func TestPINPolicies(t *testing.T) {
	sign := challenge(make([]byte, 32))
	for _, yubiKey := range []bool{false, true} {
		c := newCard(t, Options{YubiKey: yubiKey})
		selectPIV(t, c)
		wantSW(t, c, swOK, "0087119E", sign) // never
		wantSW(t, c, swSecurityStatus, "0087119C", sign)
		verifyPIN(t, c, PIN, swOK)
		wantSW(t, c, swOK, "0087119C", sign)
		wantSW(t, c, swSecurityStatus, "0087119C", sign) // not twice
		wantSW(t, c, swOK, "0087119A", sign)
		verifyPIN(t, c, PIN, swOK)
		wantSW(t, c, swOK, "0087119A", sign)
		wantSW(t, c, swSecurityStatus, "0087119C", sign) // another key was used
		verifyPIN(t, c, PIN, swOK)
		wantSW(t, c, swOK, "00CB3FFF", tlv(0x5C, []byte{0x7E}))
		want := uint16(swSecurityStatus)
		if yubiKey {
			want = swOK
		}
		wantSW(t, c, want, "0087119C", sign) // something came in between
	}
}

func TestChains(t *testing.T) {
	c := newCard(t, Options{})
	selectPIV(t, c)
	ok := []byte{0x90, 0x00}
	if got := c.Transmit(t.Context(), []byte{0x10, GetData, 0x3F, 0xFF, 2, 0x5C, 1}); !bytes.Equal(got, ok) {
		t.Errorf("a chain begins with %x", got)
	}
	if got := c.Transmit(t.Context(), []byte{0, GetData, 0x3F, 0xFF, 1, 0x7E, 0}); got[0] != 0x7E {
		t.Errorf("a chain ends with %x", got)
	}
	c.Transmit(t.Context(), []byte{0x10, GetData, 0x3F, 0xFF, 2, 0x5C, 1})
	wantSW(t, c, swEndOfChain, "00200080")
	wantSW(t, c, 0x63C3, "00200080") // and is forgotten
	long := append([]byte{0x10, GetData, 0x3F, 0xFF, 255}, make([]byte, 255)...)
	for n := 0; ; n++ {
		if got := c.Transmit(t.Context(), long); !bytes.Equal(got, ok) {
			equal(t, "the end of a chain without end", binary.BigEndian.Uint16(got), swLength)
			break
		}
		if n > maxChained/255 {
			t.Fatal("a chain has no bounds")
		}
	}
}

func TestYubico(t *testing.T) {
	c := newCard(t, Options{YubiKey: true, Serial: 0x01020304, Keys: map[Ref]Key{
		Authentication: {Algorithm: RSA2048}, Signature: {}, CardAuthentication: {Imported: true},
	}})
	selectPIV(t, c)
	equal(t, "version", hex.EncodeToString(wantSW(t, c, swOK, "00FD0000")), "050403")
	equal(t, "serial", hex.EncodeToString(wantSW(t, c, swOK, "00F80000")), "01020304")
	equal(t, "of the PIN", hex.EncodeToString(wantSW(t, c, swOK, "00F70080")), "05010106020303")
	equal(t, "of the PUK", hex.EncodeToString(wantSW(t, c, swOK, "00F70081")), "05010106020303")
	if err := c.SetPIN("111111"); err != nil {
		t.Fatal(err)
	}
	verifyPIN(t, c, "000000", 0x63C2)
	equal(t, "of a changed PIN", hex.EncodeToString(wantSW(t, c, swOK, "00F70080")), "05010006020302")
	for header, prefix := range map[string]string{
		"00F7009A": "01010702020201030101048201098182", "00F7009C": "010111020203010301010443864104", "00F7009E": "010111020201010301020443864104",
	} {
		if got := hex.EncodeToString(wantSW(t, c, swOK, header)); !strings.HasPrefix(got, prefix) {
			t.Errorf("%s: %s", header, got)
		}
	}
	wantSW(t, c, swReference, "00F7009D")
	wantSW(t, c, swReference, "00F99D00")
	wantSW(t, c, swReference, "00F9F900")
	wantSW(t, c, swData, "00F99E00") // imported
	wantSW(t, c, swInstruction, "00010000")
	wantSW(t, c, swParameters, "008711F9", challenge(make([]byte, 32))) // signs statements only
	cert, err := x509.ParseCertificate(wantSW(t, c, swOK, "00F99A00"))
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(c.Certificate(attestation))
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignatureFrom(root); err != nil {
		t.Error(err)
	}
	if !cert.PublicKey.(*rsa.PublicKey).Equal(public(t, c, Authentication)) {
		t.Error("the statement is about another key")
	}
}

func TestFaults(t *testing.T) {
	c := newCard(t, Options{Keys: map[Ref]Key{CardAuthentication: {}}})
	selectPIV(t, c)
	c.Inject(Fault{INS: Verify, SW: swNoDiagnosis}, Fault{INS: GeneralAuthenticate, SW: 0x6581}, Fault{INS: GeneralAuthenticate, Corrupt: true},
		Fault{INS: GeneralAuthenticate, Drop: true}, Fault{INS: GetData, SW: swNotFound})
	verifyPIN(t, c, "000000", swNoDiagnosis)
	equal(t, "tries", c.Tries(), 3)
	digest := sha256.Sum256([]byte("sign me"))
	wantSW(t, c, 0x6581, "0087119E", challenge(digest[:]))
	sig := result(t, wantSW(t, c, swOK, "0087119E", challenge(digest[:])))
	if ecdsa.VerifyASN1(public(t, c, CardAuthentication).(*ecdsa.PublicKey), digest[:], sig) {
		t.Error("the corrupt signature is right")
	}
	if answer := c.Transmit(t.Context(), []byte{0, GeneralAuthenticate, 0x11, 0x9E}); answer != nil {
		t.Errorf("a lost contact answers %x", answer)
	}
	c.ClearFaults()
	wantSW(t, c, swOK, "00CB3FFF", tlv(0x5C, []byte{0x7E}))
	wantSW(t, c, swOK, "0087119E", challenge(digest[:]))
}

func TestHookAndDelay(t *testing.T) {
	c := newCard(t, Options{Keys: map[Ref]Key{CardAuthentication: {}}})
	var seen []Command
	c.SetHook(func(cmd Command) {
		seen = append(seen, cmd)
		_ = c.Tries() // may be asked
	})
	selectPIV(t, c)
	c.SetDelay(time.Hour, time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	c.SetHook(func(Command) { cancel() })
	if answer := c.Transmit(ctx, []byte{0, GetData, 0x3F, 0xFF}); answer != nil {
		t.Errorf("a pulled card answers %x", answer)
	}
	c.SetHook(nil)
	c.SetDelay(0, 0)
	if !slices.Equal(seen, []Command{{0, Select, 4, 0}}) {
		t.Errorf("seen: %v", seen)
	}
}

func TestTrace(t *testing.T) {
	var lines []string
	c := newCard(t, Options{Trace: func(line string) { lines = append(lines, line) }})
	selectPIV(t, c)
	verifyPIN(t, c, PIN, swOK)
	wantSW(t, c, swOK, "00240080", padded(PIN), padded("654321"))
	wantSW(t, c, swOK, "002C0080", padded(PUK), padded("654321"))
	all := strings.Join(lines, "\n")
	for _, secret := range []string{PIN, PUK, "654321"} {
		if strings.Contains(strings.ToLower(all), hex.EncodeToString([]byte(secret))) {
			t.Errorf("a PIN is shown:\n%s", all)
		}
	}
	equal(t, "a line", lines[1], "00200080 [8 bytes] -> 9000")
}

func TestOptions(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]Options{
		"long PIN": {PIN: "123456789"}, "long PUK": {PUK: "123456789"}, "many tries": {Tries: 16}, "no tries": {Tries: -1},
		"place": {Keys: map[Ref]Key{0x9B: {}}}, "retired": {Keys: map[Ref]Key{Retired + 20: {}}}, "attestation": {Keys: map[Ref]Key{0xF9: {}}},
		"algorithm": {Keys: map[Ref]Key{Authentication: {Algorithm: 5}}}, "size": {Keys: map[Ref]Key{Authentication: {Private: other}}},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: made", name)
		}
	}
	one, two := newCard(t, Options{}), newCard(t, Options{})
	if one.Serial() == two.Serial() {
		t.Error("two cards have one number")
	}
	if err := one.SetPIN(""); err == nil {
		t.Error("no PIN is a PIN")
	}
	private, err := P256.generate()
	if err != nil {
		t.Fatal(err)
	}
	same := map[Ref]Key{Authentication: {Private: private}, CardAuthentication: {NoCertificate: true}}
	one, two = newCard(t, Options{Keys: same}), newCard(t, Options{Keys: same})
	if !public(t, one, Authentication).(*ecdsa.PublicKey).Equal(public(t, two, Authentication)) {
		t.Error("the key is another")
	}
	if one.Certificate(CardAuthentication) != nil {
		t.Error("there is a certificate")
	}
	for _, yubiKey := range []bool{false, true} {
		atr := newCard(t, Options{YubiKey: yubiKey}).ATR()
		check := byte(0)
		for _, b := range atr[1:] {
			check ^= b
		}
		equal(t, "check byte of the ATR", check, 0)
	}
}

// raise raises to the public exponent.
func raise(p *rsa.PublicKey, b []byte) []byte {
	n := new(big.Int).Exp(new(big.Int).SetBytes(b), big.NewInt(int64(p.E)), p.N)
	return n.FillBytes(make([]byte, p.Size()))
}

// A fakeReader is vpcd.
type fakeReader struct {
	*testing.T
	listener net.Listener
}

func newFakeReader(t *testing.T) *fakeReader {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &fakeReader{t, l}
}

func (r *fakeReader) accept() net.Conn {
	r.Helper()
	conn, err := r.listener.Accept()
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (r *fakeReader) write(conn net.Conn, message ...byte) {
	r.Helper()
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...)); err != nil {
		r.Fatal(err)
	}
}

// read reads a message, or nothing when the card has gone.
func (r *fakeReader) read(conn net.Conn) []byte {
	r.Helper()
	var n [2]byte
	if _, err := io.ReadFull(conn, n[:]); err != nil {
		return nil
	}
	b := make([]byte, binary.BigEndian.Uint16(n[:]))
	if _, err := io.ReadFull(conn, b); err != nil {
		r.Fatal(err)
	}
	return b
}

// present looks for a card as vpcd does.
func (r *fakeReader) present(conn net.Conn) bool {
	r.Helper()
	r.write(conn, controlATR)
	return len(r.read(conn)) > 0
}

// stays tells whether the card is not about to go.
func (s *Slot) stays() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.out
}

// untilCard looks until there is a card. The reader has to be empty at the first look, and
// a look that asks for something else than the ATR counts for nothing.
func (r *fakeReader) untilCard() net.Conn {
	r.Helper()
	conn := r.accept()
	r.write(conn, controlReset)
	_ = conn.Close()
	conn = r.accept()
	if r.present(conn) {
		r.Error("there was no moment without a card")
	}
	for !r.present(conn) {
		_ = conn.Close()
		conn = r.accept()
	}
	return conn
}

func TestSlot(t *testing.T) {
	r := newFakeReader(t)
	s := NewSlot(r.listener.Addr().String())
	defer s.Close()
	s.Remove() // nothing
	one, two := newCard(t, Options{}), newCard(t, Options{YubiKey: true})
	s.Insert(one)
	conn := r.accept()
	r.write(conn, controlOn)
	r.write(conn, controlATR)
	if got := r.read(conn); !bytes.Equal(got, one.ATR()) {
		t.Errorf("the ATR is %x", got)
	}
	r.write(conn, 0, Select, 4, 0, 5, 0xA0, 0, 0, 3, 8, 0)
	if got := r.read(conn); !bytes.HasSuffix(got, []byte{0x90, 0}) {
		t.Errorf("SELECT answers %x", got)
	}
	r.write(conn, controlReset)
	r.write(conn, controlOff)
	if !r.present(conn) {
		t.Error("the card is not there")
	}
	counts := one.Counts()
	equal(t, "resets", counts.Reset, 1)
	equal(t, "power on", counts.PowerUps, 1)
	equal(t, "power off", counts.PowerOffs, 1)

	s.Insert(two)
	equal(t, "the card in the slot", s.Card(), two)
	if r.present(conn) {
		t.Error("the first card is there still")
	}
	_ = conn.Close()
	conn = r.untilCard()
	r.write(conn, controlATR)
	if got := r.read(conn); !bytes.Equal(got, two.ATR()) {
		t.Errorf("the ATR is %x", got)
	}

	// A lost contact, and a malformed message: the card is there again.
	two.Inject(Fault{INS: GetData, Drop: true})
	r.write(conn, 0, GetData, 0x3F, 0xFF)
	if got := r.read(conn); got != nil {
		t.Errorf("a lost contact answers %x", got)
	}
	for range 2 {
		_ = conn.Close()
		conn = r.untilCard()
		r.write(conn, 99)
	}
	_ = conn.Close()

	// Taken out when the reader looks: until then it answers.
	conn = r.untilCard()
	ejected := make(chan struct{})
	go func() {
		s.Eject(t.Context())
		close(ejected)
	}()
	for s.stays() {
		time.Sleep(time.Millisecond)
	}
	r.write(conn, 0, Select, 4, 0, 5, 0xA0, 0, 0, 3, 8, 0)
	if got := r.read(conn); !bytes.HasSuffix(got, []byte{0x90, 0}) {
		t.Errorf("a card that is about to go answers SELECT with %x", got)
	}
	if r.present(conn) {
		t.Error("the card is there still")
	}
	<-ejected
	equal(t, "the card in the slot", s.Card(), nil)

	_ = conn.Close()
	_ = r.listener.Close()
	s.Close()
	s.Close()
	equal(t, "the card in the slot", s.Card(), nil)
}

func TestPulledInACommand(t *testing.T) {
	r := newFakeReader(t)
	s := NewSlot(r.listener.Addr().String())
	defer s.Close()
	c := newCard(t, Options{})
	var once sync.Once
	c.SetHook(func(Command) { once.Do(s.Remove) })
	s.Insert(c)
	conn := r.accept()
	r.write(conn, 0, Select, 4, 0, 5, 0xA0, 0, 0, 3, 8, 0)
	if got := r.read(conn); got != nil {
		t.Errorf("a pulled card answers %x", got)
	}
}

func FuzzCard(f *testing.F) {
	for _, seed := range []string{
		"00A40400 05 A000000308 00", "00CB3FFF 05 5C035FC105 00", "00200080", "00200080 08 313233343536FFFF",
		"0087119A 06 7C0482008100", "1087119A 02 7C04", "00C00000 00", "00F7009A 00", "00F99A00 00", "00240080 00", "0087149D 0000 05 7C03820085",
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(seed, " ", ""))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
	}
	c, err := New(Options{YubiKey: true, Trace: func(string) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, one, two []byte) {
		c.Reset()
		selectPIV(t, c)
		c.SetTries(3)
		for _, apdu := range [][]byte{one, two} {
			answer := c.Transmit(t.Context(), apdu)
			if len(answer) < 2 {
				t.Fatalf("%x is answered by %x", apdu, answer)
			}
			if cmd, ok := parseCommand(apdu); ok && len(answer) > cmd.le+2 {
				t.Errorf("%x asks for %d bytes and gets %d", apdu, cmd.le, len(answer))
			}
		}
	})
}
