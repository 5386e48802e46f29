package token_test

import (
	"fmt"
	"testing"

	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// Fakes for the suite: a card that shows everything, and cards that do not.
var fakes = []struct {
	name  string
	token func(t *tokentest.FakeToken)
	key   func(k *tokentest.FakeKey)
}{
	{"Plain", nil, nil},
	{"BarePrivateKeys", nil, func(k *tokentest.FakeKey) { k.Bare = true }},
	{"PrivateKeysShowWithoutLogin", nil, func(k *tokentest.FakeKey) { k.Public = true }},
	{"NoMechanismList", func(t *tokentest.FakeToken) { t.Mechanisms = nil }, nil},
	{"RawMechanismsOnly", func(t *tokentest.FakeToken) { t.Mechanisms = tokentest.RawMechanisms }, nil},
	{"NoFlags", func(t *tokentest.FakeToken) { t.Mute = true }, nil},
	{"HashAndSignRefusedThoughListed", func(t *tokentest.FakeToken) {
		t.Refuse = make(map[uint64]uint64)
		for _, m := range tokentest.AllMechanisms {
			t.Refuse[m] = wire.CKRMechanismInvalid
		}
		for _, m := range tokentest.RawMechanisms {
			delete(t.Refuse, m)
		}
	}, nil},
}

func TestFake(t *testing.T) {
	tokentest.Parallel(t)
	for _, tt := range fakes {
		t.Run(tt.name, func(t *testing.T) {
			tokentest.Run(t, func(t *testing.T) tokentest.Subject {
				f := tokentest.NewFake(t)
				card := f.AddToken("card", "Sesame-4829")
				if tt.token != nil {
					tt.token(card)
				}
				for kind, id := range allKinds {
					card.AddKey(kind, id, fmt.Sprintf("key %d", id), tt.key)
				}
				return tokentest.Subject{
					Spec: fakeSpec(f), Command: self, Token: "card", PIN: "Sesame-4829", Keys: allKinds, Wrong: card.Wrong,
				}
			})
		})
	}
}

func TestSoftHSM(t *testing.T) {
	tokentest.Parallel(t)
	h := tokentest.NewSoftHSM(t)
	h.AddToken("soft", "Sesame-4829")
	for kind, id := range allKinds {
		h.GenerateKey("soft", kind, fmt.Sprintf("%02x", id), "key "+kind)
	}
	tokentest.Run(t, func(*testing.T) tokentest.Subject {
		return tokentest.Subject{
			Spec: realSpec("softhsm", h.Module(), h.Env()...), Command: self, Token: "soft", PIN: "Sesame-4829", Keys: allKinds,
		}
	})
}
