package setup

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/crypto/ssh"

	"p11-agent/cmd/p11-agent/files"
)

// A signer is known by address and key.
func TestSigners(t *testing.T) {
	const line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8qeYyBYT5b6jqTLqPmxQ8oCrpWNpXYJZT7mP9b0v5m key"
	pub, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "git", "allowed_signers")
	if hasSigner(file, "me@example.org", pub) {
		t.Error("known without a file")
	}
	if err := files.AppendLine(file, "you@example.org "+line); err != nil {
		t.Fatal(err)
	}
	if hasSigner(file, "me@example.org", pub) {
		t.Error("known by another's address")
	}
	if err := files.AppendLine(file, "\nme@example.org namespaces=\"git\" "+line+"\n"); err != nil {
		t.Fatal(err)
	}
	if !hasSigner(file, "me@example.org", pub) {
		t.Error("not known")
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.HasPrefix(b, []byte("you@example.org ssh-ed25519 ")) {
		t.Errorf("the other signer: %v, %s", err, b)
	}
}

// Answers are read line by line, and bounded.
func TestDialog(t *testing.T) {
	var out bytes.Buffer
	ask := func(in string) *dialog { return &dialog{in: iotest.OneByteReader(strings.NewReader(in)), out: &out} }
	for in, want := range map[string]bool{"\n": true, "n\n": false, "perhaps\nNO\n": false, " Yes \n": true} {
		if got, err := ask(in).yes(t.Context(), "?", true); err != nil || got != want {
			t.Errorf("%q is %v, %v", in, got, err)
		}
	}
	for in, want := range map[string]int{"\n": 0, "2\n": 1, "0\n": -1, "3\n-1\nx\n1\n": 0} {
		if got, err := ask(in).choose(t.Context(), "?", []string{"a", "b"}); err != nil || got != want {
			t.Errorf("%q is %v, %v", in, got, err)
		}
	}
	d := ask("one\ntwo\n")
	for _, want := range []string{"one", "two"} {
		if got, err := d.line(t.Context(), "?"); err != nil || got != want {
			t.Errorf("got %q, %v", got, err)
		}
	}
	for _, in := range []string{"", "y", strings.Repeat("y", maxAnswer+1) + "\n"} {
		if _, err := ask(in).line(t.Context(), "?"); err == nil {
			t.Errorf("%.10q is an answer", in)
		}
	}
	if newDialog(strings.NewReader(""), &out) != nil {
		t.Error("there is no terminal, and something is asked")
	}
}

// What ssh-copy-id is given is a host, and no option or command.
func TestHostName(t *testing.T) {
	for name, want := range map[string]bool{
		"host": true, "me@host.example.org": true, "10.0.0.1": true, "": false, "-oProxyCommand=x": false, "a b": false, "a;b": false, "$(x)": false,
	} {
		if hostName.MatchString(name) != want {
			t.Errorf("%q: want %v", name, want)
		}
	}
}
