package pkcs11uri

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/quick"

	"p11-agent/pinentry/secret"
)

// mustParse parses a text that has to be a URI.
func mustParse(t testing.TB, text string) *URI {
	t.Helper()
	u, err := Parse(text)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	t.Cleanup(u.Wipe)
	return u
}

func TestParse(t *testing.T) {
	everything := &URI{
		Token:               new("The Software PKCS#11 Softtoken"),
		Manufacturer:        new("Snake Oil, Inc."),
		Serial:              new(""),
		Model:               new("1.0"),
		LibraryManufacturer: new("Ä"),
		LibraryVersion:      &Version{3, 1},
		LibraryDescription:  new("lib"),
		Object:              new("my:[]@!$'()*+,=&-._~key"),
		Type:                ClassSecretKey,
		ID:                  []byte{0x69, 0, 0xff, 'a'},
		SlotID:              new(uint64(1<<64 - 1)),
		SlotManufacturer:    new("m"),
		SlotDescription:     new("d"),
		PINSource:           &PINSource{Kind: PINFile, value: new("/etc/token_pin")},
		ModuleName:          new("my?module/|"),
		ModulePath:          new("/usr/lib/\xff.so"),
		pathVendor:          []vendor{{new("x-My_1"), new("\xff")}, {new("other"), new("")}},
		queryVendor:         []vendor{{new("x-q"), new("a")}, {new("x-q"), new("b")}},
	}
	for _, test := range []struct {
		name, text string
		want       *URI
	}{
		{"empty path", "pkcs11:", &URI{}},
		{"empty path and query", "pkcs11:?", &URI{}},
		{"empty query", "pkcs11:token=a?", &URI{Token: new("a")}},
		{"query alone", "pkcs11:?module-name=a", &URI{ModuleName: new("a")}},
		{"scheme in upper case", "PKCS11:token=a", &URI{Token: new("a")}},
		{"empty is not absent", "pkcs11:token=;id=;object=", &URI{Token: new(""), ID: []byte{}, Object: new("")}},
		{"equals sign in a value", "pkcs11:token=a=b", &URI{Token: new("a=b")}},
		{"id unencoded", "pkcs11:id=abc", &URI{ID: []byte("abc")}},
		{"escapes in lower case", "pkcs11:id=%ab%0c", &URI{ID: []byte{0xab, 0x0c}}},
		{"zero byte in text", "pkcs11:token=a%00b", &URI{Token: new("a\x00b")}},
		{"padding", "pkcs11:token=a%20%00;model=%20;object=o%20", &URI{Token: new("a"), Model: new(""), Object: new("o ")}},
		{"version without minor", "pkcs11:library-version=255", &URI{LibraryVersion: &Version{255, 0}}},
		{"version with leading zeros", "pkcs11:library-version=003.010", &URI{LibraryVersion: &Version{3, 10}}},
		{"slot-id with leading zeros", "pkcs11:slot-id=007", &URI{SlotID: new(uint64(7))}},
		{"type public", "pkcs11:type=public", &URI{Type: ClassPublic}},
		{"type private", "pkcs11:type=private", &URI{Type: ClassPrivate}},
		{"type cert", "pkcs11:type=cert", &URI{Type: ClassCert}},
		{"type data", "pkcs11:type=data", &URI{Type: ClassData}},
		{"unknown in the path", "pkcs11:objcet=a", &URI{pathVendor: []vendor{{new("objcet"), new("a")}}}},
		{"name in another case is unknown", "pkcs11:Token=a", &URI{pathVendor: []vendor{{new("Token"), new("a")}}}},
		{"question mark in the query", "pkcs11:?x-a=?", &URI{queryVendor: []vendor{{new("x-a"), new("?")}}}},
		{
			"every attribute, shuffled",
			"pkcs11:slot-description=d;id=i%00%FFa;x-My_1=%ff;other=;type=secret-key;serial=;model=1.0;" +
				"object=my:[]@!$'()*+,=&-._~key;token=The%20Software%20PKCS%2311%20Softtoken;slot-id=18446744073709551615;" +
				"manufacturer=Snake%20Oil,%20Inc.;library-manufacturer=%C3%84;library-version=3.1;library-description=lib;" +
				"slot-manufacturer=m?x-q=a&module-path=/usr/lib/%ff.so&pin-source=file:/etc/token_pin&x-q=b&module-name=my?module/|",
			everything,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := mustParse(t, test.text)
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("Parse(%q) = %s, want %s", test.text, got.Canonical(), test.want.Canonical())
			}
		})
	}
}

