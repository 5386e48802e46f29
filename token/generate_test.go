package token_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/keygen"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
	"p11-agent/token/wire"
)

const newPIN = "Sesame-4829"

func uri(t *testing.T, text string) *pkcs11uri.URI {
	t.Helper()
	u, err := pkcs11uri.Parse(text)
	noError(t, err)
	return u
}

// mustNot ends the test when there is an error.
func mustNot(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reasonOf returns the reason of a refusal by a module process. It fails the test for another
// error.
func reasonOf(t *testing.T, err error) wire.Reason {
	t.Helper()
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		t.Fatalf("got %v", err)
	}
	return e.Reason
}

// softKinds maps the kinds of keys that SoftHSM makes to the text of pkcs11-tool for them.
var softKinds = map[keygen.Kind]string{
	keygen.RSA2048: "RSA 2048 bits", keygen.RSA3072: "RSA 3072 bits", keygen.RSA4096: "RSA 4096 bits",
	keygen.ECDSAP256: "EC_POINT 256 bits", keygen.ECDSAP384: "EC_POINT 384 bits", keygen.ECDSAP521: "EC_POINT 528 bits", keygen.Ed25519: "",
}

// Generate makes a key of each kind, with one prompt for all. Another program confirms the kind
// and the attributes of each key. Each key signs.
func TestGenerate(t *testing.T) {
	tokentest.Parallel(t)
	h := tokentest.NewSoftHSM(t)
	h.AddToken("soft", newPIN)
	person := &tokentest.Person{Always: newPIN}
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("softhsm", h.Module(), h.Env()...)}, Command: self, PINs: person,
	}, newPIN)
	ids := make(map[string]bool)
	for kind := range softKinds {
		k, err := s.Generate(t.Context(), uri(t, "pkcs11:token=soft;object=new%20"+string(kind)), kind, nil)
		mustNot(t, err)
		want(t, "label", k.Label(), "new "+string(kind))
		want(t, "what it says of its life", [3]wire.Tri{k.AlwaysSensitive, k.NeverExtractable, k.Local}, [3]wire.Tri{wire.True, wire.True, wire.True})
		noError(t, tokentest.Sign(t.Context(), k.Key))
		if !slices.Contains(s.Keys(), k.Key) {
			t.Errorf("%v is not listed", k)
		}
		ids[string(k.ID())] = true
		n, last := k.Signatures()
		if n != 2 || last.IsZero() { // Generate made one of them
			t.Errorf("%d signatures, the last at %v", n, last)
		}
	}
	want(t, "IDs", len(ids), len(keygen.Kinds))
	want(t, "prompts", person.Prompts(), 1)
	want(t, "kinds", len(softKinds), len(keygen.Kinds))

	out := h.Run("pkcs11-tool", "--module", h.Module(), "--token-label", "soft", "--login", "--pin", newPIN, "-O")
	for kind, says := range softKinds {
		if !strings.Contains(out, "label:      new "+string(kind)) || !strings.Contains(out, says) {
			t.Errorf("pkcs11-tool does not show %s: %s", kind, out)
		}
	}
	want(t, "private keys that only sign", len(regexp.MustCompile(`(?m)^  Usage: +sign\n  Access: +sensitive, always sensitive, never extractable, local$`).FindAllString(out, -1)), len(softKinds))
	want(t, "public keys that only verify", len(regexp.MustCompile(`(?m)^  Usage: +verify$`).FindAllString(out, -1)), len(softKinds))
}

