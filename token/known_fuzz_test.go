package token

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"reflect"
	"testing"
)

// FuzzKnown reads lists of known keys. What can be read is written in the same
// way again, and each of its keys can be offered.
func FuzzKnown(f *testing.F) {
	der, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		f.Fatal(err)
	}
	for _, k := range []known{
		{Version: 1},
		{Version: 1, Tokens: []knownToken{{Module: "m", Label: "card", Serial: "1", There: true, Keys: []knownKey{
			{ID: []byte{1}, Label: "one", Public: der, Always: true, Unfit: "it is not for signing"},
		}}}},
		{Version: 2, Tokens: []knownToken{{Module: "m", Label: "card", Serial: "1", Home: true}}},
	} {
		b, err := json.Marshal(k)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":1,"tokens":[{"keys":[{"public":"AAAA"}]}]}`))
	f.Add([]byte(`{"version":1,"tokens":null}{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKnown(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		k2, err := parseKnown(again)
		if err != nil {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
		if third, err := json.Marshal(k2); err != nil || !reflect.DeepEqual(third, again) {
			t.Fatalf("%s became %s (%v)", again, third, err)
		}
	})
}
