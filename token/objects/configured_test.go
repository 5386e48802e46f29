package objects

import (
	"slices"
	"testing"

	"p11-agent/token/pkcs11uri"
)

func TestCheckPublicKey(t *testing.T) {
	good := &newKey(t, "1", "one").signer.PublicKey
	for text, ok := range map[string]bool{"pkcs11:id=%01": true, "pkcs11:object=a": true, "pkcs11:token=card": false} {
		if err := (PublicKey{URI: uri(t, text), Key: good}).Check(); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := (PublicKey{URI: uri(t, "pkcs11:id=%01"), Key: "no key"}).Check(); err == nil {
		t.Error("anything is a key")
	}
}

// TestConfigured checks that only usable public keys of the token count.
func TestConfigured(t *testing.T) {
	good := &newKey(t, "1", "one").signer.PublicKey
	here, other := uri(t, "pkcs11:token=here;id=%31"), uri(t, "pkcs11:token=other;id=%31")
	got := Configured([]PublicKey{{here, good}, {other, good}, {here, "no key"}}, func(u *pkcs11uri.URI) bool { return u == here })
	if len(got) != 1 || string(got[0].ID) != "1" || got[0].Label != nil {
		t.Errorf("the public keys are %+v", got)
	}
}

// TestWantedURIs checks for which URIs the agent searches objects.
func TestWantedURIs(t *testing.T) {
	configured, token, asked := uri(t, "pkcs11:id=%31"), uri(t, "pkcs11:token=x"), uri(t, "pkcs11:object=a")
	var w Wanted
	w.Configure([]*pkcs11uri.URI{configured, token})
	w.Ask(asked)
	w.Ask(asked)
	w.Ask(token)
	before := w.All()
	if !slices.Equal(before, []*pkcs11uri.URI{configured, asked}) {
		t.Errorf("wanted are %v", before)
	}
	w.Drop(asked)
	if got := w.All(); len(got) != 1 || len(before) != 2 || before[1] != asked {
		t.Errorf("after a removal, wanted are %v, and the list from before is %v", got, before)
	}
	for range maxAsked + 1 {
		w.Ask(uri(t, "pkcs11:object=b"))
	}
	if n := len(w.All()); n != maxAsked+1 {
		t.Errorf("%d URIs", n)
	}
}
