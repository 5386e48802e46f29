package operation

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
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

var (
	rsaKey    = must(rsa.GenerateKey(rand.Reader, 2048))
	p256      = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384      = must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	p521      = must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	_, edKey  = must2(ed25519.GenerateKey(rand.Reader))
	sha256PSS = PSS{wire.CKMSHA256, wire.CKGMGF1SHA256, 32}
)

func must2[A, B any](a A, b B, err error) (A, B) {
	if err != nil {
		panic(err)
	}
	return a, b
}

// raw signs the way a token does: ECDSA as two numbers of the curve's length.
func raw(t *testing.T, key crypto.Signer, p Plan) []byte {
	t.Helper()
	var opts crypto.SignerOpts = p.signature.hash
	if p.signature.pss {
		opts = &rsa.PSSOptions{Hash: p.signature.hash, SaltLength: p.signature.verifySalt}
	}
	sig := must(key.Sign(rand.Reader, p.signature.digest, opts))
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

func TestForMessage(t *testing.T) {
	pss := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthAuto}
	for name, tt := range map[string]struct {
		key  crypto.Signer
		opts crypto.SignerOpts
		want []uint64
		data []int // lengths
	}{
		"RSA":     {rsaKey, crypto.SHA512, []uint64{wire.CKMRSAPKCS, wire.CKMSHA512RSAPKCS}, []int{19 + 64, 7}},
		"RSA-PSS": {rsaKey, pss, []uint64{wire.CKMRSAPKCSPSS, wire.CKMSHA256RSAPSS}, []int{32, 7}},
		"ECDSA":   {p256, crypto.SHA512, []uint64{wire.CKMECDSA, wire.CKMECDSASHA512}, []int{32, 7}},
		"Ed25519": {edKey, crypto.Hash(0), []uint64{wire.CKMEdDSA}, []int{7}},
	} {
		t.Run(name, func(t *testing.T) {
			pub := tt.key.Public()
			p, err := ForMessage(pub, []byte("message"), tt.opts)
			if err != nil || len(p.Methods) != len(tt.want) {
				t.Fatalf("%d methods, %v", len(p.Methods), err)
			}
			for i, m := range p.Methods {
				if m.Mechanism != tt.want[i] || len(m.Data) != tt.data[i] || !Uses(m.Mechanism) {
					t.Errorf("method %d: mechanism %#x with %d bytes", i, m.Mechanism, len(m.Data))
				}
			}
			sig := raw(t, tt.key, p)
			if uint32(len(sig)) != p.ResultLen {
				t.Errorf("ResultLen is %d, but the signature has %d bytes", p.ResultLen, len(sig))
			}
			encoded, err := p.Result(sig)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Verify(encoded); err != nil {
				t.Error(err)
			}
			other := must(ForMessage(pub, []byte("another"), tt.opts))
			if err := other.Verify(encoded); !errors.Is(err, ErrWrong) {
				t.Errorf("the signature of another message: %v", err)
			}
			if _, err := p.Result(nil); !errors.Is(err, ErrWrong) {
				t.Errorf("an empty signature: %v", err)
			}
		})
	}
}

func TestForDigestOfSHA1PSS(t *testing.T) {
	opts := &rsa.PSSOptions{Hash: crypto.SHA1, SaltLength: 11}
	p, err := ForDigest(rsaKey.Public(), make([]byte, 20), opts)
	if err != nil || len(p.Methods) != 1 || !p.DigestOnly {
		t.Fatalf("%d methods, %v", len(p.Methods), err)
	}
	var req wire.Operate
	p.Methods[0].Describe(&req)
	if want := (wire.Params{Hash: wire.CKMSHA1, MGF: wire.CKGMGF1SHA1, Salt: 11}); !reflect.DeepEqual(req.Params, want) {
		t.Errorf("parameters %+v", req.Params)
	}
}

