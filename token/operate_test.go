package token_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"p11-agent/token"
	"p11-agent/token/operation"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// encrypted returns an operation that decrypts "secret".
func encrypted(t *testing.T, k *token.Key) operation.Operation {
	t.Helper()
	//lint:ignore SA1019 clients still use it
	data, err := rsa.EncryptPKCS1v15(rand.Reader, k.Public().(*rsa.PublicKey), []byte("secret"))
	noError(t, err)
	return operation.Operation{Function: operation.Decrypt, Mechanism: wire.CKMRSAPKCS, Data: data}
}

// derivation returns an operation that derives with the key's own point.
func derivation(t *testing.T, k *token.Key) operation.Operation {
	t.Helper()
	point, err := k.Public().(*ecdsa.PublicKey).Bytes()
	noError(t, err)
	return operation.Operation{
		Function: operation.Derive, Mechanism: wire.CKMECDH1Derive, Params: operation.ECDH1{KDF: wire.CKDNull, Public: point},
	}
}

// The keys of an operationBench.
const (
	ecKey  = 1
	rsaKey = 2
)

// newOperationBench makes a bench with an EC key and an RSA key.
func newOperationBench(t *testing.T, p *tokentest.Person, set func(k *tokentest.FakeKey), more func(b *bench, opts *token.Options)) *bench {
	return newBench(t, p, func(b *bench, opts *token.Options) {
		b.card.AddKey(tokentest.RSA2048, rsaKey, "two", set)
		if set != nil {
			b.card.Change(ecKey, set)
		}
		if more != nil {
			more(b, opts)
		}
	})
}

// A key with CKA_ALWAYS_AUTHENTICATE wants the PIN for each decryption. PKCS#11 does not say so of derivations, but
// some tokens do.
func TestOperateAlwaysAuthenticate(t *testing.T) {
	for _, derives := range []bool{false, true} {
		p := &tokentest.Person{Always: rightPIN}
		b := newOperationBench(t, p, func(k *tokentest.FakeKey) { k.Always, k.Derives = true, derives }, nil)
		k := b.key(rsaKey)
		decrypt := encrypted(t, k)
		for n := 1; n <= 2; n++ {
			got, err := k.Operate(t.Context(), decrypt)
			if err != nil || string(got) != "secret" {
				t.Fatalf("%q, %v", got, err)
			}
			want(t, "prompts", p.Prompts(), n)
		}
		k = b.key(ecKey)
		for n := 1; n <= 2; n++ {
			_, err := k.Operate(t.Context(), derivation(t, k))
			noError(t, err)
			prompts := 2
			if derives {
				prompts += n
			}
			want(t, "prompts", p.Prompts(), prompts)
		}
		want(t, "wrong PINs", b.card.Wrong(), 0)
	}
}

// The token works during each function.
func TestOperateWorking(t *testing.T) {
	w := new(work)
	b := newOperationBench(t, &tokentest.Person{Always: rightPIN}, nil, func(_ *bench, opts *token.Options) { opts.Working = w.begin })
	_, err := b.key(rsaKey).Operate(t.Context(), encrypted(t, b.key(rsaKey)))
	noError(t, err)
	w.want(t, "after a decryption", 1, 0)
	_, err = b.key(ecKey).Operate(t.Context(), derivation(t, b.key(ecKey)))
	noError(t, err)
	w.want(t, "after a derivation", 2, 0)
	_, last := b.key(rsaKey).Signatures()
	if !last.IsZero() {
		t.Error("a decryption counts as a signature")
	}
}