func TestParsePINSource(t *testing.T) {
	file := func(path string) *PINSource { return &PINSource{Kind: PINFile, value: &path} }
	for _, test := range []struct {
		name, value string
		want        *PINSource // nil: refused
		canonical   string
	}{
		{"file URI", "file:/etc/pin", file("/etc/pin"), "file:/etc/pin"},
		{"file URI, no host", "file:///etc/pin", file("/etc/pin"), "file:/etc/pin"},
		{"file URI, localhost", "FILE://LocalHost/etc/pin", file("/etc/pin"), "file:/etc/pin"},
		{"file URI encoded twice", "file:/a%2520b", file("/a b"), "file:/a%2520b"},
		{"file URI encoded once", "file:/a%20b", file("/a b"), "file:/a%2520b"},
		{"plain path", "/etc/pin", file("/etc/pin"), "file:/etc/pin"},
		{"plain path with a percent sign", "/a%2520b", file("/a%20b"), "file:/a%252520b"},
		{"path with odd bytes", "/%FF?;%26", nil, ""},
		{"path with odd bytes, encoded", "/%FF?%3B%26%23", file("/\xff?;&#"), "file:/%25FF%253F%3B%26%2523"},
		{"path that looks like a host", "//evil/pin", file("//evil/pin"), "file:////evil/pin"},
		{"command", "|/usr/lib/pinomatic", &PINSource{Kind: PINCommand, value: new("/usr/lib/pinomatic")}, "|/usr/lib/pinomatic"},
		{"command with arguments", "%7C/bin/pass%20show%20x%26y", &PINSource{Kind: PINCommand, value: new("/bin/pass show x&y")}, "|/bin/pass%20show%20x%26y"},

		{"another host", "file://evil.example/etc/pin", nil, ""},
		{"host only", "file://localhost", nil, ""},
		{"relative file URI", "file:pin", nil, ""},
		{"empty file URI", "file:", nil, ""},
		{"relative path", "pin", nil, ""},
		{"dot path", "./pin", nil, ""},
		{"empty", "", nil, ""},
		{"another scheme", "https://example.com/pin", nil, ""},
		{"credential", "credential:card-1.pin_2", &PINSource{Kind: PINCredential, value: new("card-1.pin_2")}, "credential:card-1.pin_2"},
		{"credential in another directory", "credential:../x", nil, ""},
		{"hidden credential", "credential:.x", nil, ""},
		{"credential without a name", "credential:", nil, ""},
		{"empty command", "|", nil, ""},
		{"relative command", "|pinomatic", nil, ""},
		{"file URI with a query", "file:/a?b", nil, ""},
		{"file URI with a fragment", "file:/a%23b", nil, ""},
		{"file URI with a bad escape", "file:/a%252", nil, ""},
		{"zero byte", "/a%00", nil, ""},
		{"zero byte, encoded twice", "file:/a%2500", nil, ""},
		{"swallowed PIN", "/a?pin-value=1", nil, ""},
		{"swallowed PIN, encoded twice", "file:/a%253Fpin-value%253D1", nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := "pkcs11:?pin-source=" + test.value
			u, err := Parse(text)
			if test.want == nil {
				if err == nil {
					t.Errorf("Parse(%q) took it as %q", text, u.Canonical())
				}
				return
			}
			if err != nil {
				t.Fatalf("Parse(%q): %v", text, err)
			}
			if !reflect.DeepEqual(u.PINSource, test.want) {
				t.Errorf("Parse(%q): %s %q %q", text, u.PINSource, u.PINSource.Path(), u.PINSource.Command())
			}
			full := 0
			for _, value := range []string{u.PINSource.Path(), u.PINSource.Command(), u.PINSource.Credential()} {
				if value != "" {
					full++
				}
			}
			if full != 1 {
				t.Errorf("it has %d values", full)
			}
			if got, want := u.Canonical(), "pkcs11:?pin-source="+test.canonical; got != want {
				t.Errorf("Canonical() = %q, want %q", got, want)
			}
			if again := mustParse(t, u.Canonical()); !reflect.DeepEqual(again.PINSource, test.want) {
				t.Errorf("Parse(%q): %q %q", u.Canonical(), again.PINSource.Path(), again.PINSource.Command())
			}
		})
	}
}

