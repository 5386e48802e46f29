package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/audit"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret"
)

// ourselves returns a client that runs this program.
func ourselves(t testing.TB) *request.Caller {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &request.Caller{Number: 3, Peer: peer.Peer{
		Known: true, PID: os.Getpid(), UID: os.Geteuid(),
		Chain: []peer.Process{{PID: os.Getpid(), Name: "p11-agent"}}, Program: peer.Program{Path: path},
	}}
}

func TestMayControl(t *testing.T) {
	host := publicOf(t, edKey("host"))
	for name, change := range map[string]func(*request.Caller){
		"forwarded":                 func(c *request.Caller) { c.Forwarded = true },
		"bound for logging in":      func(c *request.Caller) { c.Binds = []request.Bind{{HostKey: host}} },
		"bound for forwarding":      func(c *request.Caller) { c.Binds = []request.Bind{{HostKey: host, Forwarding: true}} },
		"a bind that failed":        func(c *request.Caller) { c.BindFailed = true },
		"a socket for others":       func(c *request.Caller) { c.Socket = &request.Socket{Name: "forward"} },
		"another user":              func(c *request.Caller) { c.Peer.UID = os.Geteuid() + 1 },
		"root for another, or back": func(c *request.Caller) { c.Peer.UID = 1 - min(1, os.Geteuid()) },
		"unknown client":            func(c *request.Caller) { c.Peer = peer.Peer{} },
		"a process that has ended":  func(c *request.Caller) { c.Peer.Chain = nil },
		"one that cannot be seen":   func(c *request.Caller) { c.Peer.Program = peer.Program{} },
		"ssh":                       func(c *request.Caller) { c.Peer.Program.Path = "/usr/bin/ssh" },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{Report: func(Status, request.Selection) ([]byte, error) { return []byte("{}"), nil }}, edKey("pkcs11:token=a"))
			c := ourselves(t)
			change(c)
			pin, err := secret.From([]byte("1234"))
			if err != nil {
				t.Fatal(err)
			}
			defer pin.Wipe()
			_, status := f.Status(t.Context(), c, nil)
			_, login := f.Login(t.Context(), c, request.TokenLogin{Provider: []byte("pkcs11:"), PIN: pin})
			logout := f.Logout(t.Context(), c, nil)
			for _, err := range []error{status, login, logout} {
				if !errors.Is(err, ErrNoControl) {
					t.Errorf("%v", err)
				}
			}
			if len(f.tokens.logins) > 0 || f.tokens.logouts > 0 {
				t.Errorf("tokens were asked: %q", f.tokens.logins)
			}
			for _, request := range []string{"status", "login", "logout"} {
				if n := strings.Count(f.log.String(), `msg="request refused" request=`+request+" "); n != 1 {
					t.Errorf("%d lines of a refused %s: %s", n, request, f.log)
				}
			}
		})
	}
}