func TestRefusedSignatures(t *testing.T) {
	if _, err := ForDigest(rsaKey.Public(), make([]byte, 20), crypto.SHA256); err == nil {
		t.Error("a digest of the wrong length is accepted")
	}
	for name, opts := range map[string]crypto.SignerOpts{
		"digest":  crypto.SHA512,
		"context": &ed25519.Options{Context: "context"},
	} {
		if _, err := ForDigest(edKey.Public(), make([]byte, 64), opts); err == nil {
			t.Errorf("Ed25519 with a %s is accepted", name)
		}
	}
	for _, h := range []crypto.Hash{0, crypto.MD5} {
		if _, err := ForDigest(rsaKey.Public(), make([]byte, 16), h); err == nil {
			t.Errorf("hash %v is accepted", h)
		}
	}
}

func TestResultRestoresLeadingZeros(t *testing.T) {
	p := must(ForDigest(rsaKey.Public(), make([]byte, 32), crypto.SHA256))
	sig, err := p.Result([]byte{1, 2, 3})
	if err != nil || len(sig) != 256 || sig[255] != 3 {
		t.Errorf("%d bytes, %v", len(sig), err)
	}
	ec := must(For(p521.Public(), Operation{Mechanism: wire.CKMECDSA, Data: []byte("digest")}))
	sig, err = ec.Result([]byte{1, 2}) // r and s
	if err != nil || len(sig) != 132 || sig[65] != 1 || sig[131] != 2 {
		t.Errorf("%x, %v", sig, err)
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

// paramsFor returns parameters that fit a row of the table, and data.
func paramsFor(u use, how scheme) (Params, []byte) {
	hash := how.hash
	if hash == 0 {
		hash = crypto.SHA256
	}
	data := []byte("the data")
	switch how.params {
	case pss:
		if how.hash == 0 {
			data = make([]byte, hash.Size())
		}
		return PSS{hashes[hash].ckm, hashes[hash].mgf, 20}, data
	case oaep:
		return OAEP{Hash: wire.CKMSHA256, MGF: wire.CKGMGF1SHA1, Source: []byte("label")}, make([]byte, 256)
	case ecdh1:
		return ECDH1{KDF: wire.CKDNull, Public: must(p256.ECDH()).PublicKey().Bytes()}, nil
	}
	if u.function == Decrypt {
		data = make([]byte, 256)
	}
	return nil, data
}

var byType = map[uint64]crypto.Signer{wire.CKKRSA: rsaKey, wire.CKKEC: p256, wire.CKKECEdwards: edKey}

// Each row of the table works as it is, and with no other function, key or parameters.
func TestTable(t *testing.T) {
	if len(table) != 22 {
		t.Errorf("the table has %d rows", len(table))
	}
	for u, how := range table {
		params, data := paramsFor(u, how)
		op := Operation{u.function, u.mechanism, params, data}
		key := byType[u.keyType]
		p, err := For(key.Public(), op)
		if err != nil {
			t.Errorf("%v: %v", u, err)
			continue
		}
		if p.Function != u.function || p.Methods[len(p.Methods)-1].Mechanism != u.mechanism {
			t.Errorf("%v: a plan for %v with %#x", u, p.Function, p.Methods[len(p.Methods)-1].Mechanism)
		}
		if how.hash != 0 && (len(p.Methods) != 2 || p.DigestOnly) {
			t.Errorf("%v: %d methods: it cannot be composed", u, len(p.Methods))
		}
		var ways []uint64
		for _, m := range p.Methods {
			ways = append(ways, m.Mechanism)
		}
		if got := Ways(key.Public(), u.function, u.mechanism); !slices.Equal(got, ways) {
			t.Errorf("%v: ways %#x, and the methods have %#x", u, got, ways)
		}
		if u.function == Sign {
			sig, err := p.Result(raw(t, key, p))
			if err == nil {
				err = p.Verify(sig)
			}
			if err != nil || len(sig) != int(p.ResultLen) {
				t.Errorf("%v: %d bytes, %v", u, len(sig), err)
			}
			sig[len(sig)-1] ^= 1
			if err := p.Verify(sig); !errors.Is(err, ErrWrong) {
				t.Errorf("%v: a wrong signature: %v", u, err)
			}
		}
		for keyType, other := range byType {
			for _, f := range []Function{Sign, Decrypt, Derive, 3} {
				if _, ok := table[use{f, u.mechanism, keyType}]; ok {
					continue
				}
				if ways := Ways(other.Public(), f, u.mechanism); ways != nil {
					t.Errorf("%v as %v with %T: ways %#x", u, f, other, ways)
				}
				op := op
				op.Function = f
				if _, err := For(other.Public(), op); !errors.Is(err, ErrMechanism) {
					t.Errorf("%v as %v with %T: %v", u, f, other, err)
				}
			}
		}
		for _, other := range []Params{nil, sha256PSS, OAEP{}, ECDH1{}} {
			if paramsOf(other) == how.params {
				continue
			}
			op := op
			op.Params = other
			if _, err := For(key.Public(), op); !errors.Is(err, ErrParams) {
				t.Errorf("%v with %T: %v", u, other, err)
			}
		}
	}
}

func TestForRefuses(t *testing.T) {
	const dec, der = wire.CKMRSAPKCSOAEP, wire.CKMECDH1Derive
	point := func(k *ecdsa.PrivateKey) []byte { return must(k.ECDH()).PublicKey().Bytes() }
	offCurve := point(p256)
	offCurve[64] ^= 1
	for name, tt := range map[string]struct {
		key  crypto.Signer
		op   Operation
		want error
	}{
		"raw RSA signature":         {rsaKey, Operation{Sign, 0x0003, nil, make([]byte, 256)}, ErrMechanism},
		"raw RSA decryption":        {rsaKey, Operation{Decrypt, 0x0003, nil, make([]byte, 256)}, ErrMechanism},
		"signature of nothing":      {rsaKey, Operation{Sign, wire.CKMRSAPKCS, nil, nil}, ErrData},
		"signature of too much":     {rsaKey, Operation{Sign, wire.CKMRSAPKCS, nil, make([]byte, 246)}, ErrData},
		"message too long":          {rsaKey, Operation{Sign, wire.CKMSHA256RSAPKCS, nil, make([]byte, MaxData+1)}, ErrData},
		"digest too long":           {p256, Operation{Sign, wire.CKMECDSA, nil, make([]byte, maxDigest+1)}, ErrData},
		"digest of nothing":         {p256, Operation{Sign, wire.CKMECDSA, nil, nil}, ErrData},
		"PSS of another length":     {rsaKey, Operation{Sign, wire.CKMRSAPKCSPSS, sha256PSS, make([]byte, 31)}, ErrData},
		"PSS with another function": {rsaKey, Operation{Sign, wire.CKMRSAPKCSPSS, PSS{wire.CKMSHA256, wire.CKGMGF1SHA1, 32}, make([]byte, 32)}, ErrParams},
		"PSS with an unknown hash":  {rsaKey, Operation{Sign, wire.CKMRSAPKCSPSS, PSS{0x210, 9, 16}, make([]byte, 16)}, ErrParams},
		"PSS with a long salt":      {rsaKey, Operation{Sign, wire.CKMRSAPKCSPSS, PSS{wire.CKMSHA256, wire.CKGMGF1SHA256, 223}, make([]byte, 32)}, ErrParams},
		"PSS with another hash":     {rsaKey, Operation{Sign, wire.CKMSHA512RSAPSS, sha256PSS, []byte("message")}, ErrParams},
		"short ciphertext":          {rsaKey, Operation{Decrypt, wire.CKMRSAPKCS, nil, make([]byte, 255)}, ErrData},
		"long ciphertext":           {rsaKey, Operation{Decrypt, wire.CKMRSAPKCS, nil, make([]byte, 257)}, ErrData},
		"OAEP with unknown hash":    {rsaKey, Operation{Decrypt, dec, OAEP{Hash: 0x210, MGF: 1}, make([]byte, 256)}, ErrParams},
		"OAEP with unknown mask":    {rsaKey, Operation{Decrypt, dec, OAEP{Hash: wire.CKMSHA1, MGF: 9}, make([]byte, 256)}, ErrParams},
		"OAEP with a long label":    {rsaKey, Operation{Decrypt, dec, OAEP{wire.CKMSHA1, wire.CKGMGF1SHA1, make([]byte, MaxSource+1)}, make([]byte, 256)}, ErrParams},
		"ECDH with a KDF":           {p256, Operation{Derive, der, ECDH1{KDF: 2, Public: point(p256)}, nil}, ErrParams},
		"ECDH with shared data":     {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Shared: []byte{1}, Public: point(p256)}, nil}, ErrParams},
		"ECDH with data":            {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Public: point(p256)}, []byte{1}}, ErrData},
		"point of another curve":    {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Public: point(p384)}, nil}, ErrParams},
		"point off the curve":       {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Public: offCurve}, nil}, ErrParams},
		"point at infinity":         {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Public: []byte{0}}, nil}, ErrParams},
		"compressed point":          {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull, Public: elliptic.MarshalCompressed(p256.Curve, p256.X, p256.Y)}, nil}, ErrParams},
		"no point":                  {p256, Operation{Derive, der, ECDH1{KDF: wire.CKDNull}, nil}, ErrParams},
	} {
		if p, err := For(tt.key.Public(), tt.op); !errors.Is(err, tt.want) || len(p.Methods) != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The empty message has a signature.
func TestEmptyMessage(t *testing.T) {
	p, err := For(p256.Public(), Operation{Sign, wire.CKMECDSASHA256, nil, nil})
	if err != nil || len(p.Methods) != 2 || p.DigestOnly {
		t.Errorf("%+v, %v", p.Methods, err)
	}
}

func TestPeerPoint(t *testing.T) {
	for _, key := range []*ecdsa.PrivateKey{p256, p384, p521} {
		own := must(key.ECDH())
		peer := must(own.Curve().GenerateKey(rand.Reader)).PublicKey().Bytes()
		der := must(asn1.Marshal(peer))
		for _, given := range [][]byte{peer, der} {
			p, err := For(key.Public(), Operation{Derive, wire.CKMECDH1Derive, ECDH1{KDF: wire.CKDNull, Public: given}, nil})
			if err != nil || !bytes.Equal(p.Methods[0].Data, peer) || int(p.ResultLen) != coordinateSize(&key.PublicKey) {
				t.Errorf("%d bytes: %v", len(given), err)
				continue
			}
			secret := make([]byte, p.ResultLen)
			if got, err := p.Result(secret); err != nil || &got[0] != &secret[0] {
				t.Errorf("the result is a copy, or %v", err)
			}
			if _, err := p.Result(secret[1:]); err == nil {
				t.Error("a short secret is accepted")
			}
		}
	}
}

// No point reaches a token that crypto/ecdh does not take.
func FuzzPeerPoint(f *testing.F) {
	f.Add(must(p256.ECDH()).PublicKey().Bytes())
	f.Add(must(asn1.Marshal(must(p256.ECDH()).PublicKey().Bytes())))
	f.Add(must(p384.ECDH()).PublicKey().Bytes())
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, point []byte) {
		p, err := For(p256.Public(), Operation{Derive, wire.CKMECDH1Derive, ECDH1{KDF: wire.CKDNull, Public: point}, nil})
		if err != nil {
			return
		}
		if _, err := ecdh.P256().NewPublicKey(p.Methods[0].Data); err != nil {
			t.Error(err)
		}
	})
}
