package tokentest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"

	"p11-agent/token"
	"p11-agent/token/operation"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

// message is what the tests of operations sign and encrypt.
var message = []byte("a message that stays between two")

// decryptKey returns an RSA key that may decrypt.
func (s Subject) decryptKey(t *testing.T, st *token.Store) *token.Key {
	t.Helper()
	return Key(t, st, s.Token, cmp.Or(s.Decrypts, s.Keys[RSA2048]))
}

// deriveKeys returns the keys on NIST curves.
func (s Subject) deriveKeys(t *testing.T, st *token.Store) (all []*token.Key) {
	t.Helper()
	ids := []byte{s.Derives}
	if s.Derives == 0 {
		ids = []byte{s.Keys[P256], s.Keys[P384], s.Keys[P521]}
	}
	for _, id := range ids {
		if id != 0 {
			all = append(all, Key(t, st, s.Token, id))
		}
	}
	return all
}

// logIn logs in, so that the token shows what its keys may do.
func (s Subject) logIn(t *testing.T, st *token.Store) {
	t.Helper()
	if _, err := st.Login(t.Context(), nil, st.Keys(), Secret(t, s.PIN)); err != nil {
		t.Fatal(err)
	}
}

// A signing is a mechanism with which a key signs, for the standard library to verify.
type signing struct {
	mechanism uint64
	hash      crypto.Hash // of the mechanism, or of the data; 0 if nothing is hashed
	params    operation.Params
	data      []byte
}

// signings returns what to have a key sign.
func signings(pub crypto.PublicKey) (all []signing) {
	digest := func(h crypto.Hash) []byte {
		w := h.New()
		_, _ = w.Write(message)
		return w.Sum(nil)
	}
	pss := func(h crypto.Hash) operation.Params {
		for ckm, hash := range paramHashes {
			for ckg, mgf := range mgfHashes {
				if hash == h && mgf == h {
					return operation.PSS{Hash: ckm, MGF: ckg, SaltLength: uint64(h.Size())}
				}
			}
		}
		return nil
	}
	hashed := func(mechanisms ...uint64) {
		for i, m := range mechanisms {
			h := []crypto.Hash{crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512}[i]
			all = append(all, signing{mechanism: m, hash: h, data: message})
		}
	}
	switch pub.(type) {
	case *rsa.PublicKey:
		all = append(all, signing{mechanism: wire.CKMRSAPKCS, data: message})
		hashed(wire.CKMSHA1RSAPKCS, wire.CKMSHA224RSAPKCS, wire.CKMSHA256RSAPKCS, wire.CKMSHA384RSAPKCS, wire.CKMSHA512RSAPKCS)
		n := len(all)
		hashed(wire.CKMSHA1RSAPSS, wire.CKMSHA224RSAPSS, wire.CKMSHA256RSAPSS, wire.CKMSHA384RSAPSS, wire.CKMSHA512RSAPSS)
		for i := n; i < len(all); i++ {
			all[i].params = pss(all[i].hash)
		}
		for _, h := range []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA512} {
			all = append(all, signing{wire.CKMRSAPKCSPSS, h, pss(h), digest(h)})
		}
	case *ecdsa.PublicKey:
		all = append(all, signing{mechanism: wire.CKMECDSA, hash: crypto.SHA256, data: digest(crypto.SHA256)})
		hashed(wire.CKMECDSASHA1, wire.CKMECDSASHA224, wire.CKMECDSASHA256, wire.CKMECDSASHA384, wire.CKMECDSASHA512)
	case ed25519.PublicKey:
		all = append(all, signing{mechanism: wire.CKMEdDSA, data: message})
	}
	return all
}

