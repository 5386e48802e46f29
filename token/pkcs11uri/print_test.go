package pkcs11uri

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestCanonical(t *testing.T) {
	for _, test := range []struct{ name, text, canonical, shown string }{
		{"nothing", "PKCS11:?", "pkcs11:", "pkcs11:"},
		{
			"order of the path",
			"pkcs11:slot-description=m;slot-manufacturer=l;slot-id=007;id=k;type=private;object=i;library-description=h;" +
				"library-version=2;library-manufacturer=f;model=d;serial=c;manufacturer=b;token=a",
			"pkcs11:token=a;manufacturer=b;serial=c;model=d;library-manufacturer=f;library-version=2.0;library-description=h;" +
				"object=i;type=private;id=%6B;slot-id=7;slot-manufacturer=l;slot-description=m",
			"",
		},
		{
			"order of the query",
			"pkcs11:?x-b=1&module-path=/p&x-a=2&module-name=n&pin-source=/s&x-b=0",
			"pkcs11:?pin-source=file:/s&module-name=n&module-path=/p&x-b=1&x-a=2&x-b=0",
			"pkcs11:?pin-source=file:&module-name=n&module-path=/p",
		},
		{"empty values", "pkcs11:id=;token=?module-name=", "pkcs11:token=;id=?module-name=", ""},
		{"needless escapes", "pkcs11:token=%61%3a%5b%5d%40%21%24%27%28%29%2a%2b%2c%3d%26", "pkcs11:token=a:[]@!$'()*+,=&", ""},
		{"needful escapes", "pkcs11:token=%00%2f%3f%7c%3b%25%20%23%c3%a4", "pkcs11:token=%00%2F%3F%7C%3B%25%20%23%C3%A4", ""},
		{"escapes in the query", "pkcs11:?module-name=%2f%3f%7c%3b%25%26", "pkcs11:?module-name=/?|%3B%25%26", ""},
		{"id", "pkcs11:id=a-%0f", "pkcs11:id=%61%2D%0F", ""},
		{"pin-value", "pkcs11:token=a?pin-value=1234&module-name=b", "pkcs11:token=a?module-name=b", ""},
		{"pin-value alone", "pkcs11:?pin-value=1234", "pkcs11:", ""},
		{"command", "pkcs11:?pin-source=%7c/bin/pin%20-x", "pkcs11:?pin-source=|/bin/pin%20-x", "pkcs11:?pin-source=|"},
		{"vendor in the path", "pkcs11:x-b=%2f;token=a;x-a=%26", "pkcs11:token=a;x-b=%2F;x-a=&", "pkcs11:token=a;x-b=...;x-a=..."},
		{"vendor in the query", "pkcs11:?x-b=%2f%26", "pkcs11:?x-b=/%26", "pkcs11:"},
	} {
		t.Run(test.name, func(t *testing.T) {
			u := mustParse(t, test.text)
			if got := u.Canonical(); got != test.canonical {
				t.Errorf("Canonical() = %q, want %q", got, test.canonical)
			}
			if test.shown == "" {
				test.shown = test.canonical
			}
			if got := u.String(); got != test.shown {
				t.Errorf("String() = %q, want %q", got, test.shown)
			}
			if again := mustParse(t, u.Canonical()).Canonical(); again != test.canonical {
				t.Errorf("Canonical of it = %q, want %q", again, test.canonical)
			}
		})
	}
}

// TestShownTextIsNoPINSource checks that Parse refuses the printed text of a URI with a
// pin-source. So a person who pastes a text from a log never gets another pin-source, or
// none.
func TestShownTextIsNoPINSource(t *testing.T) {
	for _, value := range []string{"/etc/pin", "|/bin/pin"} {
		shown := mustParse(t, "pkcs11:?pin-source="+value).String()
		if u, err := Parse(shown); err == nil {
			t.Errorf("Parse(%q) = %q", shown, u.Canonical())
		}
	}
}

type element struct{ Value any }

// sinks prints values in every way that a program may use.
func sinks(t *testing.T, values ...any) string {
	t.Helper()
	var out bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		for _, v := range values {
			slog.New(handler).Info("x", "value", v, slog.Group("g", "value", v))
		}
	}
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%b", "%p", "%t", "%T", "%08.3f", "%!"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		fmt.Fprintln(&out, v, []any{v}, map[string]any{"k": v})
		fmt.Fprintln(&out, fmt.Errorf("use %v: %w", v, fmt.Errorf("inner %+v", v)))
		b, err := json.Marshal(map[string]any{"value": v})
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
		if b, err = xml.Marshal(element{v}); err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	return out.String()
}

func TestNothingPrintsASecret(t *testing.T) {
	const pin, path = "Zqxwvkj", "/root/Hjqzxkw" // nothing like a number, a time or an address
	hidden := []string{pin, "Hjqzxkw", fmt.Sprintf("%x", pin), fmt.Sprintf("%X", pin), fmt.Sprint([]byte(pin)), fmt.Sprint([]byte("Hjqzxkw"))}
	for _, text := range []string{
		"pkcs11:token=shown?pin-value=" + pin,
		"pkcs11:token=shown?pin-value=%5a%71%78%77%76%6b%6a",
		"pkcs11:token=shown?pin-vlaue=" + pin,
		"pkcs11:token=shown?pin-value=1&" + pin + "=2",
		"pkcs11:token=shown;pin-vlaue=" + pin,
		"pkcs11:token=shown?pin-source=file:" + path,
		"pkcs11:token=shown?pin-source=|" + path,
	} {
		u := mustParse(t, text)
		source := u.PINSource
		if source == nil {
			source = new(PINSource)
		}
		type exported struct {
			URI    *URI
			Value  URI
			Source PINSource
		}
		out := sinks(t, u, *u, &u, []URI{*u}, []*URI{u}, source, *source, exported{u, *u, *source}, &exported{u, *u, *source})
		if !strings.Contains(out, "shown") {
			t.Fatalf("%q is not printed at all", text)
		}
		// fmt calls no method of a value in an unexported field.
		type nested struct {
			uri    *URI
			value  URI
			source *PINSource
		}
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			out += fmt.Sprintf(verb, nested{u, *u, source}) + fmt.Sprintf(verb, &nested{u, *u, source}) + fmt.Sprintf(verb, []nested{{u, *u, source}})
		}
		for _, h := range hidden {
			if i := strings.Index(out, h); i >= 0 {
				t.Errorf("%q is printed: %q", text, out[max(0, i-80):i+len(h)])
			}
		}
	}
}

func TestEveryVerbPrintsString(t *testing.T) {
	u := mustParse(t, "pkcs11:token=a?pin-value=1")
	for verb, want := range map[string]string{
		"%v": "pkcs11:token=a", "%+v": "pkcs11:token=a", "%#v": "pkcs11:token=a", "%s": "pkcs11:token=a", "%q": `"pkcs11:token=a"`,
	} {
		if got := fmt.Sprintf(verb, u); got != want {
			t.Errorf("%s of *URI = %s, want %s", verb, got, want)
		}
		if got := fmt.Sprintf(verb, *u); got != want {
			t.Errorf("%s of URI = %s, want %s", verb, got, want)
		}
	}
	var none *URI
	if got := fmt.Sprint(none); got != "<nil>" {
		t.Errorf("nil *URI prints %q", got)
	}
	if got := (PINSource{}).String(); got != "unknown" {
		t.Errorf("zero PINSource prints %q", got)
	}
}