// refused holds texts that Parse refuses. Each 9137 in a text stands for a PIN.
var refused = []struct {
	name, text string
	offset     int
	attribute  string
}{
	{"nothing", "", 0, ""},
	{"no scheme", "token=9137", 0, ""},
	{"another scheme", "pkcs12:token=9137", 0, ""},
	{"scheme with a look-alike", "p\u212acs11:token=9137", 0, ""},
	{"blank before the scheme", " pkcs11:", 0, ""},
	{"raw blank", "pkcs11:token=my token", 15, "token"},
	{"line break at the end", "pkcs11:token=a\n", 14, "token"},
	{"raw UTF-8", "pkcs11:token=ä", 13, "token"},
	{"slash in the path", "pkcs11:token=a/b", 14, "token"},
	{"bar in the path", "pkcs11:token=a|b", 14, "token"},
	{"fragment", "pkcs11:token=a#b", 14, "token"},
	{"quote", `pkcs11:token="a"`, 13, "token"},
	{"semicolon in the query", "pkcs11:?module-name=a;b", 21, "module-name"},
	{"percent sign at the end", "pkcs11:token=a%", 14, "token"},
	{"half an escape", "pkcs11:token=a%2", 14, "token"},
	{"escape that is not hexadecimal", "pkcs11:token=a%2g", 14, "token"},
	{"escape with a sign", "pkcs11:token=a%+1", 14, "token"},
	{"token not UTF-8", "pkcs11:token=a%ff", 13, "token"},
	{"object not UTF-8", "pkcs11:object=%c3", 14, "object"},
	{"module-name not UTF-8", "pkcs11:?module-name=%80", 20, "module-name"},
	{"zero byte in module-path", "pkcs11:?module-path=/a%00", 20, "module-path"},
	{"only a name", "pkcs11:token", 7, ""},
	{"only a name in the query", "pkcs11:?9137", 8, ""},
	{"no name", "pkcs11:=a", 7, ""},
	{"blank in a name", "pkcs11:x 9137=a", 8, ""},
	{"escape in a name", "pkcs11:tok%65n=a", 10, ""},
	{"trailing semicolon", "pkcs11:token=a;", 15, ""},
	{"leading semicolon", "pkcs11:;token=a", 7, ""},
	{"two semicolons", "pkcs11:token=a;;object=b", 15, ""},
	{"semicolon before the query", "pkcs11:token=a;?module-name=b", 15, ""},
	{"trailing ampersand", "pkcs11:?module-name=a&", 22, ""},
	{"leading ampersand", "pkcs11:?&module-name=a", 8, ""},
	{"token twice", "pkcs11:token=a;token=a", 15, "token"},
	{"vendor attribute of the path twice", "pkcs11:x-9137=a;x-9137=b", 16, ""},
	{"pin-source twice", "pkcs11:?pin-source=/a&pin-source=/a", 22, "pin-source"},
	{"pin-value twice", "pkcs11:?pin-value=9137&pin-value=9137", 23, "pin-value"},
	{"pin-value after pin-source", "pkcs11:?pin-source=/a&pin-value=9137", 22, "pin-value"},
	{"pin-source after pin-value", "pkcs11:?pin-value=9137&pin-source=/a", 23, "pin-source"},
	{"module-name twice", "pkcs11:?module-name=a&module-name=b", 22, "module-name"},
	{"pin-value in the path", "pkcs11:token=a;pin-value=9137", 15, "pin-value"},
	{"module-name in the path", "pkcs11:module-name=a", 7, "module-name"},
	{"token in the query", "pkcs11:?token=a", 8, "token"},
	{"id in the query", "pkcs11:?id=%01", 8, "id"},
	{"type unknown", "pkcs11:type=secretkey", 12, "type"},
	{"type with a brace", "pkcs11:type=secret-key}data", 12, "type"},
	{"type empty", "pkcs11:type=", 12, "type"},
	{"type in upper case", "pkcs11:type=Private", 12, "type"},
	{"type encoded", "pkcs11:type=%70rivate", 12, "type"},
	{"version empty", "pkcs11:library-version=", 23, "library-version"},
	{"version without major", "pkcs11:library-version=.1", 23, "library-version"},
	{"version without minor", "pkcs11:library-version=1.", 23, "library-version"},
	{"version of three parts", "pkcs11:library-version=1.2.3", 23, "library-version"},
	{"version above a byte", "pkcs11:library-version=256", 23, "library-version"},
	{"minor version above a byte", "pkcs11:library-version=1.256", 23, "library-version"},
	{"version with a sign", "pkcs11:library-version=+1", 23, "library-version"},
	{"slot-id empty", "pkcs11:slot-id=", 15, "slot-id"},
	{"slot-id negative", "pkcs11:slot-id=-1", 15, "slot-id"},
	{"slot-id with a sign", "pkcs11:slot-id=+3", 15, "slot-id"},
	{"slot-id hexadecimal", "pkcs11:slot-id=0x1", 15, "slot-id"},
	{"slot-id with an underscore", "pkcs11:slot-id=1_0", 15, "slot-id"},
	{"slot-id above 64 bits", "pkcs11:slot-id=18446744073709551616", 15, "slot-id"},
	{"raw blank in a pin-value", "pkcs11:?pin-value=9137 ", 22, "pin-value"},
	{"bad escape in a pin-value", "pkcs11:?pin-value=9137%9", 22, "pin-value"},
	{"ampersand in a pin-value", "pkcs11:?pin-value=12&9137", 21, ""},
	{"ampersand and equals sign in a pin-value", "pkcs11:?pin-value=12&9137=%", 26, ""},
	{"bad escape in a mistyped pin-value", "pkcs11:?pin-vlaue=9137%9", 22, ""},
	{"ampersand for a question mark", "pkcs11:token=a&pin-value=9137", 13, "token"},
	{"comma for a question mark", "pkcs11:x-a=b,pin-value=9137", 11, ""},
	{"question mark for an ampersand", "pkcs11:?module-path=/a?pin-value=9137", 20, "module-path"},
	{"PIN within a label, encoded", "pkcs11:object=a%3Fpin%2Dvalue%3D9137", 14, "object"},
	{"PIN within an id", "pkcs11:id=%01&pin-value=9137", 10, "id"},
	{"too long", "pkcs11:token=" + strings.Repeat("a", MaxLength-12), MaxLength, ""},
	{"too many attributes", "pkcs11:token=a?" + strings.Repeat("x-a=&", MaxAttributes-1) + "x-9137=", 15 + 5*(MaxAttributes-1), ""},
}

