package registry

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestSameAsP11Kit also gives commands to p11-kit.
var commands = []struct {
	name string
	line string
	want []string
}{
	{"words", `CMD remote /m.so`, []string{"remote", "/m.so"}},
	{"tabs", "CMD\tremote\t/m.so", []string{"remote", "/m.so"}},
	{"single quotes", `CMD 'a b' c`, []string{"a b", "c"}},
	{"double quotes", `CMD "a b" c`, []string{"a b", "c"}},
	{"quotes within a word", `CMD a"b c"d'e f'g`, []string{"ab cde fg"}},
	{"quotes within quotes", `CMD "it's" '"'`, []string{"it's", `"`}},
	{"escaped quote", `CMD 'it\'s' "a\"b"`, []string{"it's", `a"b`}},
	{"other quote escaped", `CMD 'a\"b' "a\'b"`, []string{`a\"b`, `a\'b`}},
	{"backslash in quotes", `CMD 'a\nb\\c'`, []string{`a\nb\\c`}},
	{"backslash outside of quotes", `CMD a\ b\'c \\d`, []string{`a\ b\'c`, `\\d`}},
	{"empty word", `CMD a '' b`, []string{"a", "", "b"}},
	{"no shell", "CMD $HOME `id` ; * | >x", []string{"$HOME", "`id`", ";", "*", "|", ">x"}},
}

func TestSplitCommand(t *testing.T) {
	for _, tt := range commands {
		t.Run(tt.name, func(t *testing.T) {
			got, err := splitCommand(tt.line)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(append([]string{"CMD"}, tt.want...), got); diff != "" {
				t.Error(diff)
			}
		})
	}
	for name, line := range map[string]string{
		"several blanks":       "  CMD  a  ",
		"empty word at end":    "CMD a",
		"quotes around it all": "'CMD' \"a\"",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := splitCommand(line)
			if diff := cmp.Diff([]string{"CMD", "a"}, got); err != nil || diff != "" {
				t.Error(err, diff)
			}
		})
	}
}

func TestParseRemote(t *testing.T) {
	for value, want := range map[string]Remote{
		"|ssh card p11-kit remote /m.so": {Command: []string{"ssh", "card", "p11-kit", "remote", "/m.so"}},
		"unix:path=/run/p11-kit/pkcs11":  {Address: "unix:path=/run/p11-kit/pkcs11"},
		"vsock:cid=2;port=1234":          {Address: "vsock:cid=2;port=1234"},
	} {
		got, err := parseRemote(value)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Error(value, err, diff)
		}
	}
	const secret = "123456"
	for _, value := range []string{
		"", "|", "| ", "|''", "unix:path=relative", "unix:/x", "tcp:x",
		"|a 'pin-value=" + secret, `|a pin-value=` + secret + `\`, "a pin-value=" + secret,
	} {
		_, err := parseRemote(value)
		if err == nil {
			t.Errorf("%q was accepted", value)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("the error quotes the value: %v", err)
		}
	}
}

func FuzzSplitCommand(f *testing.F) {
	if len(commands) == 0 {
		f.Fatal("no seeds")
	}
	for _, c := range commands {
		f.Add(c.line)
	}
	for _, s := range []string{"", "'", `\`, `"\"`, "''", " a ", "a\vb"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		words, err := splitCommand(line)
		if err != nil {
			return
		}
		total := 0
		for i, word := range words {
			total += len(word)
			if strings.Contains(word, `\`) || strings.Contains(word, "'") {
				return // cannot be printed by the rule below
			}
			words[i] = "'" + word + "'"
		}
		if len(words) == 0 || total > len(line) {
			t.Fatalf("%q became %q", line, words)
		}
		again, err := splitCommand(strings.Join(words, " "))
		if err != nil {
			t.Fatal(err)
		}
		for i := range words {
			words[i] = strings.Trim(words[i], "'")
		}
		if diff := cmp.Diff(words, again); diff != "" {
			t.Error(diff)
		}
	})
}
