package main

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/peer"
	"p11-agent/token/wire"
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

func TestNoticeLines(t *testing.T) {
	host, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed(make([]byte, 32)).Public())
	if err != nil {
		t.Fatal(err)
	}
	token := wire.TokenID{Label: "card", Serial: "01"}
	const uri = "pkcs11:token=card;serial=01;id=%01"
	print := func(ssh.PublicKey) string { return "FINGERPRINT" }
	who := peer.Peer{Known: true, Chain: []peer.Process{{PID: 7, Name: "ssh"}}}
	for name, test := range map[string]struct {
		label string
		use   *agent.Use
		want  []string
	}{
		"nothing known": {"", nil, []string{"Key: pkcs11:token=card;id=%01"}},
		"a label":       {"login", &agent.Use{Comment: uri}, []string{"Key: login, pkcs11:token=card;id=%01"}},
		"a name":        {"login", &agent.Use{Comment: "laptop"}, []string{"Key: laptop"}},
		"a login": {"", &agent.Use{Comment: "laptop", Caller: &agent.Caller{}, Login: &agent.Login{User: "me"}}, []string{
			"Key: laptop", "For: logging in as me",
		}},
		"a login at a host": {
			"", &agent.Use{Comment: "laptop", Login: &agent.Login{User: "me", HostKey: host.Marshal()}},
			[]string{"Key: laptop", "For: logging in as me at the host with the key FINGERPRINT"},
		},
	} {
		want := slices.Concat([]string{"Token: card (serial 01)"}, test.want, []string{"Asked by (says it is): ssh (7)"})
		if got := noticeLines(token, test.label, uri, []byte{1}, test.use, who, print); !slices.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}
