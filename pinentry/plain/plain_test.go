package plain_test

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"p11-agent/pinentry/plain"
)

// shown has a text, and the result of a function for it.
type shown struct{ name, text, want string }

func check(t *testing.T, show func(string) string, tests []shown) {
	t.Helper()
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := show(test.text); got != test.want {
				t.Errorf("%q is shown as %q, want %q", test.text, got, test.want)
			}
		})
	}
}

func TestLine(t *testing.T) {
	check(t, plain.Line, []shown{
		{"empty", "", ""},
		{"as it is", "Schlüssel 鍵 🔑", "Schlüssel 鍵 🔑"},
		{"blanks", "a\nb\tc d", "a b c d"},
		{"terminal escape", "a\x1b[2Jb\r", `a\x1b[2Jb\x0d`},
		{"without width, and another direction", "\u202e\u200b\U000e0001", `\u202e\u200b\U000e0001`},
		{"not UTF-8", "a\xffb", "a\ufffdb"},
		{"longer", strings.Repeat("x", 5000), strings.Repeat("x", 4096)},
	})
	check(t, plain.Lines, []shown{{"line breaks stay", "a\nb\x1b", "a\nb\\x1b"}})
}

func TestLineWithin(t *testing.T) {
	check(t, func(s string) string { return plain.LineWithin(s, 8) }, []shown{
		{"fits", "12345678", "12345678"},
		{"longer", "123456789", "12345…"},
		{"cut within a character", "1234ü6789", "1234…"},
		{"escapes count", "1234567\x1b", "12345…"},
		{"line break", "1\n2", "1 2"},
	})
	check(t, func(s string) string { return plain.LineWithin(s, 5000) }, []shown{
		{"more than Line reads", strings.Repeat("ü", 2500), strings.Repeat("ü", 2500)},
	})
	check(t, func(s string) string { return plain.LineWithinRunes(s, 4) }, []shown{
		{"fits in runes", "üüüü", "üüüü"},
		{"longer in runes", "üüüüü", "üüü…"},
	})
}

func TestOutput(t *testing.T) {
	check(t, plain.Output[string], []shown{
		{"empty", " \t", "?"},
		{"colours", "\x1b[31mred\x1b[m ", "?[31mred?[m"},
		{"not UTF-8", "a\xffb\ufffd", "a?b?"},
		{"no-break space", "a\u00a0b", "a?b"},
	})
}

func TestComment(t *testing.T) {
	check(t, func(s string) string { return plain.Comment([]byte(s), 1024) }, []shown{
		{"empty", "", ""},
		{"plain", "me@host ~ Schlüssel 鍵", "me@host ~ Schlüssel 鍵"},
		{"control characters", "a\x1b[31m\x00\n\t\x7fb\u0085", "a�[31m����b�"},
		{"another direction", "a\u202eb\u2028", "a�b�"},
		{"invalid", "a\xff\xc3b\xe2\x82", "a��b��"},
		{"as long as can be", strings.Repeat("x", 1024), strings.Repeat("x", 1024)},
		{"longer", strings.Repeat("x", 1025), strings.Repeat("x", 1024)},
		{"cut within a character", strings.Repeat("x", 1023) + "é", strings.Repeat("x", 1023)},
		{"long and invalid", strings.Repeat("\xff", 1024), strings.Repeat("�", 341)},
	})
}

func TestProgram(t *testing.T) {
	check(t, func(s string) string { return plain.Program(s, 64) }, []shown{
		{"plain", "ssh", "ssh"},
		{"empty", "", "?"},
		{"terminal escape", "a\x1b[2Jb", `a\x1b[2Jb`},
		{"line end", "a\nb", `a\nb`},
		{"backslash", `a\nb`, `a\\nb`},
		{"not UTF-8", "a\xffb", `a\xffb`},
		{"right to left", "a\u202eb", `a\u202eb`},
		{"no-break space", "a\u00a0b", `a\u00a0b`},
		{"arrow", "ssh (1) ← git", `ssh (1) \u2190 git`},
		{"umlaut", "schlüssel", "schlüssel"},
		{"as long as can be", strings.Repeat("x", 64), strings.Repeat("x", 64)},
		{"longer", strings.Repeat("x", 65), strings.Repeat("x", 61) + "…"},
		{"cut before an escape", strings.Repeat("x", 60) + "\x01\x01", strings.Repeat("x", 60) + "…"},
	})
}

