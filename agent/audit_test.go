package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/secret/secrettest"
)

// Each request has a single line in the log, for each outcome.
func TestOneLineEach(t *testing.T) {
	key, host, hop := edKey("pkcs11:token=a;id=1"), edKey("host"), edKey("hop")
	hostKey, hopKey := publicOf(t, host), publicOf(t, hop)
	soft := keytest.New(t)
	phrase := func() *secret.Secret { return secrettest.Of(t, "open-sesame") } // each call needs a new one
	pin := secrettest.Of(t, "8-apples")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	away := &request.Caller{
		Number: 9, Peer: peer.Peer{Known: true, PID: 7, UID: 1000, Chain: []peer.Process{{PID: 7, Name: "ssh"}}},
		Binds: []request.Bind{{HostKey: hopKey, SessionID: []byte("s"), Forwarding: true}}, Forwarded: true,
	}
	login := &request.Login{User: "joe\x1b[2J" + strings.Repeat("u", 1000), SessionID: []byte("x"), HostKey: hostKey.Marshal()}
	fingerprint := " key=" + ssh.FingerprintSHA256(publicOf(t, key)) + " "

	f := newFixture(Options{SoftwareKeys: true}, key)
	for _, test := range []struct {
		name  string
		do    func() error
		level string
		msg   string
		want  []string
	}{
		{"login", func() error {
			_, err := f.Sign(t.Context(), away, request.Sign{Key: wireOf(key), Data: []byte("d"), Content: request.Content{Kind: request.KindLogin}, Login: login})
			return err
		}, "INFO", "signed", []string{
			"request=sign", fingerprint, `uri="pkcs11:token=a;id=1"`, "kind=login", "purpose=login", `user=joe\x1b[2Juuu`,
			`host="` + ssh.FingerprintSHA256(hostKey) + ` (not verified)"`, "result=ok", `client="ssh (7)"`, "uid=1000", "forwarded=true",
			"via=" + ssh.FingerprintSHA256(hopKey), "connection=9", "duration=",
		}},
		{"signature", func() error {
			_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("d"), Content: request.Content{Kind: request.KindSignature, Namespace: "odd\n\u202e"}})
			return err
		}, "INFO", "signed", []string{"kind=signature", "purpose=other", `namespace="odd \\u202e"`, "forwarded=false"}},
		{"unknown key", func() error {
			_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(host), Data: []byte("d")})
			return err
		}, "WARN", "request refused", []string{"request=sign", "key=" + ssh.FingerprintSHA256(hostKey), "result=refused", `reason="the agent has no such key"`}},
		{"hung up", func() error {
			f.tokens.keys[0].(*fakeKey).err = fmt.Errorf("wait: %w", context.Canceled)
			defer func() { f.tokens.keys[0].(*fakeKey).err = nil }()
			_, err := f.Sign(gone, local, request.Sign{Key: wireOf(key), Data: []byte("d")})
			return err
		}, "INFO", "request refused", []string{"result=cancelled", `reason="the client hung up"`}},
		{"many reasons", func() error {
			f.tokens.keys[0].(*fakeKey).err = errors.Join(errors.New("one"), errors.New("two\x1b"+strings.Repeat("z", 5000)))
			defer func() { f.tokens.keys[0].(*fakeKey).err = nil }()
			_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("d")})
			return err
		}, "WARN", "request refused", []string{`reason="one; two\\x1bzzz`}},
		{"add a token", func() error {
			return f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a"), PIN: pin})
		}, "INFO", "key added", []string{"request=add", `uri="pkcs11:token=a"`}},
		{"add what is not there", func() error {
			return f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=z"), PIN: pin})
		}, "WARN", "request refused", []string{"request=add", `uri="pkcs11:token=z"`, `reason="no match"`}},
		{"add a key", func() error {
			return f.Add(t.Context(), local, addKey(soft, request.Constraints{Confirm: true}))
		}, "INFO", "key added", []string{"request=add", "key=SHA256:", "comment="}},
		{"add it again", func() error {
			return f.Add(t.Context(), local, addKey(soft, request.Constraints{}))
		}, "WARN", "key added", []string{`note="constraints loosened`}},
		{"remove a token", func() error {
			return f.RemoveToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a")})
		}, "INFO", "key removed", []string{"request=remove", `uri="pkcs11:token=a"`}},
		{
			"remove what is gone", func() error { return f.Remove(t.Context(), local, wireOf(key)) },
			"WARN", "request refused",
			[]string{"request=remove", strings.TrimSpace(fingerprint)},
		},
		{
			"remove garbage", func() error { return f.Remove(t.Context(), local, []byte("x")) },
			"WARN", "request refused",
			[]string{`key="a key of unknown kind"`},
		},
		{"remove all", func() error { return f.RemoveAll(t.Context(), local) }, "INFO", "all keys removed", []string{"request=remove-all"}},
		{"by the door", func() error {
			err := errors.New("the message is cut short")
			f.Refuse(local, request.ActionSign, err)
			return err
		}, "WARN", "request refused", []string{"request=sign", "cut short"}},
		{"lock", func() error { return f.Lock(t.Context(), local, phrase()) }, "INFO", "agent locked", []string{"request=lock"}},
		{"locked", func() error {
			_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("d")})
			return err
		}, "WARN", "request refused", []string{"the agent is locked", strings.TrimSpace(fingerprint)}},
		{"unlock", func() error { return f.Unlock(t.Context(), local, phrase()) }, "INFO", "agent unlocked", []string{"request=unlock"}},
	} {
		f.log.Reset()
		err := test.do()
		line := f.log.String()
		if (err == nil) != (test.msg != "request refused") {
			t.Errorf("%s: %v", test.name, err)
		}
		if strings.Count(line, "\n") != 1 || len(line) > 3000 {
			t.Errorf("%s: not one line: %s", test.name, line)
		}
		if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), unicode.IsControl) || strings.Contains(line, "open-sesame") || strings.Contains(line, "8-apples") {
			t.Errorf("%s: %q", test.name, line)
		}
		msg := "msg=" + test.msg
		if strings.Contains(test.msg, " ") {
			msg = `msg="` + test.msg + `"`
		}
		for _, want := range append(test.want, "level="+test.level+" ", msg+" ") {
			if !strings.Contains(line, want) {
				t.Errorf("%s: the line does not say %s: %s", test.name, want, line)
			}
		}
	}
}

