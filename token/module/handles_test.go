package module

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// The handle of a session that ended with its card is that of a session with
// another card now. No PIN goes there.
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
			_, err = new(server).login(t.Context(), lib, tok, &wire.Login{Token: id, PIN: pinOf(t, "1234")})
		} else {
			<-tok.live.permits
			tok.live.idle <- other
			_, err = new(server).sign(t.Context(), lib, tok, &wire.Sign{
				Key: wire.KeyID{Token: id}, SignatureLen: 64, ContextLogin: true, PIN: pinOf(t, "1234"),
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