// The agent repairs what breaks during a decryption or derivation, but never sends a ciphertext twice that the token
// has refused.
func TestOperateHeals(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(p *tokentest.FakeProcess, r wire.Request)
		want int // requests; 1: it fails
	}{
		{"crash", func(p *tokentest.FakeProcess, _ wire.Request) { p.Kill() }, 2},
		{"session lost", func(p *tokentest.FakeProcess, r wire.Request) {
			p.Fail(r, &wire.Error{Function: "C_Decrypt", RV: wire.CKRSessionHandleInvalid})
		}, 2},
		{"card reset", func(p *tokentest.FakeProcess, r wire.Request) {
			p.Fail(r, &wire.Error{Function: "C_DeriveKey", RV: wire.CKRDeviceError})
		}, 2},
		{"logged out", func(p *tokentest.FakeProcess, r wire.Request) {
			p.Fail(r, &wire.Error{Function: "C_DecryptInit", RV: wire.CKRUserNotLoggedIn})
		}, 2},
		{"refused", func(p *tokentest.FakeProcess, r wire.Request) {
			p.Fail(r, &wire.Error{Function: "C_Decrypt", Reason: wire.ReasonCiphertext})
		}, 1},
	} {
		for _, id := range []byte{ecKey, rsaKey} {
			p := &tokentest.Person{Always: rightPIN}
			b := newOperationBench(t, p, nil, nil)
			k := b.key(id)
			op := operation.Operation{}
			if id == rsaKey {
				op = encrypted(t, k)
			} else {
				op = derivation(t, k)
			}
			var requests atomic.Int32
			b.fake.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
				if r.Type != wire.TypeOperate || requests.Add(1) > 1 {
					return false
				}
				tt.fail(p, r)
				return true
			})
			_, err := k.Operate(t.Context(), op)
			if tt.want == 1 {
				if !errors.Is(err, operation.ErrCiphertext) {
					t.Errorf("%s: %v", tt.name, err)
				}
			} else if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			want(t, tt.name+": requests", int(requests.Load()), tt.want)
		}
	}
}

// A key does what the token says that it may do, whether before or after a login.
func TestOperateNotPermitted(t *testing.T) {
	for _, shown := range []bool{true, false} {
		p := &tokentest.Person{Always: rightPIN}
		b := newOperationBench(t, p, func(k *tokentest.FakeKey) { k.NoDecrypt, k.NoDerive, k.Public = true, true, shown }, nil)
		before := b.fake.Requests(wire.TypeOperate)
		_, err := b.key(rsaKey).Operate(t.Context(), encrypted(t, b.key(rsaKey)))
		if !errors.Is(err, operation.ErrNotPermitted) || !strings.HasPrefix(err.Error(), `decrypt with token "card": `) {
			t.Errorf("decrypt: %v", err)
		}
		if _, err := b.key(ecKey).Operate(t.Context(), derivation(t, b.key(ecKey))); !errors.Is(err, operation.ErrNotPermitted) {
			t.Errorf("derive: %v", err)
		}
		want(t, "requests", b.fake.Requests(wire.TypeOperate)-before, 0)
		if k := b.key(rsaKey); k.May(operation.Decrypt) || !k.May(operation.Sign) || k.Can(operation.Decrypt, wire.CKMRSAPKCS) ||
			!k.Can(operation.Sign, wire.CKMSHA224RSAPKCS) || k.Can(operation.Sign, wire.CKMECDSA) {
			t.Error("the key says something else")
		}
	}
}

// Errors name the function.
func TestOperateErrors(t *testing.T) {
	b := newOperationBench(t, &tokentest.Person{Always: rightPIN}, func(k *tokentest.FakeKey) { k.Returns = wire.CKRKeyFunctionNotPermitted }, nil)
	_, err := b.key(rsaKey).Operate(t.Context(), encrypted(t, b.key(rsaKey)))
	if err == nil || !strings.HasPrefix(err.Error(), "the token does not let this key decrypt: ") {
		t.Errorf("got %v", err)
	}
	b.card.Change(ecKey, func(k *tokentest.FakeKey) { k.Returns = wire.CKRFunctionFailed })
	_, err = b.key(ecKey).Operate(t.Context(), derivation(t, b.key(ecKey)))
	if err == nil || !strings.HasPrefix(err.Error(), `derive with token "card": `) {
		t.Errorf("got %v", err)
	}
}

// A module that returns something else than a secret of the right length is not believed.
func TestOperateWrongLength(t *testing.T) {
	b := newOperationBench(t, &tokentest.Person{Always: rightPIN}, nil, nil)
	b.fake.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
		m, ok := r.Message.(*wire.Operate)
		if !ok {
			return false
		}
		n := map[wire.Function]int{wire.Derive: 31, wire.Decrypt: 257}[m.Function]
		p.Reply(r, &wire.OperateReply{Result: bytes.Repeat([]byte{1}, n)})
		return true
	})
	for id, op := range map[byte]operation.Operation{rsaKey: encrypted(t, b.key(rsaKey)), ecKey: derivation(t, b.key(ecKey))} {
		if got, err := b.key(id).Operate(t.Context(), op); err == nil || got != nil {
			t.Errorf("key %d: %x, %v", id, got, err)
		}
	}
}
