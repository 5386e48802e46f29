package agent

import (
	"bytes"
	"encoding/asn1"
	"math/big"
	"testing"

	"golang.org/x/crypto/ssh"
)

// FuzzECDSA compares parseECDSA with encoding/asn1. parseECDSA takes a signature if asn1
// reads two positive numbers from it, and returns the same numbers.
func FuzzECDSA(f *testing.F) {
	for _, size := range []int{1, 28, 32, 48, 66} { // that of P-521 has a long length
		for _, first := range []byte{0x01, 0x7f, 0x80, 0xff} {
			n := new(big.Int).SetBytes(append([]byte{first}, bytes.Repeat([]byte{7}, size-1)...))
			sig, err := asn1.Marshal(struct{ R, S *big.Int }{n, n})
			if err != nil {
				f.Fatal(err)
			}
			f.Add(sig)
			f.Add(sig[:len(sig)-1])
			f.Add(append(sig, 0))
		}
	}
	for _, odd := range []string{
		"", "\x30", "\x30\x00", "\x30\x80", "\x31\x06\x02\x01\x01\x02\x01\x01",
		"\x30\x06\x02\x01\x00\x02\x01\x01", "\x30\x06\x02\x01\x80\x02\x01\x01", // 0, and less
		"\x30\x07\x02\x02\x00\x01\x02\x01\x01", "\x30\x81\x06\x02\x01\x01\x02\x01\x01", // not as short as they can be
		"\x30\x05\x02\x00\x02\x01\x01", "\x30\x09\x02\x01\x01\x02\x01\x01\x02\x01\x01", "\x30\x06\x02\x01\x01\x02\x02\x01",
	} {
		f.Add([]byte(odd))
	}
	key := publicOf(f, newStillKey(f, 1))
	f.Fuzz(func(t *testing.T, sig []byte) {
		_, _, ok := parseECDSA(sig)
		var want struct{ R, S *big.Int }
		rest, err := asn1.Unmarshal(sig, &want)
		valid := err == nil && len(rest) == 0 && want.R.Sign() > 0 && want.S.Sign() > 0
		if valid {
			again, err := asn1.Marshal(want) // Unmarshal overlooks bytes after the two numbers
			valid = err == nil && bytes.Equal(again, sig)
		}
		if content := len(sig) - 3; content > 255 {
			valid = false // no curve that SSH has is that large
		}
		if ok != valid {
			t.Fatalf("%x: taken %v, want %v", sig, ok, valid)
		}
		if !ok {
			return
		}
		got, err := signatureBlob(key, sig)
		if want := ssh.Marshal(want); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%x becomes %x, %v, want %x", sig, got, err, want)
		}
	})
}