// verify checks the signature as PKCS#11 encodes it.
func (s signing) verify(pub crypto.PublicKey, sig []byte) error {
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if p, ok := s.params.(operation.PSS); ok {
			return verify(pub, message, &rsa.PSSOptions{Hash: s.hash, SaltLength: int(p.SaltLength)}, sig)
		}
		if s.hash == 0 {
			return rsa.VerifyPKCS1v15(key, 0, s.data, sig)
		}
	case *ecdsa.PublicKey:
		n := (key.Params().BitSize + 7) / 8
		if len(sig) != 2*n {
			return errors.New("the signature has another length")
		}
		der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])})
		if err != nil {
			return err
		}
		sig = der
	}
	return verify(pub, message, s.hash, sig)
}

func testOperateSigns(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	for kind, id := range s.Keys {
		k := Key(t, st, s.Token, id)
		made := 0
		for _, want := range signings(k.Public()) {
			if s.TPM && want.hash == crypto.SHA224 {
				continue
			}
			if !k.Can(operation.Sign, want.mechanism) {
				t.Logf("%s: the token does not list mechanism %#x", kind, want.mechanism)
				continue
			}
			sig, err := k.Operate(t.Context(), operation.Operation{Mechanism: want.mechanism, Params: want.params, Data: want.data})
			if err == nil {
				err = want.verify(k.Public(), sig)
			}
			// Of the raw form of PSS, a token may know few hashes.
			if _, pss := want.params.(operation.PSS); pss && wire.IsRV(err, wire.CKRMechanismParamInvalid, wire.CKRArgumentsBad) {
				t.Logf("%s: the token does not take mechanism %#x with %v: %v", kind, want.mechanism, want.hash, err)
				continue
			}
			if err != nil {
				t.Errorf("%s, mechanism %#x, %v: %v", kind, want.mechanism, want.hash, err)
				continue
			}
			made++
		}
		if made == 0 {
			t.Errorf("%s: the token signs in no way", kind)
		}
		if n, _ := k.Signatures(); int(n) < made {
			t.Errorf("%s: %d signatures are counted of %d", kind, n, made)
		}
	}
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

// A ciphertext, and how to decrypt it.
type ciphertext struct {
	mechanism uint64
	params    operation.Params
	data      []byte
}

func ciphertexts(t *testing.T, pub *rsa.PublicKey) []ciphertext {
	t.Helper()
	//lint:ignore SA1019 clients still use it
	pkcs1, err := rsa.EncryptPKCS1v15(rand.Reader, pub, message)
	if err != nil {
		t.Fatal(err)
	}
	all := []ciphertext{{wire.CKMRSAPKCS, nil, pkcs1}}
	for _, o := range []operation.OAEP{
		{Hash: wire.CKMSHA1, MGF: wire.CKGMGF1SHA1},
		{Hash: wire.CKMSHA256, MGF: wire.CKGMGF1SHA256},
		{Hash: wire.CKMSHA256, MGF: wire.CKGMGF1SHA256, Source: []byte("label")},
	} {
		data, err := rsa.EncryptOAEP(paramHashes[o.Hash].New(), rand.Reader, pub, message, o.Source)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ciphertext{wire.CKMRSAPKCSOAEP, o, data})
	}
	return all
}

func (c ciphertext) decrypt(ctx context.Context, k *token.Key) ([]byte, error) {
	return k.Operate(ctx, operation.Operation{Function: operation.Decrypt, Mechanism: c.mechanism, Params: c.params, Data: c.data})
}

// Decrypt makes an RSA key decrypt a message that was encrypted for it (PKCS #1 v1.5), and checks the plaintext.
func Decrypt(ctx context.Context, k *token.Key) error {
	//lint:ignore SA1019 clients still use it
	data, err := rsa.EncryptPKCS1v15(rand.Reader, k.Public().(*rsa.PublicKey), message)
	if err != nil {
		return err
	}
	return ciphertext{wire.CKMRSAPKCS, nil, data}.check(ctx, k)
}

