package config

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/token"
)

// TestReleaseSetting has each value of release mean what its description says.
func TestReleaseSetting(t *testing.T) {
	for _, tt := range []struct {
		text          string
		release, idle time.Duration
	}{
		{"never", 0, token.ReleaseNever},
		{"5s", 5 * time.Second, 5 * time.Second},
		{"1h", time.Hour, token.ReleaseIdle}, // as without release when no one is logged in
	} {
		var v ReleaseAfter
		if err := v.UnmarshalText([]byte(tt.text)); err != nil {
			t.Errorf("%s: %v", tt.text, err)
		}
		var spec token.ModuleSpec
		v.apply(&spec)
		if spec.Release != tt.release || spec.Idle != tt.idle {
			t.Errorf("%s: release %v, idle %v", tt.text, spec.Release, spec.Idle)
		}
	}
	for _, text := range []string{"", "often", "0s", "-1s", "Never"} {
		if err := new(ReleaseAfter).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

// A socket that shows some keys only, or asks, is for others, who change nothing unless
// the configuration lets them.
func TestSocketReadOnly(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                  false,
		"read-only = true":                  true,
		"confirm = true":                    true,
		"confirm = false":                   false,
		`confirm = "never"`:                 false,
		`confirm = "always"`:                true,
		`confirm = "forwarded"`:             true,
		`confirm = "first-use"`:             true,
		`keys = ["pkcs11:token=a"]`:         true,
		"keys = []":                         true,
		"confirm = true\nread-only = false": false,
		"keys = []\nread-only = false":      false,
	} {
		file := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(file, []byte("[[socket]]\nname = \"s\"\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Sockets[0].Rules().ReadOnly; got != want {
			t.Errorf("%q: read-only %v, want %v", text, got, want)
		}
	}
}

func configOf(t *testing.T, text string) (*File, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(file)
}

func TestTouchNotice(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"":                       time.Second,
		`touch-notice = "250ms"`: 250 * time.Millisecond,
		`touch-notice = "off"`:   0,
	} {
		c, err := configOf(t, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.TouchNotice.After(); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	for _, text := range []string{`touch-notice = "0s"`, `touch-notice = "-1s"`, `touch-notice = "never"`, `touch-notice = 1`} {
		if _, err := configOf(t, text); err == nil {
			t.Errorf("%s is taken", text)
		}
	}
}

func TestForgetsAtSleep(t *testing.T) {
	const key = "[[key]]\nuri = \"pkcs11:token=a\"\n"
	for text, want := range map[string]bool{
		"":                                    false,
		`forget-on = ["screen-lock"]`:         false,
		`forget-on = ["screen-lock","sleep"]`: true,
		key + `forget-on = ["sleep"]`:         true,
		key + `forget-on = []`:                false,
		key:                                   false,
	} {
		c, err := configOf(t, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ForgetsAtSleep(); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// A socket has the values of confirm that a key has, and true and false besides.
func TestSocketConfirm(t *testing.T) {
	const socket = "[[socket]]\nname = \"s\"\n"
	for text, want := range map[string]approval.Confirm{
		"":                      "",
		"confirm = false":       "",
		`confirm = "never"`:     "",
		"confirm = true":        approval.ConfirmAlways,
		`confirm = "always"`:    approval.ConfirmAlways,
		`confirm = "forwarded"`: approval.ConfirmForwarded,
		`confirm = "first-use"`: approval.ConfirmFirstUse,
	} {
		c, err := configOf(t, socket+text)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Sockets[0].Rules().Confirm; got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	for _, text := range []string{`confirm = "deny"`, `confirm = "allways"`, `confirm = ""`, "confirm = 1", "confirm = [true]"} {
		if _, err := configOf(t, socket+text); err == nil {
			t.Errorf("%s is taken", text)
		}
	}
}