// After the answer, the door only writes the log line of a successful signature. The status
// has the signature and its host before.
func TestLater(t *testing.T) {
	key, host := edKey("pkcs11:token=a"), edKey("host")
	named := fakeHosts{string(wireOf(host)): {Names: []string{"good.example.org"}}}
	for name, statusFirst := range map[string]bool{"the line first": false, "the status first": true} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{Hosts: named}, key)
			var rest []func()
			c := &request.Caller{Number: 4, Later: func(do func()) { rest = append(rest, do) }}
			r := request.Sign{
				Key: wireOf(key), Data: []byte("d"), Content: request.Content{Kind: request.KindLogin},
				Login: &request.Login{User: "joe", SessionID: []byte("x"), HostKey: wireOf(host)},
			}
			if _, err := f.Sign(t.Context(), c, r); err != nil {
				t.Fatal(err)
			}
			if len(rest) != 1 || f.log.Len() > 0 {
				t.Fatalf("%d things are left to do, and the log has %q", len(rest), f.log)
			}
			if !statusFirst {
				rest[0]()
			}
			if s := f.Now(); len(s.Events) != 1 || !strings.HasPrefix(s.Events[0].Host, "good.example.org") || s.Keys[0].Signatures != 1 {
				t.Errorf("the status has %+v", s)
			}
			if statusFirst {
				rest[0]()
			}
			if line := f.log.String(); strings.Count(line, "\n") != 1 || !strings.Contains(line, "user=joe host=\"good.example.org (not verified)\" result=ok") {
				t.Errorf("the log has %q", line)
			}

			f.log.Reset()
			for _, do := range []func() error{
				func() error {
					_, err := f.Sign(t.Context(), c, request.Sign{Key: []byte("no key")})
					return err
				},
				func() error { return f.Remove(t.Context(), c, wireOf(key)) },
			} {
				_ = do()
				if strings.Count(f.log.String(), "\n") != 1 || len(rest) != 1 {
					t.Errorf("%d things are left to do, and the log has %q", len(rest), f.log)
				}
				f.log.Reset()
			}
		})
	}
}

// Lines about a key that is on several tokens name the one that has signed.
func TestLineNamesTheHome(t *testing.T) {
	one := edKey("pkcs11:token=a")
	two := &fakeKey{Signer: one.Signer, uri: "pkcs11:token=b", insertions: 1}
	f := newFixture(Options{}, one, two)
	for _, away := range []bool{false, true, false} {
		one.setAbsent(away)
		f.log.Reset()
		if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(one), Data: []byte("d")}); err != nil {
			t.Fatal(err)
		}
		want := ` uri="pkcs11:token=a" `
		if away {
			want = ` comment="pkcs11:token=a" uri="pkcs11:token=b" `
		}
		if line := f.log.String(); !strings.Contains(line, want) {
			t.Errorf("the line does not say%s: %s", want, line)
		}
	}
}
