package token_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"p11-agent/token"
	"p11-agent/token/bounds"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// bigToken is a SoftHSM with the token "big" and one EC key that signs. A module adds many more
// pairs to the token.
type bigToken struct {
	h      *tokentest.SoftHSM
	module string
}

func newBigToken(t *testing.T) *bigToken {
	t.Helper()
	b := &bigToken{h: tokentest.NewSoftHSM(t), module: tokentest.BuildBigModule(t)}
	b.h.AddToken("big", "")
	b.h.GenerateKey("big", tokentest.P256, "77", "door")
	return b
}

// spec returns the module, which shows so many pairs.
func (b *bigToken) spec(pairs int) token.ModuleSpec {
	env := append(b.h.Env(), tokentest.BigModuleEnv(b.h.Module(), pairs, "", "")...)
	return realSpec("big", b.module, env...)
}

// TestBigLabels has labels of 32 bytes, with each byte. Each URI selects one key.
func TestBigLabels(t *testing.T) {
	b := newBigToken(t)
	const pairs = 16
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec(pairs)}, Command: self}, tokentest.PIN)
	keys := s.Keys()
	want(t, "keys", len(keys), pairs+1)
	for _, k := range keys {
		u := parse(t, k.URI())
		label := k.Label()
		u.Object = &label
		again := parse(t, u.String())
		matching := 0
		for _, o := range keys {
			if o.Matches(again) {
				matching++
			}
		}
		want(t, "keys that "+u.String()+" matches", matching, 1)
	}
}

// TestBigNamed has a token with more objects than a module process lists. The module process
// searches for each key that the configuration or a client names. These keys sign before and
// after the first login.
func TestBigNamed(t *testing.T) {
	tokentest.Parallel(t)
	b := newBigToken(t)
	b.h.GenerateKey("big", tokentest.P256, "78", "gate")
	b.h.GenerateKey("big", tokentest.P256, "79", "attic")
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{b.spec(wire.MaxObjects + 500)}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
		Homes: []*pkcs11uri.URI{parse(t, "pkcs11:token=big;id=%77"), parse(t, "pkcs11:object=gate")},
	}, tokentest.PIN)
	labelled := func(label string) *token.Key {
		t.Helper()
		i := slices.IndexFunc(s.Keys(), func(k *token.Key) bool { return k.Label() == label })
		if i < 0 {
			t.Fatalf("the key %q is not found", label)
		}
		return s.Keys()[i]
	}
	want(t, "keys", len(s.Keys()), bounds.MaxKeys)
	for _, k := range []*token.Key{labelled("door"), labelled("gate")} {
		noError(t, tokentest.Sign(t.Context(), k)) // the first signature logs in
	}
	for _, label := range []string{"door", "gate"} {
		noError(t, tokentest.Sign(t.Context(), labelled(label)))
	}
	if slices.ContainsFunc(s.Keys(), func(k *token.Key) bool { return k.Label() == "attic" }) {
		t.Error("the list has a key without a name in the configuration")
	}

	u := parse(t, "pkcs11:token=big;object=attic")
	keys, err := s.Select(t.Context(), selection.New(u))
	noError(t, err)
	want(t, "keys that a client has named", len(keys), 1)
	noError(t, tokentest.Sign(t.Context(), keys[0]))
	noError(t, s.Rescan(t.Context()))
	for _, label := range []string{"door", "gate", "attic"} {
		noError(t, tokentest.Sign(t.Context(), labelled(label)))
	}
	left := s.Modules()[0].Tokens[0].LeftOut
	if len(left) != 2 || !strings.Contains(left[0], fmt.Sprintf("%d of them", wire.MaxObjects)) || !strings.Contains(left[1], "keys: of one module 8192") {
		t.Errorf("left out: %q", left)
	}
}

// TestManyTokens has one module with 100 tokens, and 50 keys on each token. The Store lists each
// key, and each key signs. The number of requests grows only with the number of tokens.
func TestManyTokens(t *testing.T) {
	requests := func(tokens, keys int) int {
		f := tokentest.NewFake(t)
		for i := range tokens {
			card := f.AddToken(fmt.Sprint("card ", i), tokentest.PIN)
			for id := range keys {
				card.AddKey(tokentest.Ed25519, byte(id+1), fmt.Sprint("key ", id), nil)
			}
		}
		s := tokentest.Store(t, token.Options{
			Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
		}, tokentest.PIN)
		want(t, "keys", len(s.Keys()), tokens*keys)
		looks := f.Requests(wire.TypeObjects)
		noError(t, tokentest.Sign(t.Context(), s.Keys()[tokens*keys-1]))
		for _, m := range s.Modules() {
			want(t, "what is left out", len(m.LeftOut), 0)
		}
		return looks
	}
	want(t, "requests for objects", requests(100, 50), 2*requests(50, 50))
}
