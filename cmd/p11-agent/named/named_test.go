package named

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/tokentest"
)

func TestMain(m *testing.M) {
	tokentest.Main()
	os.Exit(terminaltest.Without(m).Run())
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"pkcs11:token=work;id=%01": "pkcs11:token=work;id=%01",
		"work":                     "pkcs11:token=work",
		"my token":                 "pkcs11:token=my%20token",
	} {
		u, err := Parse(text)
		if err != nil || u.String() != want {
			t.Errorf("%q: got %v, %v", text, u, err)
		}
	}
	for text, hint := range map[string]string{
		"pkcs11:work":                            "did you mean 'pkcs11:token=work'?",
		"token=work":                             "did you mean 'pkcs11:token=work'?",
		"pkcs1:token=work":                       "did you mean 'pkcs11:token=work'?",
		"//token=work":                           "did you mean 'pkcs11:token=work'?",
		"P-256 SHA256:x pkcs11:token=work label": "did you mean 'pkcs11:token=work'?",
		"pkcs11:token=%zz":                       "",
		"":                                       "",
		// A text that may have a PIN is not repeated.
		"token=work?pin-value=1234": "",
	} {
		u, err := Parse(text)
		if err == nil || exit.Code(err) != exit.CodeUsage || exit.Hint(err) != hint {
			t.Errorf("%q: got %v, %v, hint %q", text, u, err, exit.Hint(err))
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("the error has the PIN: %v", err)
		}
	}
}

func TestSuggest(t *testing.T) {
	f := tokentest.NewFake(t)
	work := f.AddToken("work", "123456")
	work.AddKey(tokentest.P256, 1, "login", nil)
	work.AddKey(tokentest.P256, 0x22, "git", nil)
	f.AddToken("play", "123456")
	store := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{{Name: "fake", Path: "/nowhere/fake.so", Env: f.Env()}}, Command: []string{"/proc/self/exe"},
	})
	for _, tt := range []struct {
		uri   string
		meant []string
		there string
	}{
		{"pkcs11:token=wrok", []string{"did you mean token=work?"}, `tokens that are present: "play", "work"`},
		{"pkcs11:token=login", []string{"did you mean 'pkcs11:object=login', as the label of a key?"}, `tokens that are present: "play", "work"`},
		{"pkcs11:token=work;object=logni", []string{"did you mean object=login?"}, `token "work" has: "login" (id=%01), "git" (id=%22)`},
		{"pkcs11:object=work", []string{"did you mean 'pkcs11:token=work', as the label of a token?"}, `keys that are present: "login" (id=%01), "git" (id=%22)`},
		{"pkcs11:id=22", []string{"did you mean id=%22?"}, `keys that are present: "login" (id=%01), "git" (id=%22)`},
		{"pkcs11:id=%07", nil, `keys that are present: "login" (id=%01), "git" (id=%22)`},
	} {
		t.Run(tt.uri, func(t *testing.T) {
			u, err := pkcs11uri.Parse(tt.uri)
			if err != nil {
				t.Fatal(err)
			}
			meant, there := Suggest(store, u)
			if !slices.Equal(meant, tt.meant) || there != tt.there {
				t.Errorf("got %q, %q; want %q, %q", meant, there, tt.meant, tt.there)
			}
			failed := fmt.Errorf("select: %w", token.ErrNoMatch)
			if got := WithSuggestions(failed, store, u); !errors.Is(got, token.ErrNoMatch) || exit.Hint(got) != strings.Join(append(tt.meant, tt.there), "\n") {
				t.Errorf("got %v, hint %q", got, exit.Hint(got))
			}
		})
	}
	other := errors.New("the module is gone")
	if got := WithSuggestions(other, store, new(pkcs11uri.URI)); got != other || exit.Hint(got) != "" { //nolint:errorlint // the very same
		t.Errorf("got %v", got)
	}
}

func TestSome(t *testing.T) {
	names := strings.Split("abcdefghij", "")
	if got := some(names[:8]); got != "a, b, c, d, e, f, g, h" {
		t.Errorf("got %q", got)
	}
	if got := some(names); got != "a, b, c, d, e, f, g, h and 2 more: see p11-agent list" {
		t.Errorf("got %q", got)
	}
}

// A shell may have cut off a URI that is the last word and has one attribute.
func TestNoteUnquoted(t *testing.T) {
	args := os.Args
	defer func() { os.Args = args }()
	for _, tt := range []struct {
		last, text string
		want       bool
	}{
		{"pkcs11:token=work", "pkcs11:token=work", true},
		{"pkcs11:token=work;id=%01", "pkcs11:token=work;id=%01", false},
		{"pkcs11:token=work?module-name=m", "pkcs11:token=work?module-name=m", false},
		{"pkcs11:", "pkcs11:", false},
		{"-v", "pkcs11:token=work", false},
		{"work", "work", false},
	} {
		os.Args = []string{"p11-agent", "list", tt.last}
		var b bytes.Buffer
		if NoteUnquoted(&b, tt.text); (b.Len() > 0) != tt.want {
			t.Errorf("%q after %q: %q", tt.text, tt.last, &b)
		}
	}
}
