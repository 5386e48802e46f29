package token_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

// pivPIN is a PIN that the card takes. A log cannot have this text by chance.
const pivPIN = "Q4829-3"

// TestPIV runs the suite on a smart card behind the whole stack of PC/SC. Only the card is not
// real.
func TestPIV(t *testing.T) {
	tokentest.Parallel(t)
	// Keys that may sign and want a PIN once. With a PIN-always key on the card, OpenSC keeps no
	// PIN, and so repairs less by itself.
	keys := map[pivcard.Ref]pivcard.Key{
		pivcard.Authentication: {Algorithm: pivcard.P256},
		pivcard.KeyManagement:  {Algorithm: pivcard.RSA2048, Usage: x509.KeyUsageDigitalSignature},
		pivcard.Retired:        {Algorithm: pivcard.P384, Usage: x509.KeyUsageDigitalSignature},
		pivcard.Retired + 1:    {Algorithm: pivcard.RSA2048}, // decrypts
		pivcard.Retired + 2:    {Algorithm: pivcard.P256},    // derives
	}
	tests := []struct {
		name, module string
		always       bool
		yubiKey      bool
		imported     bool // otherwise libykcs11 shows the attestation of a key under the ID of the key
	}{
		{"OpenSC", "opensc-pkcs11.so", false, false, false},
		{"OpenSCWithPINAlways", "opensc-pkcs11.so", true, false, false},
		{"OpenSCYubiKey", "opensc-pkcs11.so", true, true, false},
		{"Yubico", "libykcs11.so*", true, true, true},
		{"YubicoGenerated", "libykcs11.so*", true, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			module := tokentest.Module(t, tt.module)
			p := tokentest.StartPCSCD(t, "Yubico Virtual")
			o := pivcard.Options{Name: "piv", PIN: pivPIN, Keys: make(map[pivcard.Ref]pivcard.Key), YubiKey: tt.yubiKey}
			for ref, k := range keys {
				k.Imported = tt.imported
				o.Keys[ref] = k
			}
			if tt.always {
				o.Keys[pivcard.Signature] = pivcard.Key{}
			}
			card := tokentest.NewCard(t, o)
			p.Insert(0, card)
			s := tokentest.Subject{
				Spec: realSpec("piv", module, p.Env()...), Command: self, Token: "piv", PIN: pivPIN,
				Keys:     map[string]byte{tokentest.P256: 1, tokentest.RSA2048: 3, tokentest.P384: 5},
				Decrypts: 6, Derives: 7,
				Wrong: func() int { return card.Counts().Wrong },
			}
			if strings.HasPrefix(tt.name, "Yubico") {
				s.NoDerive = true // libykcs11 2.2 says CKA_DERIVE = false of every key
				s.Token = fmt.Sprintf("YubiKey PIV #%d", card.Serial())
			}
			tokentest.Run(t, func(*testing.T) tokentest.Subject { return s })
		})
	}
}

// TestPIVHeals disturbs a Store that is logged in. The next signature succeeds, with at most one
// more prompt.
func TestPIVHeals(t *testing.T) {
	tests := []struct {
		name   string
		change func(t *testing.T, p *tokentest.PCSCD, c *pivcard.Card, s *token.Store)
	}{
		{"CardOutAndBack", func(_ *testing.T, p *tokentest.PCSCD, c *pivcard.Card, _ *token.Store) {
			p.Remove(0)
			p.Insert(0, c)
		}},
		{"CardSeenOutAndBack", func(t *testing.T, p *tokentest.PCSCD, c *pivcard.Card, s *token.Store) {
			p.Remove(0)
			tokentest.Keys(t, s, 0)
			p.Insert(0, c)
		}},
		{"CardInTheOtherSlot", func(_ *testing.T, p *tokentest.PCSCD, c *pivcard.Card, _ *token.Store) {
			p.Remove(0)
			p.Insert(1, c)
		}},
		{"PCSCDRestarted", func(_ *testing.T, p *tokentest.PCSCD, _ *pivcard.Card, _ *token.Store) { p.Restart() }},
		{"PCSCDKilled", func(_ *testing.T, p *tokentest.PCSCD, _ *pivcard.Card, _ *token.Store) {
			p.Kill()
			p.Start()
		}},
		{"CardReset", func(_ *testing.T, _ *tokentest.PCSCD, c *pivcard.Card, _ *token.Store) { c.Reset() }},
		{"ErrorOfTheCard", func(_ *testing.T, _ *tokentest.PCSCD, c *pivcard.Card, _ *token.Store) {
			c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, SW: 0x6F00})
		}},
	}
	for _, tt := range tests {
		for _, always := range []bool{false, true} { // with a PIN-always key, OpenSC keeps no PIN
			t.Run(fmt.Sprintf("%s/PINAlways=%v", tt.name, always), func(t *testing.T) {
				o := pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}}
				if always {
					o.Keys[pivcard.Signature] = pivcard.Key{}
				}
				p, c, person, s := pivStore(t, o)
				k := tokentest.Key(t, s, "piv", 1)
				noError(t, tokentest.Sign(t.Context(), k))
				idle(t, s)
				tt.change(t, p, c, s)
				if err := tokentest.Sign(t.Context(), k); err != nil {
					t.Fatalf("the next signature: %v", err)
				}
				if n := person.Prompts(); n > 2 {
					t.Errorf("%d prompts, want no more than 2", n)
				}
				want(t, "wrong PINs", c.Counts().Wrong, 0)
			})
		}
	}
}

