package pkcs11uri

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/token/wire"
)

// The package documentation lists the differences from p11-kit. The test fails if it
// finds a difference that is not here, or does not find one that is here.
var (
	// p11kitTakes holds the reasons why Parse refuses a text that p11-kit takes.
	p11kitTakes = map[string]string{
		"characters to be encoded":          "a character that has to be percent-encoded",
		"empty attributes":                  "an empty attribute",
		"repeated attributes":               "a second time",
		"any name in the path":              "the name of an attribute is made of",
		"old types, and unknown ones":       "it is one of public",
		"PIN attributes in the path":        "it belongs in the query",
		"path attributes in the query":      "it belongs in the path",
		"both PIN attributes":               "exclude each other",
		"texts that are not UTF-8":          "not UTF-8",
		"zero bytes in paths":               "a zero byte",
		"an empty slot-id":                  "a decimal number",
		"library version that wraps":        "from 0 to 255",
		"pin-source of any form":            "an absolute path, an absolute path,",
		"pin-source with any command":       "the absolute path of a program",
		"pin-source on any host":            "another host",
		"pin-source with a query":           `with "?" or "#"`,
		"pin-source with a bad escape":      "percent-encoded itself",
		"pin-value swallowed by another":    `it holds "pin-value="`,
		"longer than 8 KiB":                 "longer than",
		"more than 64 attributes":           "more than",
		"blanks in and before the scheme":   "it has to start with",
		"broken escape in an unknown value": `"%" without`,
	}

	// p11kitRefuses holds the reasons why p11-kit refuses a text that Parse takes.
	p11kitRefuses = map[string]func(text string) bool{
		"library version of 255": func(text string) bool {
			return strings.Contains(text, "255") && strings.Contains(text, "library-version=")
		},
		"upper case in a query attribute name": func(text string) bool { return strings.Contains(text, "X-A=") },
	}

	// p11kitMatches holds the reasons why a text that both take matches different things.
	p11kitMatches = map[string]func(text string) bool{
		"zero bytes at the end of a text": func(text string) bool {
			return strings.Contains(text, "%00;") || strings.HasSuffix(strings.Split(text, "?")[0], "%00")
		},
		"a zero byte at the start of a text": func(text string) bool { return strings.Contains(text, "=%00") },
		"old names of type": func(text string) bool {
			return strings.Contains(text, "objecttype=") || strings.Contains(text, "object-type=")
		},
		"old name of pin-source in the path":             func(text string) bool { return strings.Contains(text, "pinfile=") },
		"a text that is too long matches nothing at all": func(text string) bool { return strings.Contains(text, tooLong) },
	}
)

// tooLong fits into no field of PKCS#11.
var tooLong = strings.Repeat("z", 65)

var things = []struct {
	token  *wire.TokenID
	module *ModuleInfo
	slot   *SlotInfo
	object *ObjectInfo
}{
	{token: &wire.TokenID{}},
	{token: &wire.TokenID{Label: "a", Manufacturer: "a", Serial: "a", Model: "a"}},
	{token: &wire.TokenID{Label: "A", Manufacturer: "a b", Serial: "a", Model: "ä"}},
	{token: &wire.TokenID{Label: "a b", Manufacturer: "a", Serial: "A", Model: ""}},
	{token: &wire.TokenID{Label: "a=b", Manufacturer: "a&b", Serial: "a+b", Model: "ab"}},
	{module: &ModuleInfo{}},
	{module: &ModuleInfo{Manufacturer: "a", Description: "a", Version: Version{2, 1}}},
	{module: &ModuleInfo{Manufacturer: "a", Description: "a b", Version: Version{2, 0}}},
	{module: &ModuleInfo{Manufacturer: "A", Description: "a", Version: Version{2, 10}}},
	{slot: &SlotInfo{}},
	{slot: &SlotInfo{ID: 7, Manufacturer: "a", Description: "a b"}},
	{slot: &SlotInfo{ID: 1 << 40, Manufacturer: "A", Description: "a"}},
	{object: &ObjectInfo{Class: ClassPrivate}},
	{object: &ObjectInfo{Class: ClassPrivate, ID: []byte{1, 2}, Label: "a"}},
	{object: &ObjectInfo{Class: ClassPublic, ID: []byte{1, 2}, Label: "a b"}},
	{object: &ObjectInfo{Class: ClassCert, ID: []byte("a"), Label: "A"}},
	{object: &ObjectInfo{Class: ClassSecretKey, ID: []byte{0}, Label: "ä"}},
	{object: &ObjectInfo{Class: ClassData, ID: []byte("a b"), Label: "a\x00"}},
}

// ckoOf holds the numbers of the classes (pkcs11t.h).
var ckoOf = map[Class]int{ClassData: 0, ClassCert: 1, ClassPublic: 2, ClassPrivate: 3, ClassSecretKey: 4}

