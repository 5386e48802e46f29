package token_test

import (
	"crypto"
	"testing"

	"p11-agent/token"
	"p11-agent/token/objects"
	"p11-agent/token/tokentest"
)

// A token shows no public half of its keys, neither before nor after a login.
func TestConfiguredPublicKey(t *testing.T) {
	tokentest.Parallel(t)
	for _, kind := range []string{tokentest.RSA2048, tokentest.P256, tokentest.P384, tokentest.P521, tokentest.Ed25519} {
		for _, shows := range []bool{false, true} {
			for _, uri := range []string{"pkcs11:token=card;id=%02", "pkcs11:object=two", "pkcs11:token=card;object=two;id=%02"} {
				p := &tokentest.Person{Always: rightPIN}
				var pub crypto.PublicKey
				b := newBench(t, p, func(b *bench, opts *token.Options) {
					pub = b.card.AddKey(kind, 2, "two", func(k *tokentest.FakeKey) {
						k.NoPublic, k.Bare, k.Public = true, true, shows
					})
					// The token itself shows another public half for the second.
					opts.PublicKeys = []objects.PublicKey{{URI: parse(t, uri), Key: pub}, {URI: parse(t, "pkcs11:id=%01"), Key: pub}}
				})
				want(t, "keys", len(b.store.Keys()), 2)
				for range 2 { // before the login, and after it
					for _, k := range b.store.Keys() {
						if k.Label() == "one" {
							continue
						}
						if err := tokentest.Sign(t.Context(), k); err != nil {
							t.Errorf("%s, %s: %v", kind, uri, err)
						}
					}
				}
				want(t, "signatures", b.card.Signed(), 2)
				b.mustSign()
			}
		}
	}
}

func TestConfiguredPublicKeyIsAnothers(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, func(b *bench, opts *token.Options) {
		other := b.fake.AddToken("other", rightPIN).AddKey(tokentest.P256, 2, "two", nil)
		b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.NoPublic, k.Bare = true, true })
		opts.PublicKeys = []objects.PublicKey{{URI: parse(t, "pkcs11:token=card;id=%02"), Key: other}}
	})
	if err := tokentest.Sign(t.Context(), b.key(2)); err == nil {
		t.Error("a signature by another key went out")
	}
	b.store.SetPublicKeys(nil)
	if err := b.store.LogoutAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.store.Rescan(t.Context()); err != nil {
		t.Fatal(err)
	}
	tokentest.Keys(t, b.store, 2)
}
