package token_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
)

const tpmPIN = "Sesame-4829"

// TestTPM runs the suite on a TPM. Only the chip is not real. Wrong PINs count against the whole
// TPM, so the suite resets their count before each test.
func TestTPM(t *testing.T) {
	tokentest.Parallel(t)
	m := tokentest.NewTPM(t)
	m.AddToken("tpm", tpmPIN)
	keys := make(map[string]byte)
	for _, kind := range []string{tokentest.RSA2048, tokentest.P256, tokentest.P384} {
		keys[kind] = allKinds[kind]
		m.GenerateKey("tpm", kind, fmt.Sprintf("%02x", keys[kind]), "key "+kind)
	}
	tokentest.Run(t, func(*testing.T) tokentest.Subject {
		m.Forgive()
		return tokentest.Subject{
			Spec: realSpec("tpm2_pkcs11", m.Module(), m.Env()...), Command: self, Token: "tpm", PIN: tpmPIN, Keys: keys, Wrong: m.Wrong,
			TPM: true, NoDerive: true,
		}
	})
}

// TestTPMHeals disturbs a Store that is logged in. The next signature succeeds, with at most one
// more prompt.
func TestTPMHeals(t *testing.T) {
	tokentest.Parallel(t)
	for name, change := range map[string]func(*tokentest.TPM){
		"Sleep":         (*tokentest.TPM).Sleep,
		"Reset":         (*tokentest.TPM).Reset,
		"Restart":       (*tokentest.TPM).Restart,
		"BrokerRestart": (*tokentest.TPM).RestartBroker,
	} {
		t.Run(name, func(t *testing.T) {
			m, person, s := tpmStore(t)
			k := tokentest.Key(t, s, "tpm", 1)
			for n := range 3 {
				if err := tokentest.Sign(t.Context(), k); err != nil {
					t.Fatalf("after %d times: %v", n, err)
				}
				if p := person.Prompts(); p > n+1 {
					t.Errorf("%d prompts, want no more than %d", p, n+1)
				}
				change(m)
			}
			want(t, "wrong PINs", m.Wrong(), 0)
		})
	}
}

// tpmStore returns a Store that shows one token of a TPM, and the person that it asks.
func tpmStore(t *testing.T) (*tokentest.TPM, *tokentest.Person, *token.Store) {
	t.Helper()
	m := tokentest.NewTPM(t)
	m.AddToken("tpm", tpmPIN)
	m.GenerateKey("tpm", tokentest.P256, "01", "login")
	person := &tokentest.Person{Always: tpmPIN}
	return m, person, tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("tpm2_pkcs11", m.Module(), m.Env()...)}, Command: self, PINs: person,
	}, tpmPIN)
}

// Wrong PINs lock the TPM. The flags of its tokens never show that.
func TestTPMLockout(t *testing.T) {
	tokentest.Parallel(t)
	m, person, s := tpmStore(t)
	person.Always, person.PINs = "", []string{"wrong-1", "wrong-2", "wrong-3", tpmPIN, tpmPIN}
	k := tokentest.Key(t, s, "tpm", 1)
	for i := range 2 {
		err := tokentest.Sign(t.Context(), k)
		if e, ok := errors.AsType[*pin.Error](err); !ok || e.Tries != pin.TriesNone || !strings.Contains(err.Error(), "TPM") {
			t.Errorf("with a TPM that is locked: %v", err)
		}
		want(t, "prompts", person.Prompts(), 4+i)
		want(t, "wrong PINs", m.Wrong(), 3)
	}
	m.Forgive()
	person.PINs = []string{tpmPIN}
	noError(t, tokentest.Sign(t.Context(), k))
	want(t, "wrong PINs", m.Wrong(), 0)
}

// A key on the TPM wants its PIN for each signature.
func TestTPMAlwaysAuthenticate(t *testing.T) {
	tokentest.Parallel(t)
	m, person, s := tpmStore(t)
	m.Run("tpm2_ptool", "addkey", "--label=tpm", "--userpin="+tpmPIN, "--algorithm=ecc256", "--attr-always-authenticate",
		"--key-label=each", "--id=\x02")
	noError(t, s.Rescan(t.Context()))
	for _, step := range []struct {
		id      byte
		prompts int
	}{{2, 1}, {2, 2}, {1, 2}, {2, 3}, {1, 3}} { // the first signature also logs in
		noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "tpm", step.id)))
		want(t, "prompts", person.Prompts(), step.prompts)
	}
	want(t, "wrong PINs", m.Wrong(), 0)
}

// TestTPMFull has more keys than Linux lets one program load into the TPM. The module keeps each
// used key loaded until a logout, and does not report the reason of the failure.
func TestTPMFull(t *testing.T) {
	tokentest.Parallel(t)
	m, person, s := tpmStore(t)
	m.Limit(3)
	const keys = 6
	for id := 2; id <= keys; id++ {
		m.GenerateKey("tpm", tokentest.P256, fmt.Sprintf("%02x", id), "more")
	}
	noError(t, s.Rescan(t.Context()))
	for id := byte(1); id <= keys; id++ {
		if err := tokentest.Sign(t.Context(), tokentest.Key(t, s, "tpm", id)); err != nil {
			t.Errorf("key %d: %v", id, err)
		}
	}
	want(t, "prompts", person.Prompts(), 2)
	want(t, "wrong PINs", m.Wrong(), 0)
}