// check decrypts, and checks the plaintext.
func (c ciphertext) check(ctx context.Context, k *token.Key) error {
	got, err := c.decrypt(ctx, k)
	if err == nil && !bytes.Equal(got, message) {
		err = errors.New("the plaintext is wrong")
	}
	return err
}

func testDecrypts(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	// SoftHSM says that of a wrong padding.
	st := s.store(t, p, string(message), "decryption failed")
	k := s.decryptKey(t, st)
	all := ciphertexts(t, k.Public().(*rsa.PublicKey))
	for _, c := range all {
		if o, ok := c.params.(operation.OAEP); ok && s.TPM && len(o.Source) > 0 {
			continue
		}
		if !k.Can(operation.Decrypt, c.mechanism) {
			t.Logf("the token does not list mechanism %#x", c.mechanism)
			continue
		}
		err := c.check(t.Context(), k)
		// SoftHSM 2.6 knows OAEP with SHA-1 and without a label only.
		if o, ok := c.params.(operation.OAEP); ok && o.Hash != wire.CKMSHA1 &&
			wire.IsRV(err, wire.CKRMechanismParamInvalid, wire.CKRArgumentsBad, wire.CKRMechanismInvalid) {
			t.Logf("the token does not take OAEP with these parameters: %v", err)
			continue
		}
		if err != nil {
			t.Errorf("mechanism %#x, %+v: %v", c.mechanism, c.params, err)
		}
	}
	// Of a wrong ciphertext, the error does not tell what is wrong.
	pids := st.Modules()[0].PID
	for i, c := range all[:2] {
		if !k.Can(operation.Decrypt, c.mechanism) {
			continue
		}
		c.data = slices.Clone(c.data)
		c.data[len(c.data)-1] ^= 1
		want := "decrypt with token \"" + s.Token + "\": " + operation.ErrCiphertext.Error()
		// A wrong padding of PKCS #1 may be right by chance, and a token may answer with random bytes.
		if _, err := c.decrypt(t.Context(), k); (err != nil || i > 0) && (!errors.Is(err, operation.ErrCiphertext) || err.Error() != want) {
			t.Errorf("a wrong ciphertext: %v", err)
		}
	}
	if st.Modules()[0].PID != pids {
		t.Error("a wrong ciphertext costs the module process")
	}
	if err := all[0].check(t.Context(), k); err != nil {
		t.Errorf("after a wrong one: %v", err)
	}
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
	if n, _ := k.Signatures(); n != 0 {
		t.Errorf("%d signatures are counted", n)
	}
}

// Derive makes a key derive secrets, and compares them with those of crypto/ecdh.
func Derive(ctx context.Context, k *token.Key) error {
	pub, err := k.Public().(*ecdsa.PublicKey).ECDH()
	if err != nil {
		return err
	}
	own, err := pub.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	want, err := own.ECDH(pub)
	if err != nil {
		return err
	}
	der, err := asn1.Marshal(own.PublicKey().Bytes())
	if err != nil {
		return err
	}
	for _, point := range [][]byte{own.PublicKey().Bytes(), der} {
		got, err := k.Operate(ctx, derivation(point))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errors.New("the secret is wrong")
		}
	}
	return nil
}

func derivation(point []byte) operation.Operation {
	return operation.Operation{
		Function: operation.Derive, Mechanism: wire.CKMECDH1Derive, Params: operation.ECDH1{KDF: wire.CKDNull, Public: point},
	}
}