// A name from a token or a client cannot pass for words of the agent.
func TestName(t *testing.T) {
	check(t, func(s string) string { return plain.Name(s, 48) }, []shown{
		{"empty", "", ""},
		{"a word", "work", "work"},
		{"punctuation in words", "Yubico PIV EE #7123 (no)", `"Yubico PIV EE #7123 (no)"`},
		{"address", "me@laptop", "me@laptop"},
		{"umlauts", "Schlüssel für die Arbeit", "Schlüssel für die Arbeit"},
		{"URI", "pkcs11:token=a%20b;id=%01", "pkcs11:token=a%20b;id=%01"},
		{"two blanks", "two  blanks", `"two  blanks"`},
		{"a blank before", " one before", `" one before"`},
		{"line break", "a\nFor: SSH", `"a\nFor: SSH"`},
		{"a line of the prompt", "a For: SSH login as me at home", `"a For: SSH login as me at home"`},
		{"quotes", `say "yes"`, `"say \"yes\""`},
		{"terminal escape", "red\x1b[31m", `"red\x1b[31m"`},
		{"another direction", "turned\u202eround", `"turned\u202eround"`},
		{"no-break space", "no\u00a0break", `"no\u00a0break"`},
		{"not UTF-8", "bad\xff", `"bad\xff"`},
		{"long", strings.Repeat("long ", 10), strings.Repeat("long ", 9) + "lon…"},
		{"one long word", strings.Repeat("long", 12) + "ones", strings.Repeat("long", 12) + "…"},
		{"cut before a character", strings.Repeat("x", 47) + "ü", strings.Repeat("x", 47) + "…"},
	})
}

func TestQuotes(t *testing.T) {
	check(t, func(s string) string { return plain.QuotedName(s, 8) }, []shown{
		{"empty", "", `""`},
		{"fits", "12345678", `"12345678"`},
		{"longer", "123456789", `"12345…"`},
		{"escapes count", "12345\x1b", `"12345…"`},
		{"quotes", `a"b`, `"a\"b"`},
	})
	check(t, func(s string) string { return plain.Quoted(s, 4) }, []shown{
		{"short", "a\nb", `"a\nb"`},
		{"long", "12345", `"1234"...`},
	})
	check(t, func(s string) string { return plain.HostName(s, 16) }, []shown{
		{"no name", "", `""`},
		{"host", "host.example:22", "host.example:22"},
		{"pattern", "*.example", "*.example"},
		{"letters of another script", "hоst", `"h\u043est"`},
		{"blank", "me at home", `"me at home"`},
		{"long host", strings.Repeat("x", 17), `"` + strings.Repeat("x", 16) + `"...`},
	})
}

func TestPrints(t *testing.T) {
	for text, want := range map[string][2]bool{
		"host-1.example": {true, true}, "a b": {true, false}, "schlüssel": {true, false},
		"a\x1b": {}, "a\u00a0b": {}, "\xff": {}, "": {true, true},
	} {
		if got := [2]bool{plain.Prints(text), plain.PrintsASCII(text)}; got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// FuzzShow calls each function with any text. The result is valid UTF-8 on one line, prints,
// and is within the limit.
func FuzzShow(f *testing.F) {
	for _, s := range []string{
		"", "plain", "100%", "a\r\nb\tc", "\x1b[2J", "\xff\xc3", "ü€🔑", "\u202e\u200b\u2028\U000e0001", strings.Repeat("ü%", 1000), "\x00",
		strings.Repeat("x", 63) + "ü", strings.Repeat("\x01", 70), `"\`, "←",
	} {
		f.Add(s)
	}
	const limit = 64
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range []struct {
			by    string
			shown string
			limit int
		}{
			{"Line", plain.Line(text), 10 * len(text)},
			{"LineWithin", plain.LineWithin(text, limit), limit},
			{"LineWithinRunes", plain.LineWithinRunes(text, limit), 4 * limit},
			{"Output", plain.Output(text), 10 * len(text)},
			{"Comment", plain.Comment([]byte(text), limit), limit},
			{"Program", plain.Program(text, limit), limit},
			{"Name", plain.Name(text, limit), 10*limit + 5},
			{"QuotedName", plain.QuotedName(text, limit), limit + 2},
			{"HostName", plain.HostName(text, limit), 10*limit + 5},
			{"Quoted", plain.Quoted(text, limit), 10*limit + 5},
		} {
			odd := func(r rune) bool { return !unicode.IsGraphic(r) }
			if !utf8.ValidString(s.shown) || strings.ContainsFunc(s.shown, odd) || len(s.shown) > s.limit {
				t.Errorf("%s shows %q as %q", s.by, text, s.shown)
			}
		}
		if shown := plain.Line(text); len(shown) <= 4096 && plain.Line(shown) != shown {
			t.Errorf("%q is shown as %q, which is not shown as it is", text, shown)
		}
		if shown := plain.LineWithin(text, limit); plain.LineWithin(shown, limit) != shown {
			t.Errorf("%q is shown as %q, which is not shown as it is", text, shown)
		}
	})
}
