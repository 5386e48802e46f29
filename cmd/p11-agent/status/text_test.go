package status

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
)

// now is the time of the reports of the tests.
var now = time.Date(2030, 5, 6, 12, 0, 0, 0, time.UTC)

// lines returns the printed lines below a title, with single blanks.
func lines(t *testing.T, r Report, title string) (below []string) {
	t.Helper()
	var b bytes.Buffer
	if err := r.Print(&b); err != nil {
		t.Fatal(err)
	}
	if _, text, ok := strings.Cut(b.String(), "\n"+title+"\n"); ok {
		text, _, _ = strings.Cut(text, "\n\n")
		for line := range strings.Lines(text) {
			below = append(below, strings.Join(strings.Fields(line), " "))
		}
	}
	return below
}

func wantLine(t *testing.T, r Report, title, want string) {
	t.Helper()
	r.Time = now
	if got := lines(t, r, title); len(got) != 1 || got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPrint(t *testing.T) {
	r := Report{
		Version: "1.2", PID: 7, Started: now.Add(-3 * time.Hour), Time: now,
		Sockets: []Socket{{Path: "/run/agent.sock", Connections: 1}, {Path: "/run/forward.sock", Name: "forward"}},
		Keys: []Key{{
			KeyEntry: KeyEntry{Type: "ecdsa-sha2-nistp256", Fingerprint: "SHA256:abc"}, Comment: "pkcs11:token=work;serial=1;id=%01",
			Present: true, Signatures: 2, LastUsed: now.Add(-time.Minute),
		}},
		Tokens: []Token{{
			TokenEntry: TokenEntry{Label: "work", Serial: "1", Module: "softhsm2", Present: true, LoginNeeded: true, PIN: PINOK},
			LoggedIn:   true, Since: now.Add(-5 * time.Minute), Ends: now.Add(time.Hour), PINKept: true,
		}},
		Modules:  []Module{{ModuleEntry: ModuleEntry{Name: "softhsm2", Sandbox: "files"}, State: Running, PID: 8}},
		Requests: []Event{{Time: now, Request: request.ActionSign, Result: audit.OK, Purpose: request.PurposeLogin, User: "me", Host: "box", Comment: "work", Client: "ssh (9) ← bash (3)"}},
		Failures: []Event{{Time: now.Add(-time.Minute), Request: request.ActionSign, Comment: "work", Reason: "the agent is locked", Count: 3}},
	}
	const want = `p11-agent 1.2, process 7, up for 3 h

SOCKETS
  /run/agent.sock    1 connection
  /run/forward.sock  0 connections  forward

KEYS
  pkcs11:token=work;id=%01  P-256  SHA256:abc  present  2 signatures, last 60 s ago

TOKENS
  work (serial 1)  softhsm2  PIN ok  logged in for 300 s, 60 min left, PIN kept  not used

MODULES
  softhsm2  process 8  sandbox: files

LAST REQUESTS
  just now  sign  work  login as me at box  ssh (9)  ok

LAST FAILURES
  60 s ago  sign  work  because the agent is locked (3 times)
`
	var b bytes.Buffer
	if err := r.Print(&b); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); got != strings.ReplaceAll(want, "300 s", "5 min") {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestPrintLocked(t *testing.T) {
	var b bytes.Buffer
	r := Report{Version: "1.2", Started: now, Time: now, Locked: true}
	if err := r.Print(&b); err != nil {
		t.Fatal(err)
	}
	if got, want := b.String(), "p11-agent 1.2, process 0, up for less than 1 s, LOCKED (ssh-add -X or p11-agent unlock opens it)\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPrintKey(t *testing.T) {
	for _, tt := range []struct {
		name string
		key  Key
		want string
	}{
		{"in memory", Key{KeyEntry: KeyEntry{Type: "ssh-ed25519"}, Comment: "soft one", InMemory: true, Present: true, Confirm: true}, "soft one Ed25519 in memory not used confirmed each time"},
		{"token away", Key{KeyEntry: KeyEntry{Type: "ssh-rsa"}, Comment: "k"}, "k RSA token away not used"},
		{
			"limits",
			Key{KeyEntry: KeyEntry{Type: "ssh-ed25519-cert-v01@openssh.com"}, Comment: "k", Present: true, Limited: true, Expires: now.Add(90 * time.Second)},
			"k Ed25519 certificate present not used for some hosts only, for 90 s",
		},
		{"no forged line", Key{KeyEntry: KeyEntry{Type: "ssh-rsa"}, Comment: "a\nb\x1b[2J", Present: true}, `a b\x1b[2J RSA present not used`},
	} {
		t.Run(tt.name, func(t *testing.T) { wantLine(t, Report{Keys: []Key{tt.key}}, "KEYS", tt.want) })
	}
}

func TestPrintToken(t *testing.T) {
	for _, tt := range []struct {
		name  string
		token Token
		want  string
	}{
		{"not logged in", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true}}, "PIN ok not logged in"},
		{"no PIN", Token{TokenEntry: TokenEntry{Present: true}}, "no PIN needed"},
		{"away", Token{TokenEntry: TokenEntry{LoginNeeded: true, LastSeen: now.Add(-50 * time.Hour)}}, "PIN ok away, last seen 2 days ago"},
		{"used through another module", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true, Shadowed: "opensc"}}, "PIN ok used through module opensc"},
		{"fewer tries", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true, PIN: PINLow}}, "FEWER PIN TRIES LEFT not logged in"},
		{"one try", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true, PIN: PINLast}}, "ONE PIN TRY LEFT not logged in"},
		{"locked", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true, PIN: PINLocked}}, "PIN LOCKED not logged in"},
		{"a prompt", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true}, PromptOpen: true, PromptAt: "on /dev/pts/1"}, "PIN ok a PIN prompt is open: on /dev/pts/1"},
		{"a prompt at an unknown place", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true}, PromptOpen: true}, "PIN ok a PIN prompt is open"},
		{"a login", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true}, LoginGoesOn: true}, "PIN ok a login is under way"},
		{"logged in", Token{TokenEntry: TokenEntry{Present: true, LoginNeeded: true}, LoggedIn: true, Since: now.Add(-10 * time.Second)}, "PIN ok logged in for 10 s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.token.Label, tt.token.Module = "card", "m"
			wantLine(t, Report{Tokens: []Token{tt.token}}, "TOKENS", "card (serial unknown) m "+tt.want+" not used")
		})
	}
}