func testDerives(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	keys := s.deriveKeys(t, st)
	for _, k := range keys {
		for range 3 {
			err := Derive(t.Context(), k)
			if s.NoDerive {
				if err == nil {
					t.Error("it derives")
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", k, err)
			}
		}
	}
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

func testOperateRefuses(t *testing.T, s Subject) {
	st := s.store(t, nil) // without an asker, each error comes before any PIN
	refused := func(what string, k *token.Key, op operation.Operation, want error) {
		t.Helper()
		if _, err := k.Operate(t.Context(), op); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	k := s.key(t, st)
	for name, op := range map[string]operation.Operation{
		"decrypt with an EC key": {Function: operation.Decrypt, Mechanism: wire.CKMRSAPKCS, Data: make([]byte, 256)},
		"derive with ECDSA":      {Function: operation.Derive, Mechanism: wire.CKMECDSA},
		"sign with ECDH":         {Mechanism: wire.CKMECDH1Derive, Params: operation.ECDH1{KDF: wire.CKDNull}},
		"an unknown function":    {Function: 7, Mechanism: wire.CKMECDSA, Data: make([]byte, 32)},
		"an unknown mechanism":   {Mechanism: 0x8000_0001, Data: make([]byte, 32)},
	} {
		refused(name, k, op, operation.ErrMechanism)
	}
	other, err := ecdh.P521().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	off := make([]byte, 65)
	off[0] = 4
	if k.May(operation.Derive) {
		refused("the point of another curve", k, derivation(other.PublicKey().Bytes()), operation.ErrParams)
		refused("a point off the curve", k, derivation(off), operation.ErrParams)
	}
	if _, err := k.Operate(t.Context(), operation.Operation{Mechanism: wire.CKMECDSA, Data: make([]byte, 32)}); err == nil {
		t.Error("it signs without a PIN")
	} else if e, ok := errors.AsType[*pin.Error](err); !ok || e.Tried {
		t.Errorf("without an asker: %v", err)
	}

	// The token tells after the login what its keys may do.
	s.logIn(t, st)
	for _, k := range st.Keys() {
		for f, op := range map[operation.Function]operation.Operation{
			operation.Decrypt: {Function: operation.Decrypt, Mechanism: wire.CKMRSAPKCS, Data: make([]byte, 256)},
			operation.Derive:  derivation(nil),
		} {
			if ways := operation.Ways(k.Public(), f, op.Mechanism); ways == nil || k.May(f) {
				continue
			}
			if pub, ok := k.Public().(*ecdsa.PublicKey); ok {
				point, err := pub.Bytes()
				if err != nil {
					t.Fatal(err)
				}
				op = derivation(point)
			}
			refused("a key that may not", k, op, operation.ErrNotPermitted)
		}
	}
}

func testOperateCancelled(t *testing.T, s Subject) {
	wait := make(chan struct{})
	p := &Person{Always: s.PIN, Wait: wait}
	st := s.store(t, p)
	k := s.decryptKey(t, st)
	c := ciphertexts(t, k.Public().(*rsa.PublicKey))[0]
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- c.check(ctx, k) }()
	p.Until(t, func() bool { return p.Prompts() == 1 })
	cancel()
	if err := <-end; !errors.Is(err, context.Canceled) {
		t.Errorf("at the prompt: %v", err)
	}
	p.Until(t, func() bool { return p.Open() == 0 })
	close(wait)
	if err := c.check(t.Context(), k); err != nil {
		t.Error(err)
	}
	if err := c.check(ctx, k); !errors.Is(err, context.Canceled) {
		t.Errorf("before it begins: %v", err)
	}
}

func testKilledWhileDecrypting(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	k := s.decryptKey(t, st)
	c := ciphertexts(t, k.Public().(*rsa.PublicKey))[0]
	if err := c.check(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	ctx, fail := context.WithCancel(t.Context())
	defer fail()
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for {
				if err := c.check(t.Context(), k); err != nil {
					t.Error(err)
					fail()
					return
				}
				select {
				case done <- struct{}{}:
				case <-stop:
					return
				}
			}
		})
	}
	some := func() {
		for range 5 {
			select {
			case <-done:
			case <-ctx.Done():
			}
		}
	}
	some()
	kill(t, st)
	some()
	close(stop)
	all.Wait()
	if n := p.Prompts(); n > 2 {
		t.Errorf("%d prompts, want no more than 2", n)
	}
}
