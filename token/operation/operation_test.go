package operation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // for RSA with SHA-1
	"encoding/asn1"
	"errors"
	"math/big"
	"reflect"
	"slices"
	"testing"

	"p11-agent/token/wire"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// raw signs the way a token does: ECDSA as two numbers of the curve's length.
func raw(t *testing.T, key crypto.Signer, r Request) []byte {
	t.Helper()
	sig := must(key.Sign(rand.Reader, r.Digest, r.Options))
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return sig
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(sig, &rs); err != nil {
		t.Fatal(err)
	}
	n := coordinateSize(&ec.PublicKey)
	return slices.Concat(rs.R.FillBytes(make([]byte, n)), rs.S.FillBytes(make([]byte, n)))
}

func TestMethods(t *testing.T) {
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	pss := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthAuto}
	for name, tt := range map[string]struct {
		key  crypto.Signer
		opts crypto.SignerOpts
		want []uint64
		data []int // lengths
	}{
		"RSA":     {rsaKey, crypto.SHA512, []uint64{wire.CKMRSAPKCS, wire.CKMSHA512RSAPKCS}, []int{19 + 64, 7}},
		"RSA-PSS": {rsaKey, pss, []uint64{wire.CKMRSAPKCSPSS, wire.CKMSHA256RSAPSS}, []int{32, 7}},
		"ECDSA": {
			must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), crypto.SHA512,
			[]uint64{wire.CKMECDSA, wire.CKMECDSASHA512},
			[]int{32, 7},
		},
		"Ed25519": {edKey, crypto.Hash(0), []uint64{wire.CKMEdDSA}, []int{7}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := ForMessage([]byte("message"), tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			methods, err := r.Methods(tt.key.Public())
			if err != nil || len(methods) != len(tt.want) {
				t.Fatalf("%d methods, %v", len(methods), err)
			}
			for i, m := range methods {
				if m.Mechanism != tt.want[i] || len(m.Data) != tt.data[i] || !Uses(m.Mechanism) {
					t.Errorf("method %d: mechanism %#x with %d bytes", i, m.Mechanism, len(m.Data))
				}
			}
			sig := raw(t, tt.key, r)
			if uint32(len(sig)) != Length(tt.key.Public()) {
				t.Errorf("Length is %d, but the signature has %d bytes", Length(tt.key.Public()), len(sig))
			}
			encoded, err := Encode(tt.key.Public(), sig)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Verify(tt.key.Public(), encoded); err != nil {
				t.Error(err)
			}
			other := must(ForMessage([]byte("another"), tt.opts))
			if err := other.Verify(tt.key.Public(), encoded); !errors.Is(err, ErrWrong) {
				t.Errorf("the signature of another message: %v", err)
			}
			if _, err := Encode(tt.key.Public(), nil); !errors.Is(err, ErrWrong) {
				t.Errorf("an empty signature: %v", err)
			}
		})
	}
}

func TestMethodsOfSHA1PSS(t *testing.T) {
	key := must(rsa.GenerateKey(rand.Reader, 2048))
	opts := &rsa.PSSOptions{Hash: crypto.SHA1, SaltLength: 11}
	methods, err := must(ForMessage([]byte("message"), opts)).Methods(key.Public())
	if err != nil || len(methods) != 1 {
		t.Fatalf("%d methods, %v", len(methods), err)
	}
	var req wire.Operate
	methods[0].Describe(&req)
	if want := (wire.Params{Hash: wire.CKMSHA1, MGF: wire.CKGMGF1SHA1, Salt: 11}); !reflect.DeepEqual(req.Params, want) {
		t.Errorf("parameters %+v", methods[0].pss)
	}
}

func TestRefusedRequests(t *testing.T) {
	if _, err := ForDigest(make([]byte, 20), crypto.SHA256); err == nil {
		t.Error("a digest of the wrong length is accepted")
	}
	public, _, _ := ed25519.GenerateKey(rand.Reader)
	for name, opts := range map[string]crypto.SignerOpts{
		"digest":  crypto.SHA512,
		"context": &ed25519.Options{Context: "context"},
	} {
		if _, err := (Request{Digest: make([]byte, 64), Options: opts}).Methods(public); err == nil {
			t.Errorf("Ed25519 with a %s is accepted", name)
		}
	}
	key := must(rsa.GenerateKey(rand.Reader, 2048))
	if _, err := (Request{Digest: make([]byte, 16), Options: crypto.MD5}).Methods(key.Public()); err == nil {
		t.Error("MD5 is accepted")
	}
}

func TestEncodeRestoresLeadingZeros(t *testing.T) {
	key := must(rsa.GenerateKey(rand.Reader, 2048))
	sig, err := Encode(key.Public(), []byte{1, 2, 3})
	if err != nil || len(sig) != 256 || sig[255] != 3 {
		t.Errorf("%d bytes, %v", len(sig), err)
	}
}

func TestPrefer(t *testing.T) {
	refused := func(mechanism uint64) bool { return mechanism%2 == 1 }
	var got []uint64
	for _, m := range Prefer([]Method{{Mechanism: 1}, {Mechanism: 2}, {Mechanism: 3}, {Mechanism: 4}}, refused) {
		got = append(got, m.Mechanism)
	}
	if want := []uint64{2, 4, 1, 3}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}
