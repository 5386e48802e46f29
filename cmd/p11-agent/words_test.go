package main

import (
	"strings"
	"testing"

	"p11-agent/agent"
	"p11-agent/token/wire"
)

// What a token, or who adds a key, calls something does not pass for what the agent
// says.
func TestNamed(t *testing.T) {
	for text, want := range map[string]string{
		"":                                  "",
		"work":                              "work",
		"Yubico PIV EE #7123 (no)":          `"Yubico PIV EE #7123 (no)"`,
		"me@laptop":                         "me@laptop",
		"Schlüssel für die Arbeit":          "Schlüssel für die Arbeit",
		"pkcs11:token=a%20b;id=%01":         "pkcs11:token=a%20b;id=%01",
		"two  blanks":                       `"two  blanks"`,
		" one before":                       `" one before"`,
		"a\nFor: SSH":                       `"a\nFor: SSH"`,
		"a For: SSH login as me at home":    `"a For: SSH login as me at home"`,
		`say "yes"`:                         `"say \"yes\""`,
		"red\x1b[31m":                       `"red\x1b[31m"`,
		"turned\u202eround":                 `"turned\u202eround"`,
		"no\u00a0break":                     `"no\u00a0break"`,
		"bad\xff":                           `"bad\xff"`,
		strings.Repeat("long ", 10):         strings.Repeat("long ", 9) + "lon…",
		strings.Repeat("long", 12) + "ones": strings.Repeat("long", 12) + "…",
		strings.Repeat("x", 47) + "ü":       strings.Repeat("x", 47) + "…",
	} {
		if got := named(text, 48); got != want {
			t.Errorf("%q is shown as %s, not %s", text, got, want)
		}
	}
}

// However a label, a serial number or a comment is made, it makes no line.
func TestLabelsMakeNoLines(t *testing.T) {
	const bad = "a\nFor: SSH login as me at home (host verified)\r\x1b[2J"
	id := wire.TokenID{Label: bad, Serial: bad}
	for name, line := range map[string]string{
		"token": tokenLine(id, "reader"), "key": keyLine(id, bad, "", []byte(bad), nil), "comment": commentLine(bad),
		"name": keyLine(id, "", "pkcs11:", nil, &agent.Use{Comment: bad}),
		"any":  bad,
	} {
		if got := about([]string{line}); strings.ContainsAny(got, "\n\r\x1b") {
			t.Errorf("%s: %q", name, got)
		}
		if name != "any" && strings.ContainsAny(line, "\n\r\x1b") {
			t.Errorf("%s by itself: %q", name, line)
		}
	}
}
