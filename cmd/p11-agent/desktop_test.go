package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func configOf(t *testing.T, text string) (*config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(file)
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
		if got := c.TouchNotice.after(); got != want {
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
		if got := c.forgetsAtSleep(); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}