// idle waits until a Store does nothing with the card. The Store looks at the card after a
// signature that has logged in. OpenSC 0.23 may hang if a card is pulled during the look: see
// tokentest.PCSCD.Pull.
func idle(t *testing.T, s *token.Store) {
	t.Helper()
	noError(t, s.Rescan(t.Context()))
}

// pivStore returns a Store that shows one card through OpenSC, and the person that it asks.
func pivStore(t *testing.T, o pivcard.Options) (*tokentest.PCSCD, *pivcard.Card, *tokentest.Person, *token.Store) {
	t.Helper()
	module := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t)
	c := tokentest.NewCard(t, o)
	p.Insert(0, c)
	person := &tokentest.Person{Always: pivPIN}
	return p, c, person, tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("opensc", module, p.Env()...)}, Command: self, PINs: person,
	}, pivPIN)
}

// TestPIVPolicies counts the prompts for the key in each slot of a card.
func TestPIVPolicies(t *testing.T) {
	tokentest.Parallel(t)
	_, c, person, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN})
	sign := func(id byte, prompts int) {
		t.Helper()
		before := person.Prompts()
		if err := tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", id)); err != nil {
			t.Errorf("key %d: %v", id, err)
		}
		want(t, fmt.Sprintf("prompts for key %d", id), person.Prompts()-before, prompts)
	}
	sign(4, 0) // CardAuthentication
	want(t, "PINs given", c.Counts().Right, 0)
	sign(1, 1) // Authentication
	sign(1, 0)
	sign(2, 1) // Signature
	sign(2, 1)
	sign(1, 0)
	if k := tokentest.Key(t, s, "piv", 3); k.Unfit() == "" {
		t.Error("a key that derives only is fit to sign")
	}
	want(t, "signatures", c.Counts().Signatures, 6)
	want(t, "wrong PINs", c.Counts().Wrong, 0)

	c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, Corrupt: true})
	if err := tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)); err == nil || !strings.Contains(err.Error(), "wrong signature") {
		t.Errorf("a wrong signature is handed on: %v", err)
	}
}

// Another program changes the PIN of the card, and then locks the PIN.
func TestPIVChangedPIN(t *testing.T) {
	tokentest.Parallel(t)
	p, c, person, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{
		pivcard.Authentication: {}, pivcard.Signature: {},
	}})
	k := tokentest.Key(t, s, "piv", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	noError(t, c.SetPIN("111111"))
	idle(t, s)
	p.Remove(0)
	p.Insert(0, c)
	err := tokentest.Sign(t.Context(), k)
	if e, ok := errors.AsType[*pin.Error](err); !ok || !e.Tried {
		t.Errorf("after a change of the PIN: %v", err)
	}
	want(t, "wrong PINs", c.Counts().Wrong, 1)
	c.SetTries(0)
	prompts := person.Prompts()
	err = tokentest.Sign(t.Context(), k)
	if e, ok := errors.AsType[*pin.Error](err); !ok || e.Tries != pin.TriesNone {
		t.Errorf("with a locked PIN: %v", err)
	}
	want(t, "prompts for a locked PIN", person.Prompts(), prompts)
	want(t, "PINs given to a locked card", c.Counts().Blocked, 0)
	want(t, "wrong PINs", c.Counts().Wrong, 1)
}

// Another program changes the PIN and resets the card while a module is logged in. Fifty
// signatures meet that at once. That costs one try, with the old PIN. The person types the old
// PIN, or OpenSC tries it: OpenSC keeps the PIN of a card without a PIN-always key.
func TestPIVChangedUnderLoad(t *testing.T) {
	tokentest.Parallel(t)
	const atOnce = 50
	for _, always := range []bool{false, true} {
		t.Run(fmt.Sprintf("PINAlways=%v", always), func(t *testing.T) {
			o := pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}}
			if always {
				o.Keys[pivcard.Signature] = pivcard.Key{}
			}
			p, c, person, s := pivStore(t, o)
			k := tokentest.Key(t, s, "piv", 1)
			noError(t, tokentest.Sign(t.Context(), k))
			const changed = "W2951-7"
			noError(t, c.SetPIN(changed))
			person.Always = ""
			person.PINs = []string{changed}
			if always {
				person.PINs = []string{pivPIN, changed}
			}
			idle(t, s)
			p.ResetCard(0)
			var all sync.WaitGroup
			for range atOnce {
				all.Go(func() {
					if err := tokentest.Sign(t.Context(), k); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			want(t, "wrong PINs", c.Counts().Wrong, 1)
			want(t, "signatures", c.Counts().Signatures, 1+atOnce)
			want(t, "dialogues", len(person.Asked()), 2)
		})
	}
}
