package export

import (
	"strings"
	"testing"
)

// The names of files are safe wherever they are written, and no two keys get one.
func TestFileName(t *testing.T) {
	for in, want := range map[string]string{
		"login": "login", "PIV AUTH key": "PIV-AUTH-key", "../../etc/passwd": "etc-passwd", "": "token-key", "…": "token-key",
		"-rf": "rf", ".ssh": "ssh", "a.pub": "a", "$(id) `x` \"y\"": "id-x-y", strings.Repeat("x", 300): strings.Repeat("x", maxFileName),
	} {
		if got := fileName(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestPatterns(t *testing.T) {
	for _, tt := range []struct {
		what string
		ok   func(string) bool
		yes  []string
		no   []string
	}{
		{"host", IsHost, []string{"box", "!box", "*.example.org", "10.0.0.1", "[::1]:22", "fe80::1%eth0"}, []string{"", "a b", "a\nb", "a,b", "me@box", "$(x)", `"box"`}},
		{"namespace", IsNamespace, []string{"git", "git,file", "x@example.org", "!git,*"}, []string{"", "a b", `a"`, "a\n"}},
		{"principal", IsPrincipal, []string{"me@example.org", "*@example.org", "a,b", "a#b"}, []string{"", "#a", "a b", "a\t", `"a"`, `a\`}},
	} {
		for _, text := range tt.yes {
			if !tt.ok(text) {
				t.Errorf("%q is not taken for a %s", text, tt.what)
			}
		}
		for _, text := range tt.no {
			if tt.ok(text) {
				t.Errorf("%q is taken for a %s", text, tt.what)
			}
		}
	}
}
