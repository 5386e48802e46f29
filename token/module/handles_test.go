package module

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// A session ends with its card, and a session with another card gets its handle. The PIN
// must not go there.
func TestSessionOfAnotherSlot(t *testing.T) {
	called := filepath.Join(t.TempDir(), "called")
	for _, kv := range tokentest.BadModuleEnv("slots=2 always", "", called) {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	lib, err := load(tokentest.BuildBadModule(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.initialize(""); err != nil {
		t.Fatal(err)
	}
	defer lib.finalize() //nolint:errcheck // never fails
	id, _, err := lib.tokenInfo(0)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"login", "sign"} {
		tok := newToken(id)
		if tok.live, err = open(lib, 0, id); err != nil {
			t.Fatal(err)
		}
		other, err := lib.openSession(1)
		if err != nil {
			t.Fatal(err)
		}
		if what == "login" {
			tok.live.anchor = other
			_, err = new(server).login(t.Context(), lib, tok, &wire.Login{Token: id, PIN: secrettest.Of(t, "1234")})
		} else {
			<-tok.live.permits
			tok.live.idle <- other
			_, err = new(server).operate(t.Context(), lib, tok, &wire.Operate{
				Key: wire.KeyID{Token: id}, ResultLen: 64, ContextLogin: true, PIN: secrettest.Of(t, "1234"),
			}, nil)
		}
		wantRV(t, err, "C_GetSessionInfo", wire.CKRSessionHandleInvalid)
		if tok.present() != nil {
			t.Errorf("%s: the presence is not retired", what)
		}
	}
	if b, err := os.ReadFile(called); err != nil || bytes.Contains(b, []byte("C_Login")) {
		t.Errorf("a PIN was tried (%v)", err)
	}
}

// openBad loads the misbehaving module into this process, and opens a session.
func openBad(t *testing.T) (*library, pkcs11.SessionHandle) {
	t.Helper()
	for _, kv := range tokentest.BadModuleEnv("", "", "") {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	lib, err := load(tokentest.BuildBadModule(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.initialize(""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lib.finalize() }) // never fails
	session, err := lib.openSession(0)
	if err != nil {
		t.Fatal(err)
	}
	return lib, session
}

// There is room for the longest attributes. All objects of a list share the room.
func TestRoomForAttributes(t *testing.T) {
	lib, session := openBad(t)
	handles, _, err := lib.find(session, wire.MaxList, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
	if err != nil || len(handles) == 0 {
		t.Fatalf("%d public keys, %v", len(handles), err)
	}
	const times = 200
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range times {
		if o, err := readKey(lib, session, handles[0], wire.CKOPublicKey); err != nil || o == nil {
			t.Fatalf("%+v, %v", o, err)
		}
	}
	runtime.ReadMemStats(&after)
	// A key takes two calls of C_GetAttributeValue, each with two long attributes. With
	// the race detector a quarter of the rooms are not used again.
	if each := (after.TotalAlloc - before.TotalAlloc) / times; each >= 3*roomText {
		t.Errorf("a key takes %d bytes to be read", each)
	} else {
		t.Logf("%d bytes for a key", each)
	}
}

// A signature leaves no garbage. A module process makes many signatures, and would grow
// for hours before a garbage collection.
func TestSignatureAllocations(t *testing.T) {
	lib, session := openBad(t)
	if err := lib.login(session, pkcs11.CKU_USER, []byte("1234")); err != nil {
		t.Fatal(err)
	}
	handles, _, err := lib.find(session, wire.MaxList, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	if err != nil || len(handles) == 0 {
		t.Fatalf("%d private keys, %v", len(handles), err)
	}
	data, room, params := make([]byte, 32), make([]byte, maxResult), new(wire.Params)
	allocs := testing.AllocsPerRun(100, func() {
		if err := lib.signInit(session, wire.CKMECDSA, params, handles[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := lib.sign(session, data, room); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 0 {
		t.Errorf("%v allocations for a signature", allocs)
	}
}
