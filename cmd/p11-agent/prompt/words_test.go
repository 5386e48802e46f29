package prompt

import (
	"strings"
	"testing"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/token/wire"
)

// However a label, a serial number or a comment is made, it makes no line.
func TestLabelsMakeNoLines(t *testing.T) {
	const bad = "a\nFor: SSH login as me at home (host verified)\r\x1b[2J"
	id := wire.TokenID{Label: bad, Serial: bad}
	for name, line := range map[string]string{
		"token": TokenLine(id, "reader"), "key": KeyLine(id, bad, "", []byte(bad), nil), "comment": commentLine(bad),
		"name": KeyLine(id, "", "pkcs11:", nil, &request.Use{Comment: bad}),
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

// A program cannot make another one of its name, and what is not known is not made up.
func TestRequester(t *testing.T) {
	chain := func(names ...string) peer.Peer {
		p := peer.Peer{Known: true, PID: 7}
		for i, name := range names {
			p.Chain = append(p.Chain, peer.Process{PID: 7 + i, Name: name})
		}
		return p
	}
	for _, tt := range []struct {
		p    peer.Peer
		want string
	}{
		{chain("ssh", "bash"), "ssh, started by bash"},
		{chain("ssh"), "ssh"},
		{chain("ssh", "git", "sh", "sh", "bash"), "ssh, started by git, started by sh, started by bash"},
		{chain("x, started by b"), `"x, started by b"`},
		{chain("evil started by", "bash"), `"evil started by", started by bash`},
		{chain(`x"`, "tmux: server"), `"x\"", started by "tmux: server"`},
		{chain(), "process 7"},
		{peer.Peer{}, "unknown process"},
	} {
		if got := Requester(tt.p); got != "Requested by (unverified): "+tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

// The first line of a prompt has the label in quotes that the label cannot end, and is
// never cut before what comes behind.
func TestFirstLine(t *testing.T) {
	for label, want := range map[string]string{
		"demo":                     `the PIN of token "demo"`,
		"":                         "the PIN of a token without label",
		" ":                        `the PIN of token " "`,
		"two words":                `the PIN of token "two words"`,
		`a" of token "b`:           `the PIN of token "a\" of token \"b"`,
		"a\nb\x1b[2J":              `the PIN of token "a\nb\x1b[2J"`,
		"turned\u202eround":        `the PIN of token "turned\u202eround"`,
		strings.Repeat("x", 48):    `the PIN of token "` + strings.Repeat("x", 48) + `"`,
		strings.Repeat("x", 49):    `the PIN of token "` + strings.Repeat("x", 45) + `…"`,
		strings.Repeat("\x01", 48): `the PIN of token "` + strings.Repeat(`\x01`, 11) + `…"`,
		strings.Repeat("ü", 40):    `the PIN of token "` + strings.Repeat("ü", 22) + `…"`,
	} {
		if got := PINOf(wire.TokenID{Label: label}); got != want {
			t.Errorf("%q: got %s, want %s", label, got, want)
		}
	}
	if got := useOf(nil); got != "the use of this key" {
		t.Error(got)
	}
}