// Generate replaces no key and no certificate of a token.
func TestGenerateExists(t *testing.T) {
	h := tokentest.NewSoftHSM(t)
	h.AddToken("soft", newPIN)
	h.GenerateKey("soft", tokentest.P256, "01", "login")
	h.GenerateKey("soft", tokentest.P256, "02", "hidden")
	h.DeletePublic("soft", "02")
	h.GenerateKey("soft", tokentest.P256, "03", "orphan")
	h.DeletePrivate("soft", "03")
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("softhsm", h.Module(), h.Env()...)}, Command: self, PINs: &tokentest.Person{Always: newPIN},
	}, newPIN)
	list := func() string {
		return h.Run("pkcs11-tool", "--module", h.Module(), "--token-label", "soft", "--login", "--pin", newPIN, "-O")
	}
	before := list()
	for text, says := range map[string]string{
		"pkcs11:token=soft;id=%01":                    `"login" with the id 01`,
		"pkcs11:token=soft;id=%02":                    `a private key "hidden" with the id 02`,
		"pkcs11:token=soft;id=%03":                    `a public key "orphan" with the id 03`,
		"pkcs11:token=soft;object=login":              `with the label "login"`,
		"pkcs11:token=soft;object=hidden;id=%09":      "id 02",
		"pkcs11:token=soft;object=orphan;id=%09":      "id 03",
		"pkcs11:token=soft;object=login;id=%03":       "nothing was made",
		"pkcs11:token=soft;type=private;object=login": "nothing was made",
	} {
		_, err := s.Generate(t.Context(), uri(t, text), keygen.ECDSAP256, nil)
		if reasonOf(t, err) != wire.ReasonExists || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", text, err)
		}
	}
	want(t, "what is on the token", list(), before)
	k, err := s.Generate(t.Context(), uri(t, "pkcs11:token=soft"), keygen.ECDSAP256, nil)
	mustNot(t, err)
	want(t, "the ID that is free", string(k.ID()), "\x04")
}

// Generate refuses some URIs of a new key.
func TestGenerateRefuses(t *testing.T) {
	f := tokentest.NewFake(t)
	one := f.AddToken("one", newPIN)
	f.AddToken("two", newPIN)
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: &tokentest.Person{Always: newPIN}}, newPIN)
	for text, says := range map[string]string{
		"pkcs11:":                                "the URI selects",
		"pkcs11:token=three":                     "no such token",
		"pkcs11:token=one;type=cert":             "a new key is a private one",
		"pkcs11:token=one?pin-value=" + newPIN:   "not from its URI",
		"pkcs11:token=one?pin-source=file:/some": "not from its URI",
	} {
		if _, err := s.Generate(t.Context(), uri(t, text), keygen.ECDSAP256, nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := s.Generate(t.Context(), uri(t, "pkcs11:token=one"), "dsa", nil); err == nil {
		t.Error("it made a key of a kind that there is not")
	}
	want(t, "requests", f.Requests(wire.TypeGenerate), 0)

	// The token makes no key, and says so.
	one.Flags = 0
	_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=one"), keygen.RSA4096, nil)
	if e, ok := errors.AsType[*keygen.Error](err); !ok || e.Token != "one" || e.Kind != keygen.RSA4096 {
		t.Errorf("got %v", err)
	}
	one.Spoils = true
	if _, err := s.Generate(t.Context(), uri(t, "pkcs11:token=one"), keygen.ECDSAP256, nil); err == nil || !strings.Contains(err.Error(), "does not sign") {
		t.Errorf("with a key that signs wrongly: %v", err)
	}
}

// Generate gets the PIN from its caller, and wrong PINs.
func TestGeneratePIN(t *testing.T) {
	f := tokentest.NewFake(t)
	card := f.AddToken("card", newPIN)
	person := &tokentest.Person{PINs: []string{"wrong-1"}}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: person}, newPIN)
	u := uri(t, "pkcs11:token=card")
	if _, err := s.Generate(t.Context(), u, keygen.ECDSAP256, nil); !errors.Is(err, pin.ErrCancelled) {
		t.Errorf("after a wrong PIN: %v", err)
	}
	want(t, "wrong PINs", card.Wrong(), 1)
	wrong, err := secret.From([]byte("wrong-2"))
	noError(t, err)
	defer wrong.Wipe()
	_, err = s.Generate(t.Context(), u, keygen.ECDSAP256, wrong)
	if e, ok := errors.AsType[*pin.Error](err); !ok || !e.Tried {
		t.Errorf("with a wrong PIN: %v", err)
	}
	want(t, "requests, which were checks before the logins", f.Requests(wire.TypeGenerate), 2)
	want(t, "prompts", person.Prompts(), 2)
	card.SetPIN(newPIN)
	right, err := secret.From([]byte(newPIN))
	noError(t, err)
	defer right.Wipe()
	_, err = s.Generate(t.Context(), u, keygen.ECDSAP256, right)
	noError(t, err)
	want(t, "prompts", person.Prompts(), 2)
	about := person.Asked()[0]
	want(t, "what was asked about", about.Token.Label, "card")
}