func TestParseRefuses(t *testing.T) {
	for _, test := range refused {
		t.Run(test.name, func(t *testing.T) {
			u, err := Parse(test.text)
			se, ok := errors.AsType[*SyntaxError](err)
			if !ok {
				t.Fatalf("Parse(%q) = %v, %v", test.text, u, err)
			}
			if se.Offset != test.offset || se.Attribute != test.attribute {
				t.Errorf("Parse(%q): byte %d, attribute %q, want %d and %q", test.text, se.Offset, se.Attribute, test.offset, test.attribute)
			}
			if strings.Contains(err.Error(), "9137") {
				t.Errorf("the error quotes the PIN: %v", err)
			}
		})
	}
}

func TestLimitsAreIncluded(t *testing.T) {
	mustParse(t, "pkcs11:token="+strings.Repeat("a", MaxLength-13))
	mustParse(t, "pkcs11:token=a?"+strings.Repeat("x-a=&", MaxAttributes-2)+"x-a=")
}

// TestErrorsQuoteNothing puts a recognisable value in every place for a value, with every
// way to make the value wrong.
func TestErrorsQuoteNothing(t *testing.T) {
	names := []string{"pin-vlaue", "x-a", "9137"}
	for _, a := range attributes {
		names = append(names, a.name)
	}
	failed := 0
	for _, name := range names {
		for _, prefix := range []string{"pkcs11:", "pkcs11:?", "pkcs11:token=a?", "pkcs11:token=a&", "pkcs11:token=a;", "pkcs11:?pin-value=1&", "pkcs11:?pin-source=/1&"} {
			for _, value := range []string{"9137", "9137 ", "9137%", "9137%9", "9137%zz", "%39137%ff", "9137%00", "file:9137", "file://9137/9137", "|9137", "9137.9137", "9137&9137", "9137;9137", "9137=9137&9137"} {
				text := prefix + name + "=" + value
				u, err := Parse(text)
				if err == nil {
					u.Wipe()
					continue
				}
				failed++
				if strings.Contains(err.Error(), "9137") {
					t.Errorf("Parse(%q): %v", text, err)
				}
			}
		}
	}
	if failed < 500 {
		t.Errorf("only %d texts were refused", failed)
	}
}

