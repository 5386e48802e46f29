package advice

import (
	"strings"
	"testing"

	"p11-agent/token"
)

// Without a module for smart cards, the package that brings it is named.
func TestFirstSteps(t *testing.T) {
	without := FirstSteps(nil)
	with := FirstSteps([]token.ModuleStatus{{Path: "/usr/lib/opensc-pkcs11.so"}})
	if !strings.Contains(without[0], "opensc") || strings.Contains(with[0], "opensc") || without[1] != with[1] {
		t.Errorf("%q and %q", without, with)
	}
}