// A module makes keys that could leave the token. Later it does not destroy such a key either.
func TestGenerateExtractable(t *testing.T) {
	tokentest.Parallel(t)
	library := tokentest.BuildBadModule(t)
	hsm := newHSM(t, "bad")
	b := newBad(t, library, hsm, "bad")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN}})
	tokentest.Keys(t, s, 1)
	objects := func() int {
		out := hsm.Run("pkcs11-tool", "--module", hsm.Module(), "--token-label", "bad", "--login", "--pin", tokentest.PIN, "-O")
		return strings.Count(out, "label: ")
	}
	before := objects()
	b.command("extractable")
	for _, kind := range []keygen.Kind{keygen.ECDSAP256, keygen.RSA2048} {
		_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=bad"), kind, nil)
		if reasonOf(t, err) != wire.ReasonExtractable || !strings.Contains(err.Error(), "destroyed again") {
			t.Errorf("got %v", err)
		}
		want(t, "objects", objects(), before)
	}
	b.command("extractable undestroyable")
	_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=bad"), keygen.ECDSAP256, nil)
	if reasonOf(t, err) != wire.ReasonExtractable || !strings.Contains(err.Error(), "private key is still there") {
		t.Errorf("got %v", err)
	}
	want(t, "objects", objects(), before+2)
}

// A module reports that it does not make keys, and later crashes when it makes a key.
func TestGenerateFails(t *testing.T) {
	library := tokentest.BuildBadModule(t)
	b := newBad(t, library, newHSM(t, "bad"), "bad")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN}})
	tokentest.Keys(t, s, 1)
	for rv, advice := range map[string]string{"0x54": "own program", "0x101": "own program", "0x31": ""} {
		b.command("rv=C_GenerateKeyPair:" + rv)
		_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=bad"), keygen.ECDSAP256, nil)
		e, ok := errors.AsType[*keygen.Error](err)
		if !ok || !strings.Contains(e.Advice, advice) || (advice == "") != (e.Advice == "") {
			t.Errorf("%s: %v", rv, err)
		}
	}
	b.command("crash=C_GenerateKeyPair")
	_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=bad"), keygen.ECDSAP256, nil)
	if _, ok := errors.AsType[*token.ModuleError](err); !ok || !strings.Contains(err.Error(), "may be there nevertheless") {
		t.Errorf("after a crash: %v", err)
	}
	b.command("")
	_, err = s.Generate(t.Context(), uri(t, "pkcs11:token=bad"), keygen.ECDSAP256, nil)
	noError(t, err)
}

// waitsThrough reports whether a request goes on although its caller has stopped waiting.
func waitsThrough() bool {
	return proctest.Count(func(g proctest.Goroutine) bool {
		return g.State == "chan receive" && g.Runs((*process.Process).CallThrough) && strings.HasPrefix(g.Stack, proctest.Methods[process.Process]())
	}) > 0
}

// looks reports whether the agent looks at a module.
func looks() bool {
	return proctest.Count(func(g proctest.Goroutine) bool { return g.Runs(token.Look) }) > 0
}