// matches has one 0 or 1 for each of the things.
func matches(u *URI) string {
	var b strings.Builder
	for _, t := range things {
		var match bool
		switch {
		case t.token != nil:
			match = u.MatchToken(*t.token)
		case t.module != nil:
			match = u.MatchModule(*t.module)
		case t.slot != nil:
			match = u.MatchSlot(*t.slot)
		default:
			match = u.MatchObject(*t.object)
		}
		if match {
			b.WriteByte('1')
		} else {
			b.WriteByte('0')
		}
	}
	return b.String()
}

// buildP11kit compiles the program that asks p11-kit, and returns its path.
func buildP11kit(t *testing.T) string {
	t.Helper()
	missing := t.Skipf
	if os.Getenv("CI") == "true" {
		missing = t.Fatalf
	}
	for _, tool := range []string{"gcc", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing("%s is missing: %v", tool, err)
		}
	}
	flags, err := exec.Command("pkg-config", "--cflags", "--libs", "p11-kit-1").Output()
	if err != nil {
		missing("p11-kit's header files are missing (libp11-kit-dev): %v", err)
	}
	program := filepath.Join(t.TempDir(), "p11kit")
	args := append([]string{"-Wall", "-Werror", "-o", program, "testdata/p11kit.c"}, strings.Fields(string(flags))...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return program
}

// A verdict is the result of p11-kit for a text.
type verdict struct {
	takes   bool
	matches string
	text    string // what p11-kit writes for it
}

// ask has p11-kit judge texts. No text may hold a zero byte.
func ask(t *testing.T, program string, texts []string) []verdict {
	t.Helper()
	var in bytes.Buffer
	for _, thing := range things {
		switch {
		case thing.token != nil:
			fmt.Fprintf(&in, "token .%x .%x .%x .%x\n", thing.token.Label, thing.token.Manufacturer, thing.token.Serial, thing.token.Model)
		case thing.module != nil:
			fmt.Fprintf(&in, "module .%x .%x %d %d\n", thing.module.Manufacturer, thing.module.Description, thing.module.Version.Major, thing.module.Version.Minor)
		case thing.slot != nil:
			fmt.Fprintf(&in, "slot %d .%x .%x\n", thing.slot.ID, thing.slot.Manufacturer, thing.slot.Description)
		default:
			fmt.Fprintf(&in, "object %d .%x .%x\n", ckoOf[thing.object.Class], thing.object.ID, thing.object.Label)
		}
	}
	for _, text := range texts {
		fmt.Fprintf(&in, "uri .%x\n", text)
	}
	cmd := exec.Command(program)
	cmd.Stdin = &in
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(lines) != len(texts) {
		t.Fatalf("%d answers to %d texts", len(lines), len(texts))
	}
	verdicts := make([]verdict, len(lines))
	for i, line := range lines {
		if f := strings.Fields(line); f[0] == "+" {
			verdicts[i] = verdict{true, f[1], f[2]}
		}
	}
	return verdicts
}

// generated returns the texts to compare on: every attribute with every value, and random
// mixtures of them. The mixtures are the same in each run.
func generated() []string {
	texts := []string{"a", "A", "", "%61", "a%20b", "a%20", "%00", "a%00", "%ff", "%C3%a4", "a=b", "a&b", "a+b", "a b", "a\nb", "a/b", "a|b", "a?b", "a#b", "ä", "a%", "a%2", "a%zz", "a%+1", tooLong}
	// A slot-id beyond a signed number overflows in p11-kit. This is undefined behaviour
	// in C, so no such slot-id is here.
	values := map[string][]string{
		"library-version": {"2", "2.1", "02.010", "2.0", "255", "2.255", "2.256", "256", "", ".1", "2.", "2.1.1", "a", "-2", "4294967298.1", "2%2e1"},
		"type":            {"private", "public", "cert", "secret-key", "data", "secretkey", "", "Private", "x", "%70rivate"},
		"slot-id":         {"7", "007", "0", "", "8", "1099511627776", "-1", "7a", "9223372036854775807"},
		"id":              append([]string{"%01%02", "%01", "\x01\x02"}, texts...),
		"pin-source":      append([]string{"/a", "file:/a", "file:///a", "file://localhost/a", "file://b/a", "file:/a%252", "|/a", "|a", "/a%00", "file:/a?b"}, texts...),
		"module-path":     append([]string{"/a", "/a%00"}, texts...),
		"pin-value":       append([]string{"1", "1&x-a=1"}, texts...),
		"x-a":             {"", "a", "a%"},
		"X-A":             {"a"},
		"pinfile":         {"/a", "a"},
		"objecttype":      {"private", "x"},
		"object-type":     {"cert"},
		"x~a":             {"a"},
		"":                {"a"},
	}
	for _, a := range attributes {
		if values[a.name] == nil {
			values[a.name] = texts
		}
	}
	for _, swallowed := range []string{"a&pin-value=1", "a?pin-value=1", "a%26pin-value=1"} {
		values["object"] = append(values["object"][:len(values["object"]):len(values["object"])], swallowed)
	}

	all := []string{
		"", "pkcs11", "pkcs11:", "PKCS11:", "PkCs11:token=a", "pkcs12:", ":", "pkcs11:?", "pkcs11:??", "pkcs11:;", "pkcs11:&", " pkcs11:token=a", "pkcs 11:",
		"pkcs11:token", "pkcs11:token?x-a=b", "pkcs11:?x-a", "pkcs11:token=a;", "pkcs11:;token=a", "pkcs11:token=a;;object=a", "pkcs11:token=a;;object", "pkcs11:;=a",
		"pkcs11:?x-a=b&", "pkcs11:?&x-a=b", "pkcs11:?x-a=b&&x-a=b", "pkcs11:;x-a=%", "pkcs11:?x-a=%",
		"pkcs11:token=" + strings.Repeat("a", MaxLength),
		"pkcs11:?" + strings.Repeat("x-a=&", MaxAttributes) + "x-a=",
	}
	var one []string // name=value; the order of the map does not change this order
	names := []string{"x-a", "X-A", "pinfile", "objecttype", "object-type", "x~a", ""}
	for _, a := range attributes {
		names = append(names, a.name)
	}
	for _, name := range names {
		for _, value := range values[name] {
			attribute := name + "=" + value
			one = append(one, attribute)
			all = append(all, "pkcs11:"+attribute, "pkcs11:?"+attribute)
		}
	}

	random := rand.New(rand.NewPCG(7512, 1))
	mixture := func(most int, delimiter string, query bool) string {
		var some []string
		for range random.IntN(most + 1) {
			a := one[random.IntN(len(one))]
			// Most attributes are in the right component. Otherwise Parse would refuse
			// nearly every text at once.
			known := attributeNamed(strings.Split(a, "=")[0])
			if known == nil || known.query == query || random.IntN(20) == 0 {
				some = append(some, a)
			}
		}
		return strings.Join(some, delimiter)
	}
	for range 6000 {
		text := "pkcs11:" + mixture(4, ";", false)
		if query := mixture(3, "&", true); query != "" {
			text += "?" + query
		}
		all = append(all, text)
	}
	return all
}