func TestPIN(t *testing.T) {
	for _, test := range []struct{ name, value, want string }{
		{"plain", "1234", "1234"},
		{"empty", "", ""},
		{"encoded", "%31%26%25%0a", "1&%\n"},
		{"bytes", "%ff%00", "\xff\x00"},
		{"reserved", ":[]@!$'()*+,=/?|", ":[]@!$'()*+,=/?|"},
		{"looks like an attribute", "1?pin-value=2", "1?pin-value=2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := []byte("pkcs11:token=a?pin-value=" + test.value)
			u, err := ParseBytes(text)
			if err != nil {
				t.Fatal(err)
			}
			secret.Wipe(text) // nothing may lie in the caller's memory
			if u.PIN() == nil || string(u.PIN().Bytes()) != test.want {
				t.Errorf("PIN() = %q, want %q", u.PIN().Bytes(), test.want)
			}
			if u.PINSource != nil || u.Ignored() != nil {
				t.Errorf("pin-source %v, ignored %q", u.PINSource, u.Ignored())
			}
			pin := u.PIN()
			u.Wipe()
			u.Wipe()
			if u.PIN() != nil || pin.Len() != 0 {
				t.Error("the PIN is there after Wipe")
			}
			if got := u.Canonical(); got != "pkcs11:token=a" {
				t.Errorf("after Wipe: %q", got)
			}
		})
	}
	if u := mustParse(t, "pkcs11:"); u.PIN() != nil {
		t.Error("a PIN from nowhere")
	}
}

// TestCopySharesPIN tests what the documentation of URI says about copies.
func TestCopySharesPIN(t *testing.T) {
	u := mustParse(t, "pkcs11:?pin-value=1234")
	kept, err := u.PIN().Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Wipe()
	other := *u
	other.Wipe()
	if u.PIN().Len() != 0 {
		t.Error("the original's PIN outlived the copy's")
	}
	if string(kept.Bytes()) != "1234" {
		t.Error("the clone did not")
	}
}

// TestRefusedPINIsWiped counts the mappings of this process. Each PIN in memory is one
// mapping.
func TestRefusedPINIsWiped(t *testing.T) {
	mappings := func() int {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(maps, []byte("\n"))
	}
	const times = 200
	before := mappings()
	for range times {
		if u, err := Parse("pkcs11:?pin-value=1234&module-name=%"); err == nil {
			t.Fatalf("took %v", u)
		}
		if u, err := Parse("pkcs11:?pin-value=1234%"); err == nil {
			t.Fatalf("took %v", u)
		}
	}
	if after := mappings(); after-before > times/2 {
		t.Errorf("%d mappings more after %d refused PINs", after-before, 2*times)
	}
}

// TestNoCopyOfPIN counts what parsing allocates on Go's heap for a long pin-value and for
// a short one. The difference would show a copy.
func TestNoCopyOfPIN(t *testing.T) {
	const times = 100
	heap := func(size int) uint64 {
		text := append([]byte("pkcs11:token=a?pin-value="), bytes.Repeat([]byte("%31"), size)...)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range times {
			u, err := ParseBytes(text)
			if err != nil {
				t.Fatal(err)
			}
			u.Wipe()
		}
		runtime.ReadMemStats(&after)
		return (after.TotalAlloc - before.TotalAlloc) / times
	}
	heap(1) // allocate what is made only once
	if short, long := heap(1), heap(2500); long > short+500 {
		t.Errorf("%d bytes on the heap for a PIN of 1 byte, %d for one of 2500", short, long)
	}
}

func TestUnrecognized(t *testing.T) {
	u := mustParse(t, "pkcs11:objcet=a;token=b;x-c=d?pin-vlaue=e&x-f=g&x-f=h")
	if got := u.Unrecognized(); !slices.Equal(got, []string{"objcet", "x-c"}) {
		t.Errorf("Unrecognized() = %q", got)
	}
	if got := u.Ignored(); !slices.Equal(got, []string{"pin-vlaue", "x-f", "x-f"}) {
		t.Errorf("Ignored() = %q", got)
	}
}

func TestSuggest(t *testing.T) {
	for name, want := range map[string]string{
		"objcet": "object", "tokn": "token", "Token": "token", "ids": "id", "pin-vlaue": "pin-value", "modul-name": "module-name",
		"manufacture": "manufacturer", "slotid": "slot-id", "object-type": "type", "pinfile": "pin-source", "label": "object",
		"x-token": "", "x-id": "", "pin": "", "a": "", "": "", "completely-different": "", strings.Repeat("a", MaxLength): "",
	} {
		if got := Suggest(name); got != want {
			t.Errorf("Suggest(%q) = %q, want %q", name, got, want)
		}
	}
	for _, a := range attributes {
		if got := Suggest(a.name); got != a.name && a.name != "id" {
			t.Errorf("Suggest(%q) = %q", a.name, got)
		}
	}
}

func TestDistanceIsSymmetric(t *testing.T) {
	alike := func(a, b string) bool { return distance(a, b, 1000) == distance(b, a, 1000) }
	if err := quick.Check(alike, nil); err != nil {
		t.Error(err)
	}
}
