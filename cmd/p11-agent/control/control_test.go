package control

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/status"
)

func TestCheckURI(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "",
		"pkcs11:token=work":               "",
		"work":                            "",
		"pkcs11:token=work?pin-value=123": "the URI says where the PIN comes from: here it is asked for, or read with --stdin",
		"pkcs11:token=work?pin-source=/x": "the URI says where the PIN comes from: here it is asked for, or read with --stdin",
	} {
		err := CheckURI(text)
		if want == "" && err != nil || want != "" && (err == nil || err.Error() != want || exit.Code(err) != exit.CodeUsage) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	if err := CheckURI("pkcs11:token=%zz?pin-value=4711"); err == nil || strings.Contains(err.Error()+exit.Hint(err), "4711") {
		t.Errorf("a URI that cannot be read: got %v", err)
	}
}

// A PIN is for one token.
func TestPickToken(t *testing.T) {
	entry := func(label string, needed bool) status.TokenEntry {
		return status.TokenEntry{URI: "pkcs11:token=" + label, Label: label, Serial: "1", Present: true, LoginNeeded: needed}
	}
	waits := func(label string) status.Token {
		return status.Token{TokenEntry: entry(label, true), Keys: []string{"k"}}
	}
	in := func(label string) status.Token {
		return status.Token{TokenEntry: entry(label, true), LoggedIn: true, Keys: []string{"k"}}
	}
	free := func(label string) status.Token {
		return status.Token{TokenEntry: entry(label, false), Keys: []string{"k"}}
	}
	bare := status.Token{TokenEntry: entry("bare", true)}
	away, shadowed := waits("away"), waits("shadowed")
	away.Present, shadowed.Shadowed = false, "opensc"
	for _, tt := range []struct {
		name   string
		uri    string
		tokens []status.Token
		want   string // the label of the token
		said   string
		err    string
	}{
		{"one waits", "", []status.Token{in("a"), waits("b"), free("c")}, "b", "", ""},
		{"one waits, and a token without keys", "", []status.Token{bare, waits("b")}, "b", "", ""},
		{"a token without keys is named", "bare", []status.Token{bare}, "bare", "", ""},
		{"absent and shadowed tokens do not count", "", []status.Token{away, shadowed, waits("b")}, "b", "", ""},
		{"several wait", "", []status.Token{waits("a"), waits("my b")}, "", "", "several tokens need a login, so name one: 'pkcs11:token=a', 'pkcs11:token=my b'"},
		{"a URI selects several", "pkcs11:", []status.Token{waits("a"), in("b")}, "", "", "pkcs11: selects several tokens, and a PIN is for one: 'pkcs11:token=a', 'pkcs11:token=b'"},
		{"a URI selects several without a login to make", "pkcs11:", []status.Token{in("a"), in("b")}, "", "", "pkcs11: selects several tokens, and a PIN is for one: 'pkcs11:token=a', 'pkcs11:token=b'"},
		{"logged in to all", "", []status.Token{in("a"), free("b")}, "", "already logged in to a (serial 1)\nb (serial 1) needs no login\n", ""},
		{"no key selected", "pkcs11:token=x", nil, "", "", "no token that is present has a key that pkcs11:token=x selects: see p11-agent list"},
		{"no token", "", nil, "", "", "no token with a key is present: see p11-agent list"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			got, err := pickToken(&status.Agent{Report: status.Report{Tokens: tt.tokens}}, tt.uri, &out)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
			label := ""
			if got != nil {
				label = got.Label
			}
			if label != tt.want || out.String() != tt.said {
				t.Errorf("got %q, and %q is printed", label, &out)
			}
		})
	}
	if _, err := pickToken(&status.Agent{Report: status.Report{Locked: true, Tokens: []status.Token{waits("a")}}}, "", new(bytes.Buffer)); err == nil {
		t.Error("a locked agent logs in")
	}
}

// A PIN that is locked is not asked for, and not tried.
func TestLoginLocked(t *testing.T) {
	token := status.Token{TokenEntry: status.TokenEntry{Label: "card\nx", Serial: "1", Present: true, LoginNeeded: true, PIN: status.PINLocked}, Keys: []string{"k"}}
	var out, stderr bytes.Buffer
	err := Login(t.Context(), &status.Agent{Report: status.Report{Tokens: []status.Token{token}}}, "", true, &out, &stderr)
	if err == nil || err.Error() != "the PIN of card x (serial 1) is locked: unlock it with its PUK or SO PIN" || out.Len()+stderr.Len() > 0 {
		t.Errorf("got %v, %q, %q", err, &out, &stderr)
	}
}

func TestNotes(t *testing.T) {
	const another = "\nNote: another prompt already asks for the PIN of this token. It comes first, for a while"
	for _, tt := range []struct {
		name  string
		token status.Token
		want  string
	}{
		{"nothing special", status.Token{}, "Token: card (serial 1)"},
		{"one try", status.Token{TokenEntry: status.TokenEntry{PIN: status.PINLast}}, "Token: card (serial 1)\nNote: ONE TRY IS LEFT. A wrong PIN now locks the token."},
		{"a prompt", status.Token{PromptOpen: true, PromptAt: "on /dev/pts/1"}, "Token: card (serial 1)" + another + ": on /dev/pts/1."},
		{"a login", status.Token{LoginGoesOn: true}, "Token: card (serial 1)" + another + "."},
	} {
		tt.token.Label, tt.token.Serial = "card", "1"
		if got := notes(&tt.token); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// An agent that refuses a PIN says what became of the tries.
func TestRefused(t *testing.T) {
	for tries, want := range map[request.Tries]string{
		"": "wrong PIN", "ok": "wrong PIN",
		"low":  "wrong PIN\np11-agent: fewer tries are left",
		"last": "wrong PIN\np11-agent: ONE TRY IS LEFT: p11-agent login asks whether to use it",
	} {
		if got := refused(sshagent.ControlAnswer{LoginAnswer: request.LoginAnswer{Tries: tries}, Error: "wrong\nPIN"}).Error(); got != want {
			t.Errorf("%q: got %q, want %q", tries, got, want)
		}
	}
}

// A person who interrupts reads that, and no error of the connection.
func TestConnectionEnded(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	broken := errors.New("has hung up")
	if got := connectionEnded(ctx, broken); got.Error() != "the agent has hung up" || !errors.Is(got, broken) {
		t.Errorf("got %v", got)
	}
	interrupted := errors.New("interrupted")
	cancel(interrupted)
	if got := connectionEnded(ctx, broken); !errors.Is(got, interrupted) {
		t.Errorf("got %v", got)
	}
}

// A lock that is there already, or is not there, costs no passphrase.
func TestLockState(t *testing.T) {
	var out bytes.Buffer
	if err := Lock(t.Context(), &status.Agent{Report: status.Report{Locked: true}}, &out); err == nil || err.Error() != "the agent is locked already" {
		t.Errorf("got %v", err)
	}
	if err := Unlock(t.Context(), new(status.Agent), &out); err == nil || err.Error() != "the agent is not locked" {
		t.Errorf("got %v", err)
	}
	if err := locked(t.Context(), false, nil, &out, "agent locked", "refused"); err == nil || err.Error() != "refused" || out.Len() > 0 {
		t.Errorf("got %v, %q", err, &out)
	}
	if err := locked(t.Context(), true, nil, &out, "agent locked", "refused"); err != nil || out.String() != "agent locked\n" {
		t.Errorf("got %v, %q", err, &out)
	}
}