// applying returns the names of the differences that text may show.
func applying(differences map[string]func(text string) bool, text string) []string {
	var names []string
	for name, applies := range differences {
		if applies(text) {
			names = append(names, name)
		}
	}
	return names
}

func TestLikeP11kit(t *testing.T) {
	program := buildP11kit(t)
	texts := generated()
	verdicts := ask(t, program, texts)

	seen := make(map[string]bool)
	known := func(differences map[string]func(string) bool, text string) bool {
		names := applying(differences, text)
		for _, name := range names {
			seen[name] = true
		}
		return len(names) > 0
	}
	both, neither, differ := 0, 0, 0
	var canonical []string
	var parsed []*URI
	for i, text := range texts {
		u, err := Parse(text)
		switch p11kit := verdicts[i]; {
		case err != nil && !p11kit.takes:
			neither++
		case err != nil:
			differ++
			se, ok := errors.AsType[*SyntaxError](err)
			if !ok {
				t.Fatal(err)
			}
			explained := false
			for name, reason := range p11kitTakes {
				if strings.Contains(se.Reason, reason) {
					seen[name] = true
					explained = true
				}
			}
			if !explained {
				t.Errorf("p11-kit takes %q; we do not: %v", text, err)
			}
		case !p11kit.takes:
			differ++
			if !known(p11kitRefuses, text) {
				t.Errorf("p11-kit refuses %q, which we take", text)
			}
		default:
			both++
			if got := matches(u); got != p11kit.matches && !known(p11kitMatches, text) {
				t.Errorf("%q: we match %s, p11-kit %s", text, got, p11kit.matches)
			}
			// p11-kit does not print an attribute that it does not understand.
			if len(u.pathVendor) == 0 && len(applying(p11kitMatches, text)) == 0 && !strings.Contains(text, "%00") {
				canonical = append(canonical, u.Canonical())
				parsed = append(parsed, u)
				again, err := Parse(p11kit.text)
				if err != nil {
					t.Errorf("we do not take %q, which p11-kit writes for %q: %v", p11kit.text, text, err)
				} else if u.queryVendor == nil && again.Canonical() != u.Canonical() {
					t.Errorf("we read %q as %q, and as %q from p11-kit's text", text, u.Canonical(), again.Canonical())
				} else {
					again.Wipe()
				}
			}
		}
		if err == nil {
			u.Wipe()
		}
	}
	t.Logf("%d texts taken by both, %d by neither, %d by one", both, neither, differ)
	if both < 1000 || neither < 1000 {
		t.Error("the texts are too one-sided to compare on")
	}
	for i, p11kit := range ask(t, program, canonical) {
		if !p11kit.takes || p11kit.matches != matches(parsed[i]) {
			t.Errorf("p11-kit does not understand what we write: %q", canonical[i])
		}
	}

	for name := range p11kitTakes {
		if !seen[name] {
			t.Errorf("p11-kit no longer takes %s", name)
		}
	}
	for _, differences := range []map[string]func(string) bool{p11kitRefuses, p11kitMatches} {
		for name := range differences {
			if !seen[name] {
				t.Errorf("no difference any more: %s", name)
			}
		}
	}
}
