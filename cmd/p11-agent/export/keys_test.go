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
