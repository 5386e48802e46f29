package newkey

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/keygen"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

func TestMain(m *testing.M) {
	tokentest.Main()
	os.Exit(terminaltest.Without(m).Run())
}

func TestURI(t *testing.T) {
	for _, tt := range []struct {
		name, text, label, id string
		want                  string
	}{
		{"a label of a token", "work", "", "", "pkcs11:token=work"},
		{"flags", "pkcs11:token=work", "login", "0A", "pkcs11:token=work;object=login;id=%0A"},
		{"flags that agree with the URI", "pkcs11:token=work;object=login;id=%0A", "login", "0a", "pkcs11:token=work;object=login;id=%0A"},
		{"the longest names", "pkcs11:token=work", strings.Repeat("l", maxLabel), strings.Repeat("01", maxKeyID), "pkcs11:token=work;object=" + strings.Repeat("l", maxLabel) + ";id=" + strings.Repeat("%01", maxKeyID)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, err := URI(tt.text, tt.label, tt.id)
			if err != nil || u.String() != tt.want {
				t.Errorf("got %v, %v; want %s", u, err, tt.want)
			}
		})
	}
	for _, tt := range []struct {
		name, text, label, id string
		err, hint             string
	}{
		{"digits without percent signs", "pkcs11:token=work;id=01", "", "", "the id of the URI has digits without percent signs, and means the bytes 3031", "did you mean id=%01? To have those bytes, write id=%30%31"},
		{"a PIN", "pkcs11:token=work?pin-value=1234", "", "", "the URI names a PIN: leave it out, as the agent asks for the PIN or takes it from a pin-source of the configuration", ""},
		{"another label", "pkcs11:token=work;object=a", "b", "", "--label and the object of the URI differ", ""},
		{"another ID", "pkcs11:token=work;id=%01", "", "02", "--id and the id of the URI differ", ""},
		{"not hexadecimal", "work", "", "0", `--id "0" is not hexadecimal, such as 01`, ""},
		{"a long label", "work", strings.Repeat("l", maxLabel+1), "", "a label has 64 bytes at the most, all of them printable", ""},
		{"an unprintable label", "work", "a\nb", "", "a label has 64 bytes at the most, all of them printable", ""},
		{"a long ID", "work", "", strings.Repeat("01", maxKeyID+1), "an ID has 32 bytes at the most", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, err := URI(tt.text, tt.label, tt.id)
			if err == nil || err.Error() != tt.err || exit.Hint(err) != tt.hint {
				t.Errorf("got %v, %v, hint %q", u, err, exit.Hint(err))
			}
		})
	}
}

// The URI and the line for authorized_keys name the new key. A note says what the token does
// not say of the key's origin.
func TestMake(t *testing.T) {
	f := tokentest.NewFake(t)
	card := f.AddToken("card", tokentest.PIN)
	store := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{{Name: "fake", Path: "/nowhere/fake.so", Env: f.Env()}}, Command: []string{"/proc/self/exe"},
	}, tokentest.PIN)
	u, err := URI("card", "login", "0a")
	if err != nil {
		t.Fatal(err)
	}
	pin, err := secret.From([]byte(tokentest.PIN))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Wipe()
	k, err := Make(t.Context(), store, u, keygen.ECDSAP256, pin)
	if err != nil {
		t.Fatal(err)
	}
	var out, stderr bytes.Buffer
	k.Local = wire.Unknown
	if err := Print(&out, &stderr, k); err != nil {
		t.Fatal(err)
	}
	uri, line, _ := strings.Cut(out.String(), "\n")
	pub, comment, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || comment != "login" || len(rest) > 0 || uri != k.URI() || !strings.HasSuffix(uri, ";id=%0A") {
		t.Errorf("%v: printed\n%s", err, &out)
	}
	if want, err := ssh.NewPublicKey(k.Public()); err != nil || !bytes.Equal(pub.Marshal(), want.Marshal()) {
		t.Errorf("another key is printed: %v", err)
	}
	if got := stderr.String(); !strings.Contains(got, "note: the token does not say that the key was made on it (CKA_LOCAL)\n") {
		t.Errorf("the notes are %q", got)
	}
	if card.Wrong() != 0 {
		t.Error("a wrong PIN was tried")
	}
}

// A token that is quick is not spoken of. A slow one is, once.
func TestProgress(t *testing.T) {
	const line = "token \"card\" makes a key of type rsa-2048, which may take minutes"
	for _, tt := range []struct {
		name        string
		terminal    bool
		took        time.Duration
		interrupted time.Duration // 0: never
		want        string
	}{
		{"quick", false, 900 * time.Millisecond, 0, ""},
		{"slow", false, 3500 * time.Millisecond, 0, line + "\n"},
		{"slow, on a terminal", true, 2500 * time.Millisecond, 0, "\r" + line + ": 1 s\r" + line + ": 2 s\n"},
		{
			"interrupted on a terminal", true, 2500 * time.Millisecond, 1500 * time.Millisecond,
			"\r" + line + ": 1 s\ninterrupted: the key is removed as soon as the token has made it; interrupt again to stop waiting\n\r" + line + ": 2 s\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var b bytes.Buffer
				p := NewProgress(ctx, &b, keygen.RSA2048)
				p.terminal = tt.terminal
				done := p.Begin(wire.TokenID{Label: "card"})
				if tt.interrupted > 0 {
					time.Sleep(tt.interrupted)
					cancel()
				}
				time.Sleep(tt.took - tt.interrupted)
				done()
				if got := b.String(); got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
			})
		})
	}
}
