package status

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

var update = flag.Bool("update", false, "rewrite the expected report in testdata")

// testKey is a public key of which the bytes are all the same.
func testKey(t *testing.T) ssh.PublicKey {
	t.Helper()
	pub, err := ssh.NewPublicKey(ed25519.PublicKey(bytes.Repeat([]byte{7}, ed25519.PublicKeySize)))
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// TestReport holds the names and types of all members of status --json that a report without
// tokens has.
func TestReport(t *testing.T) {
	store := token.Open(token.Options{Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { _ = store.Close() })
	r := &Maker{
		Version: "1.2", Started: now, Store: store,
		Sockets: func() []Socket { return []Socket{{Path: "/s", Connections: 2}} },
	}
	pub := testKey(t)
	s := agent.Status{
		Keys: []agent.KeyStatus{{
			Key: pub, Fingerprint: "SHA256:k", Comment: "soft", Software: true, Confirm: true, Limited: true, Expires: now, LastUse: now, Signatures: 3,
			Identity: agent.Identity{Key: pub, Comment: "soft"},
		}},
		Upstreams: []agent.UpstreamStatus{{Name: "/u", Keys: 1, Trouble: "gone"}},
		Approvals: []approval.Status{{Comment: "soft", Fingerprint: "SHA256:k", What: "w", Since: now}},
		Pauses:    []approval.Pause{{From: "ssh", Refused: 4, Until: now}},
		Events:    []audit.Event{{Time: now, Took: 1500 * time.Millisecond, Action: request.ActionSign, Result: audit.OK, Count: 1, First: now, Connection: 5}},
		Failures:  []audit.Event{{Time: now, Action: request.ActionSign, Result: audit.Refused, Reason: "no", Count: 2, First: now}},
	}
	b, err := r.Report(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if _, err := time.Parse(time.RFC3339Nano, got["time"].(string)); err != nil || got["pid"] != float64(os.Getpid()) {
		t.Errorf("time %v, pid %v, %v", got["time"], got["pid"], err)
	}
	delete(got, "time")
	delete(got, "pid")
	var indented bytes.Buffer
	e := json.NewEncoder(&indented) // in the order of the names
	e.SetIndent("", " ")
	if err := e.Encode(got); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/report.json"
	if *update {
		if err := os.WriteFile(golden, indented.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || indented.String() != string(want) {
		t.Errorf("%v: got\n%s\nwant\n%s", err, &indented, want)
	}
	var back Report
	if err := json.Unmarshal(b, &back); err != nil || back.Keys[0].Fingerprint != "SHA256:k" || !back.Keys[0].InMemory {
		t.Errorf("the report reads as %+v, %v", back, err)
	}
}

// The entry of a token has each of its facts. Only an absent token has the time when it was
// seen.
func TestTokenEntry(t *testing.T) {
	s := token.TokenStatus{
		ID:  wire.TokenID{Label: "l", Serial: "s", Manufacturer: "m", Model: "o"},
		URI: "pkcs11:token=l", Module: "mod", Slot: "slot", Reader: "r", Tries: pin.TriesLast, Shadowed: "x", Home: "h",
		Flags: wire.CKFLoginRequired, Seen: now, LeftOut: []string{"why"},
	}
	want := TokenEntry{
		URI: "pkcs11:token=l", Label: "l", Serial: "s", Manufacturer: "m", Model: "o", Module: "mod", Slot: "slot", Reader: "r",
		LoginNeeded: true, PIN: PINLast, Shadowed: "x", Home: "h", Present: true, LeftOut: []string{"why"},
	}
	text := func(e TokenEntry) string {
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := text(NewTokenEntry(s, true)); got != text(want) {
		t.Errorf("got %s", got)
	}
	want.Present, want.LastSeen = false, now
	if got := text(NewTokenEntry(s, false)); got != text(want) {
		t.Errorf("away: got %s", got)
	}
}

func TestModuleReport(t *testing.T) {
	r := &Maker{Trouble: func(token.ModuleStatus) (string, []string) { return "reason", []string{"step"} }}
	works := token.ModuleStatus{Name: "m", Path: "/m.so", Running: true, PID: 3, Restarts: 1, Sandbox: "files", LeftOut: []string{"why"}, Empty: "no card"}
	fails := works
	fails.Err = errors.New("it crashed")
	fails.Running = false
	for _, tt := range []struct {
		name   string
		module token.ModuleStatus
		locked bool
		want   string
	}{
		{"it works", works, false, `{"name":"m","path":"/m.so","restarts":1,"sandbox":"files","left_out":["why"],"state":"running","pid":3,"reason":"no card"}`},
		{"it failed", fails, false, `{"name":"m","path":"/m.so","restarts":1,"sandbox":"files","next":["step"],"state":"failed","pid":3,"reason":"reason"}`},
		{"it failed, and the agent is locked", fails, true, `{"name":"m","path":"/m.so","restarts":1,"sandbox":"files","state":"failed","pid":3}`},
		{"released", token.ModuleStatus{Name: "m", Released: true}, false, `{"name":"m","path":"","restarts":0,"state":"released"}`},
		{"starting", token.ModuleStatus{Name: "m"}, false, `{"name":"m","path":"","restarts":0,"state":"starting"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := json.Marshal(r.moduleReport(tt.module, tt.locked))
			if err != nil || string(b) != tt.want {
				t.Errorf("got %s, %v; want %s", b, err, tt.want)
			}
		})
	}
}

func TestPINOf(t *testing.T) {
	for tries, want := range map[pin.Tries]PIN{pin.TriesUnknown: PINOK, pin.TriesLow: PINLow, pin.TriesLast: PINLast, pin.TriesNone: PINLocked} {
		if got := PINOf(tries); got != want {
			t.Errorf("%v: got %q, want %q", tries, got, want)
		}
	}
}

// When no agent answers, the error says where Find has looked.
func TestFindWithoutAgent(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", socketVariable} {
		t.Setenv(name, "")
	}
	check := func(name, path string, want ...string) {
		t.Helper()
		_, err := Find(t.Context(), path, "")
		if _, ok := errors.AsType[*NotFoundError](err); !ok {
			t.Fatalf("%s: got %v", name, err)
		}
		for _, text := range want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %q does not say %q", name, err, text)
			}
		}
	}
	check("nothing is set", "", "SSH_AUTH_SOCK is not set; XDG_RUNTIME_DIR is not set")
	t.Setenv(socketVariable, filepath.Join(dir, "s"))
	check("a socket is missing", "", "SSH_AUTH_SOCK is "+filepath.Join(dir, "s")+": ", "no such file or directory; XDG_RUNTIME_DIR is not set")
	t.Setenv("XDG_RUNTIME_DIR", dir)
	check("both are missing", "", "SSH_AUTH_SOCK is "+filepath.Join(dir, "s")+": ", filepath.Join(dir, "p11-agent/agent.sock")+": ")
	check("a path is given", filepath.Join(dir, "other"), "no p11-agent answers: "+filepath.Join(dir, "other")+": ")
}