func TestPrintModule(t *testing.T) {
	for _, tt := range []struct {
		name   string
		module Module
		want   string
	}{
		{"starting", Module{State: Starting}, "m starting"},
		{"released", Module{State: Released}, "m has released its cards"},
		{"started again", Module{ModuleEntry: ModuleEntry{Restarts: 2}, State: Running, PID: 3}, "m process 3, started again 2 times"},
		{"shows no token", Module{ModuleEntry: ModuleEntry{Sandbox: "files"}, State: Running, PID: 3, Reason: "its server has none"}, "m process 3 its server has none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.module.Name = "m"
			wantLine(t, Report{Modules: []Module{tt.module}}, "MODULES", tt.want)
		})
	}
	failed := Report{Modules: []Module{{ModuleEntry: ModuleEntry{Name: "m", Next: []string{"one", "two\nlines"}}, State: Failed, Reason: "no such file"}}}
	want := []string{"m failed no such file", "next for m: one", "next for m: two", "lines"}
	if got := lines(t, failed, "MODULES"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPrintRequest(t *testing.T) {
	sign := Event{Time: now, Request: request.ActionSign, Result: audit.OK, Comment: "k", Client: "ssh (1)"}
	for _, tt := range []struct {
		name string
		set  func(*Event)
		want string
	}{
		{"no user", func(e *Event) { e.Purpose = request.PurposeGit }, "just now sign k git ssh (1) ok"},
		{"unknown host", func(e *Event) { e.Purpose, e.User = request.PurposeLogin, "me" }, "just now sign k login as me ssh (1) ok"},
		{"another namespace", func(e *Event) { e.Purpose, e.Namespace = request.PurposeOther, "x" }, "just now sign k namespace x ssh (1) ok"},
		{"unknown data", func(e *Event) { e.Purpose = request.PurposeOther }, "just now sign k - ssh (1) ok"},
		{"forwarded", func(e *Event) {
			e.Purpose, e.Forwarded, e.Via = request.PurposeGit, true, []string{"a", "b"}
		}, "just now sign k git, FORWARDED by a, b ssh (1) ok"},
		{"slow", func(e *Event) { e.Purpose, e.Duration = request.PurposeGit, 90 }, "just now sign k git ssh (1) ok after 90 s"},
		{"a note", func(e *Event) { e.Purpose, e.Note = request.PurposeGit, "PIN asked" }, "just now sign k git ssh (1) ok: PIN asked"},
		{"refused", func(e *Event) {
			e.Purpose, e.Result, e.Duration, e.Count = request.PurposeGit, audit.Refused, 90, 2
		}, "just now sign k git ssh (1) refused (2 times)"},
		{"various", func(e *Event) {
			e.Purpose, e.Count, e.Various = request.PurposeGit, 2, true
		}, "just now sign k git ssh (1) ok (2 times, not always the same)"},
		{"no key", func(e *Event) { e.Request, e.Comment = request.ActionLock, "" }, "just now lock - - ssh (1) ok"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := sign
			tt.set(&e)
			wantLine(t, Report{Requests: []Event{e}}, "LAST REQUESTS", tt.want)
		})
	}
}