func TestControl(t *testing.T) {
	var told []string
	f := newFixture(Options{Report: func(s Status, sel request.Selection) ([]byte, error) {
		told = append(told, fmt.Sprintf("%d keys %v", len(s.Keys), sel))
		return []byte("{}"), nil
	}}, edKey("pkcs11:token=a"), edKey("pkcs11:token=b"))
	c := ourselves(t)
	for _, provider := range []string{"", "pkcs11:token=a"} {
		if report, err := f.Status(t.Context(), c, []byte(provider)); err != nil || string(report) != "{}" {
			t.Errorf("status: %s, %v", report, err)
		}
	}
	if got, want := fmt.Sprint(told), "[2 keys <nil> 2 keys pkcs11:token=a]"; got != want {
		t.Errorf("reported %s", got)
	}
	if s := f.log.String(); s != "" {
		t.Errorf("a status is logged: %s", s)
	}
	pin, err := secret.From([]byte("1234"))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Wipe()
	f.tokens.answer = request.LoginAnswer{Tries: request.TriesLow}
	if a, err := f.Login(t.Context(), c, request.TokenLogin{Provider: []byte("pkcs11:token=a"), PIN: pin}); err != nil || a.Tries != request.TriesLow {
		t.Errorf("login: %+v, %v", a, err)
	}
	if err := f.Logout(t.Context(), c, []byte("pkcs11:token=b")); err != nil {
		t.Error(err)
	}
	if err := f.Logout(t.Context(), c, nil); err != nil || f.tokens.logouts != 1 {
		t.Errorf("logout: %v", err)
	}
	f.tokens.selectErr = errors.New("wrong PIN")
	if a, err := f.Login(t.Context(), c, request.TokenLogin{Provider: []byte("pkcs11:token=a")}); err == nil || a.Tries != request.TriesLow {
		t.Errorf("login: %+v, %v", a, err)
	}
	if got, want := fmt.Sprintf("%q", f.tokens.logins), `["pkcs11:token=a 1234" "out of pkcs11:token=b" "pkcs11:token=a "]`; got != want {
		t.Errorf("tokens were asked %s", got)
	}
	if n := len(f.tokens.dropped); n != 4 {
		t.Errorf("%d selections were dropped", n)
	}
	if strings.Contains(f.log.String(), "1234") {
		t.Error("the PIN is in the log")
	}

	// A locked agent says only that it is locked, and does nothing.
	phrase, err := secret.From([]byte("open"))
	if err != nil {
		t.Fatal(err)
	}
	defer phrase.Wipe()
	if err := f.Lock(t.Context(), c, phrase); err != nil {
		t.Fatal(err)
	}
	if s := f.Now(); !s.Locked || s.Keys != nil || s.Events != nil || s.Failures != nil {
		t.Errorf("a locked agent tells %+v", s)
	}
	if _, err := f.Login(t.Context(), c, request.TokenLogin{Provider: []byte("pkcs11:token=a")}); !errors.Is(err, request.ErrLocked) {
		t.Errorf("a login to a locked agent: %v", err)
	}
}

func TestStatusOfKeys(t *testing.T) {
	token, other := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=a;id=2")
	f := newFixture(Options{SoftwareKeys: true, Upstreams: []Upstream{&fakeUpstream{name: "gone", err: errors.New("it is gone")}}}, token, other)
	soft := keytest.New(t)
	if err := f.Add(t.Context(), local, addKey(soft, request.Constraints{Confirm: true, Lifetime: 1e12})); err != nil {
		t.Fatal(err)
	}
	f.list(t)
	for range 3 {
		if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(token), Data: []byte("x"), Content: request.Content{Kind: request.KindSignature, Namespace: "git"}}); err != nil {
			t.Fatal(err)
		}
	}
	s := f.Now()
	if len(s.Keys) != 3 || len(s.Events) != 4 || len(s.Upstreams) != 1 {
		t.Fatalf("%+v", s)
	}
	if k := s.Keys[0]; k.Signatures != 3 || k.LastUse.IsZero() || k.Software || len(k.Homes) != 1 || k.Comment != token.uri || k.Fingerprint != ssh.FingerprintSHA256(publicOf(t, token)) {
		t.Errorf("%+v", k)
	}
	if k := s.Keys[1]; k.Signatures != 0 || !k.LastUse.IsZero() {
		t.Errorf("%+v", k)
	}
	if k := s.Keys[2]; !k.Software || !k.Confirm || k.Expires.IsZero() {
		t.Errorf("%+v", k)
	}
	if e := s.Events[0]; e.Action != request.ActionSign || e.Purpose != request.PurposeGit || e.Namespace != "git" || e.URI != token.uri || e.Result != audit.OK || e.Client.PID != 4711 {
		t.Errorf("%+v", e)
	}
	if e := s.Events[3]; e.Action != request.ActionAdd || e.Key == "" {
		t.Errorf("%+v", e)
	}
	if u := s.Upstreams[0]; u.Name != "gone" || u.Trouble != "it is gone" {
		t.Errorf("%+v", u)
	}
}
