package known

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// testPair returns a key pair as a token shows it.
func testPair(label string) *pairs.Pair {
	pub := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public()
	keyType, _ := pairs.KeyType(pub)
	p := &pairs.Pair{ID: []byte{1}, Label: label, Public: pub, KeyType: keyType, Sum: pairs.Digest(pub)}
	p.Modulus, p.Point = pairs.Attributes(pub)
	return p
}

// A list gives back the key pairs that were added to it.
func TestPairs(t *testing.T) {
	private := testPair("login")
	private.Private, private.Always, private.Unfit = &pairs.Name{ID: private.ID, Label: private.Label}, true, "not for signing"
	private.AddMember(pairs.Member{Class: wire.CKOPublicKey, Name: pairs.Name{ID: private.ID, Label: "shown"}})
	var entry Token
	for _, p := range []*pairs.Pair{testPair("one"), private} {
		entry.Add(p)
	}
	all := entry.Pairs()
	if len(all) != 2 {
		t.Fatalf("%d pairs, want 2", len(all))
	}
	for i, want := range []*pairs.Pair{testPair("one"), private} {
		got := all[i]
		if !bytes.Equal(got.ID, want.ID) || got.Label != want.Label || got.KeyType != want.KeyType || got.Sum != want.Sum ||
			got.Always != want.Always || got.Unfit != want.Unfit || !bytes.Equal(got.Point, want.Point) || (got.Private == nil) != (want.Private == nil) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if got := all[1].PublicLabel(); got != "shown" {
		t.Errorf("the label of the public key is %q", got)
	}
}

// The list leaves out keys that the agent cannot offer.
func TestAddLeavesOut(t *testing.T) {
	small, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	curve := testPair("curve")
	curve.Public = &small.PublicKey
	for name, p := range map[string]*pairs.Pair{"a long label": testPair(strings.Repeat("x", pairs.MaxText+1)), "a curve that SSH lacks": curve} {
		var entry Token
		if entry.Add(p); len(entry.Keys) > 0 {
			t.Errorf("%s: the list has the key", name)
		}
	}
}