// A caller stops waiting for a key. The module then destroys the key that the card has begun
// to make.
func TestGenerateCancelled(t *testing.T) {
	library := tokentest.BuildBadModule(t)
	hsm := newHSM(t, "bad")
	b := newBad(t, library, hsm, "bad")
	release := filepath.Join(b.dir, "release")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN}})
	old := tokentest.Keys(t, s, 1)[0]
	noError(t, tokentest.Sign(t.Context(), old)) // which logs in
	var cancel context.CancelFunc
	var done chan error
	begin := func(label string) {
		begun := b.calls("C_GenerateKeyPair")
		b.command("hang=C_GenerateKeyPair release=" + release)
		var ctx context.Context
		ctx, cancel = context.WithCancel(t.Context())
		t.Cleanup(cancel)
		done = make(chan error, 1)
		go func() {
			_, err := s.Generate(ctx, uri(t, "pkcs11:token=bad;object="+label), keygen.ECDSAP256, nil)
			done <- err
		}()
		tokentest.Until(t, "the module is at it", func() bool { return b.calls("C_GenerateKeyPair") > begun })
	}
	// An earlier look waits for the token, and the look below would wait for the earlier look. In
	// that case, the test tries again.
	label := "new1"
	for n := 2; ; n++ {
		begin(label)
		if !looks() {
			break
		}
		noError(t, os.WriteFile(release, nil, 0o600))
		noError(t, <-done)
		noError(t, os.Remove(release))
		label = fmt.Sprintf("new%d", n)
	}
	cancel()
	// The module process must get the cancellation before the token has made the key. Otherwise
	// the key would stay. When the process runs the next step, it has got the cancellation.
	tokentest.Until(t, "it was told", func() bool { return waitsThrough() })
	looked := b.calls("C_GetSlotInfo")
	var rescan sync.WaitGroup
	rescan.Go(func() { _ = s.Rescan(t.Context()) })
	tokentest.Until(t, "it has heard", func() bool { return b.calls("C_GetSlotInfo") > looked })
	select {
	case err := <-done:
		t.Fatalf("it does not wait for the end: %v", err)
	default:
	}
	noError(t, os.WriteFile(release, nil, 0o600))
	err := <-done
	rescan.Wait()
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "destroyed again") {
		t.Errorf("got %v", err)
	}
	out := hsm.Run("pkcs11-tool", "--module", hsm.Module(), "--token-label", "bad", "--login", "--pin", tokentest.PIN, "-O")
	if strings.Contains(out, label) {
		t.Errorf("the key is there: %s", out)
	}
	b.command("")
	noError(t, tokentest.Sign(t.Context(), old))
}

// A TPM makes keys of the kinds that it supports.
func TestGenerateTPM(t *testing.T) {
	tokentest.Parallel(t)
	m := tokentest.NewTPM(t)
	m.AddToken("tpm", tpmPIN)
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("tpm2_pkcs11", m.Module(), m.Env()...)}, Command: self, PINs: &tokentest.Person{Always: tpmPIN},
	}, tpmPIN)
	for _, kind := range []keygen.Kind{keygen.ECDSAP256, keygen.ECDSAP384, keygen.RSA2048} {
		k, err := s.Generate(t.Context(), uri(t, "pkcs11:token=tpm;object="+string(kind)), kind, nil)
		mustNot(t, err)
		want(t, "label", k.Label(), string(kind))
		noError(t, tokentest.Sign(t.Context(), k.Key))
	}
	_, err := s.Generate(t.Context(), uri(t, "pkcs11:token=tpm"), keygen.Ed25519, nil)
	if e, ok := errors.AsType[*keygen.Error](err); !ok || e.Kind != keygen.Ed25519 {
		t.Errorf("of a kind that a TPM does not have: %v", err)
	}
}

// Another program makes keys on a PIV card, and the error names that program. The card does not
// change.
func TestGeneratePIV(t *testing.T) {
	tokentest.Parallel(t)
	for _, tt := range []struct{ name, module, tool string }{
		{"OpenSC", "opensc-pkcs11.so", "piv-tool"},
		{"Yubico", "libykcs11.so*", "ykman"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			module := tokentest.Module(t, tt.module)
			p := tokentest.StartPCSCD(t, "Yubico Virtual")
			card := tokentest.NewCard(t, pivcard.Options{
				Name: "piv", PIN: pivPIN, YubiKey: true,
				Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {Algorithm: pivcard.P256, Imported: true}},
			})
			p.Insert(0, card)
			s := tokentest.Store(t, token.Options{
				Modules: []token.ModuleSpec{realSpec("piv", module, p.Env()...)}, Command: self, PINs: &tokentest.Person{Always: pivPIN},
			}, pivPIN)
			tokentest.Until(t, "the key is there", func() bool { return len(s.Keys()) > 0 })
			key := s.Keys()[0]
			_, err := s.Generate(t.Context(), uri(t, "pkcs11:id=%04"), keygen.ECDSAP256, nil)
			if e, ok := errors.AsType[*keygen.Error](err); !ok || !strings.Contains(e.Advice, tt.tool) {
				t.Errorf("got %v", err)
			}
			noError(t, tokentest.Sign(t.Context(), key))
		})
	}
}