// Many signatures leave room for changes and refusals. The order stays.
func TestShownRequests(t *testing.T) {
	var r Report
	for range 30 {
		r.Requests = append(r.Requests, Event{Request: request.ActionSign, Result: audit.OK})
	}
	for range 7 {
		r.Requests = append(r.Requests, Event{Request: request.ActionAdd, Result: audit.OK}, Event{Request: request.ActionSign, Result: audit.Refused})
	}
	got := make(map[string]int)
	for _, e := range r.shown() {
		got[string(e.Request)+" "+string(e.Result)]++
	}
	if n := len(r.shown()); n != shownRequests || got["add ok"] != shownOfKind || got["sign refused"] != shownOfKind || got["sign ok"] != shownRequests-2*shownOfKind {
		t.Errorf("%d requests: %v", n, got)
	}
	if first := r.shown()[0]; first.Request != request.ActionSign || first.Result != audit.OK {
		t.Errorf("the newest is %+v", first)
	}
}

func TestPrintLeftOut(t *testing.T) {
	r := Report{
		Time:    now,
		Keys:    []Key{{KeyEntry: KeyEntry{NotShown: true}}, {}},
		Modules: []Module{{ModuleEntry: ModuleEntry{Name: "m", LeftOut: []string{"tokens: 3 of 9"}}, State: Running}},
		Tokens:  []Token{{TokenEntry: TokenEntry{Label: "t", Serial: "1", LeftOut: []string{"keys: 5 of 6"}}}},
	}
	got := lines(t, r, "LEFT OUT")
	if len(got) != 3 || got[0] != "keys "+FewShown(1, 2) || got[1] != "m tokens: 3 of 9" || got[2] != "t (serial 1) keys: 5 of 6" {
		t.Errorf("got %q", got)
	}
}

func TestPrintOthers(t *testing.T) {
	r := Report{
		Upstreams: []Upstream{{Path: "/u", Keys: 1, Trouble: "no such file"}},
		Approvals: []Approval{{Comment: "k", What: "login at box", Ends: now.Add(time.Minute)}},
		Pauses:    []Pause{{From: "ssh", Refused: 1, Until: now.Add(time.Minute)}},
	}
	wantLine(t, r, "UPSTREAM AGENTS", "/u 1 key no such file")
	wantLine(t, r, "ALLOWED FOR LONGER", "k login at box for 60 s")
	wantLine(t, r, "NO QUESTIONS SHOWN", "from ssh about any key refused once for 60 s")
	r.Approvals[0].Ends, r.Pauses[0].Block, r.Pauses[0].About = time.Time{}, true, "k"
	wantLine(t, r, "ALLOWED FOR LONGER", "k login at box until lock")
	wantLine(t, r, "NO QUESTIONS SHOWN", "from ssh k everything refused for 60 s")
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "less than 1 s", time.Second: "1 s", 119 * time.Second: "119 s", 2 * time.Minute: "2 min", 119 * time.Minute: "119 min",
		2 * time.Hour: "2 h", 47 * time.Hour: "47 h", 48 * time.Hour: "2 days",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestShortURI(t *testing.T) {
	for text, want := range map[string]string{
		"pkcs11:token=work;serial=1;object=login;id=%01;type=private": "pkcs11:token=work;object=login;id=%01",
		"pkcs11:id=%01": "pkcs11:id=%01",
		"soft one":      "soft one",
		"":              "",
	} {
		if got := ShortURI(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}
