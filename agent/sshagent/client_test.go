package sshagent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"

	"p11-agent/agent"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/request"
)

func TestGoClient(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	client := sshclient.NewClient(r.dial())

	keys, err := client.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) != len(keyring.signers) {
		t.Fatalf("%d keys, want %d", len(keys), len(keyring.signers))
	}
	for i, s := range keyring.signers {
		if !bytes.Equal(keys[i].Blob, s.PublicKey().Marshal()) || keys[i].Comment != "fake "+s.PublicKey().Type() {
			t.Errorf("key %d is %v", i, keys[i])
		}
	}
	data := []byte("to be signed")
	for _, test := range []struct {
		name   string
		key    ssh.PublicKey
		flags  sshclient.SignatureFlags
		format string
	}{
		{"Ed25519", keyring.signers[0].PublicKey(), 0, "ssh-ed25519"},
		{"RSA with SHA-256", keyring.signers[1].PublicKey(), sshclient.SignatureFlagRsaSha256, "rsa-sha2-256"},
		{"RSA with SHA-512", keyring.signers[1].PublicKey(), sshclient.SignatureFlagRsaSha512, "rsa-sha2-512"},
	} {
		t.Run(test.name, func(t *testing.T) {
			sig, err := client.SignWithFlags(test.key, data, test.flags)
			if err != nil {
				t.Fatal(err)
			}
			if sig.Format != test.format {
				t.Errorf("format %s, want %s", sig.Format, test.format)
			}
			if err := test.key.Verify(data, sig); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := client.SignWithFlags(keyring.signers[0].PublicKey(), data, 8); err == nil {
		t.Error("an unknown flag was overlooked")
	}
	if err := client.Remove(keyring.signers[0].PublicKey()); err != nil {
		t.Error(err)
	}
	if err := client.RemoveAll(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(client.Lock([]byte("x")), client.Unlock([]byte("y"))); err != nil {
		t.Error(err)
	}
	if calls := keyring.noted(); calls[len(calls)-2].method+calls[len(calls)-2].pin+calls[len(calls)-1].method+calls[len(calls)-1].pin != "LockxUnlocky" {
		t.Errorf("calls %+v", calls)
	}
	if _, err := client.Extension("no-such@example.com", nil); !errors.Is(err, sshclient.ErrExtensionUnsupported) {
		t.Errorf("unknown extension: %v, want that it is not supported", err)
	}
	answer, err := client.Extension("query", nil)
	if err != nil || !bytes.Equal(answer, message(29, "query", "query", "session-bind@openssh.com", extensionControl)) {
		t.Errorf("query: %q, %v", answer, err)
	}
}

// sshAdd runs ssh-add against the server.
func (r *running) sshAdd(t *testing.T, pin string, args ...string) (string, error) {
	t.Helper()
	askpass := filepath.Join(doortest.Dir(t), "askpass")
	if err := os.WriteFile(askpass, []byte("#!/bin/sh\necho '"+pin+"'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "ssh-add"), args...)
	cmd.Env = []string{"SSH_AUTH_SOCK=" + r.socket, "SSH_ASKPASS=" + askpass, "SSH_ASKPASS_REQUIRE=force", "DISPLAY=:0", "HOME=" + filepath.Dir(askpass), "PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestSSHAdd(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	pub := filepath.Join(doortest.Dir(t), "key.pub")
	key := keyring.signers[0].PublicKey()
	if err := os.WriteFile(pub, ssh.MarshalAuthorizedKey(key), 0o600); err != nil {
		t.Fatal(err)
	}
	token := "pkcs11:token=work"

	for _, test := range []struct {
		name  string
		args  []string
		calls []call // without caller
		out   string
	}{
		{name: "list fingerprints", args: []string{"-l"}, calls: []call{{method: "List"}}, out: ssh.FingerprintSHA256(key)},
		{name: "list keys", args: []string{"-L"}, calls: []call{{method: "List"}}, out: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))},
		{name: "test a key", args: []string{"-T", pub}, calls: []call{{method: "Sign", key: string(key.Marshal())}}},
		{name: "remove a key", args: []string{"-d", pub}, calls: []call{{method: "Remove", key: string(key.Marshal())}}, out: "Identity removed"},
		{name: "remove all", args: []string{"-D"}, calls: []call{{method: "RemoveAll"}}, out: "All identities removed"},
		{name: "add a token", args: []string{"-s", token}, calls: []call{{method: "AddToken", provider: token, pin: "12 34"}}, out: "Card added"},
		{
			name: "add a token with lifetime and confirmation", args: []string{"-t", "90", "-c", "-s", token},
			calls: []call{{method: "AddToken", provider: token, pin: "12 34", constraints: request.Constraints{Lifetime: 90 * time.Second, Confirm: true}}}, out: "Card added",
		},
		{name: "remove a token", args: []string{"-e", token}, calls: []call{{method: "RemoveToken", provider: token}}, out: "Card removed"},
		{name: "lock", args: []string{"-x"}, calls: []call{{method: "Lock", pin: "12 34"}}, out: "Agent locked"},
		{name: "unlock", args: []string{"-X"}, calls: []call{{method: "Unlock", pin: "12 34"}}, out: "Agent unlocked"},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := len(keyring.noted())
			out, err := r.sshAdd(t, "12 34", test.args...)
			if err != nil || !strings.Contains(out, test.out) {
				t.Errorf("ssh-add %v: %v, printed\n%s", test.args, err, out)
			}
			var got []call
			for _, c := range keyring.noted()[before:] {
				c.caller = nil
				got = append(got, c)
			}
			if fmt.Sprint(got) != fmt.Sprint(test.calls) {
				t.Errorf("calls %+v\nwant  %+v", got, test.calls)
			}
		})
	}
}

// ssh-add reads host keys from known_hosts and writes destinations as it
// understands them.
func TestSSHAddDestination(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	known := filepath.Join(doortest.Dir(t), "known_hosts")
	line := "a.example,b.example " + string(ssh.MarshalAuthorizedKey(keyring.signers[0].PublicKey()))
	if err := os.WriteFile(known, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := r.sshAdd(t, "1234", "-H", known, "-h", "a.example", "-h", "a.example>me@b.example", "-s", "pkcs11:")
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	calls := keyring.noted()
	if len(calls) != 1 || len(calls[0].constraints.Destinations) != 2 {
		t.Fatalf("calls %+v, ssh-add printed %s", calls, out)
	}
}

// fixed is a key with a short wire form.
type fixed string

func (fixed) Type() string                        { return "x" }
func (k fixed) Marshal() []byte                   { return []byte(k) }
func (fixed) Verify([]byte, *ssh.Signature) error { return errors.New("not a key") }

// TestBytes compares whole answers, byte by byte.
func TestBytes(t *testing.T) {
	for _, test := range []struct {
		name    string
		send    string // in hexadecimal
		want    string
		hangsUp bool
		calls   string
	}{
		{name: "list", send: "00000001 0b", want: "00000014 0c 00000001 00000003 4b4559 00000004 6e616d65", calls: "List"},
		{name: "list with bytes left over", send: "00000002 0b 00", want: "00000001 05"},
		{
			name: "sign", send: "00000013 0d 00000003 4b4559 00000003 616263 00000002",
			want:  "00000015 0e 00000010 00000003 616c67 00000003 736967 5a5a",
			calls: "Sign",
		},
		{name: "sign with an unknown flag", send: "00000013 0d 00000003 4b4559 00000003 616263 00000008", want: "00000001 05"},
		{name: "sign with the old-format flag", send: "00000013 0d 00000003 4b4559 00000003 616263 00000001", want: "00000001 05"},
		{name: "sign without flags", send: "0000000f 0d 00000003 4b4559 00000003 616263", want: "00000001 05"},
		{name: "sign with bytes left over", send: "00000014 0d 00000003 4b4559 00000003 616263 00000002 00", want: "00000001 05"},
		{name: "sign with a length that goes too far", send: "00000013 0d 00000003 4b4559 ffffffff 616263 00000002", want: "00000001 05"},
		{name: "remove a key that is there", send: "00000008 12 00000003 4b4559", want: "00000001 06", calls: "Remove"},
		{name: "remove a key that is not", send: "00000008 12 00000003 4b4558", want: "00000001 05", calls: "Remove"},
		{name: "remove a key, cut short", send: "00000004 12 000000", want: "00000001 05"},
		{name: "remove all", send: "00000001 13", want: "00000001 06", calls: "RemoveAll"},
		{name: "remove all with bytes left over", send: "00000002 13 01", want: "00000001 05"},
		{name: "add a token", send: "0000000b 14 00000001 70 00000001 31", want: "00000001 06", calls: "AddToken"},
		{name: "add a token, constraints where there are none", send: "0000000c 14 00000001 70 00000001 31 02", want: "00000001 05"},
		{name: "add a token, no PIN", send: "0000000a 14 00000001 70 00000000", want: "00000001 06", calls: "AddToken"},
		{name: "add a token, PIN left out", send: "00000006 14 00000001 70", want: "00000001 05"},
		{name: "add a token, NUL in the name", send: "0000000b 14 00000001 00 00000001 31", want: "00000001 05"},
		{name: "add a token, NUL in the PIN", send: "0000000b 14 00000001 70 00000001 00", want: "00000001 05"},
		{name: "add a token with constraints", send: "00000011 1a 00000001 70 00000001 31 02 01 0000003c", want: "00000001 06", calls: "AddToken"},
		{name: "add a token with an unknown constraint", send: "0000000c 1a 00000001 70 00000001 31 03", want: "00000001 05"},
		{name: "remove a token", send: "0000000a 15 00000001 70 00000000", want: "00000001 06", calls: "RemoveToken"},
		{name: "remove a token, with a constraint", send: "0000000b 15 00000001 70 00000000 02", want: "00000001 05"},
		{
			name: "query", send: "0000000a 1b 00000005 7175657279",
			want: "00000047 1d 00000005 7175657279 00000005 7175657279 00000018 73657373696f6e2d62696e64406f70656e7373682e636f6d 00000014 636f6e74726f6c2d7631407031312d6167656e74",
		},
		{name: "query with bytes left over", send: "0000000b 1b 00000005 7175657279 00", want: "00000001 1c"},
		{name: "unknown extension", send: "00000006 1b 00000001 78", want: "00000001 05"},
		{name: "extension without a name", send: "00000001 1b", want: "00000001 05"},
		{name: "bind cut short", send: "0000001d 1b 00000018 73657373696f6e2d62696e64406f70656e7373682e636f6d", want: "00000001 1c"},
		{name: "lock", send: "00000006 16 00000001 78", want: "00000001 06", calls: "Lock"},
		{name: "unlock", send: "00000006 17 00000001 78", want: "00000001 06", calls: "Unlock"},
		{name: "lock, bytes left over", send: "00000007 16 00000001 78 00", want: "00000001 05"},
		{name: "add a plain key", send: "00000002 11 00", want: "00000001 05"},
		{name: "SSH protocol 1", send: "00000001 09", want: "00000001 06", calls: "RemoveAll"},
		{name: "SSH protocol 1, after its successor", send: "00000001 13 00000001 09", want: "00000001 06 00000001 06", calls: "RemoveAll"},
		{name: "SSH protocol 1, after another", send: "00000001 13 00000001 ff 00000001 09", want: "00000001 06 00000001 05 00000001 06", calls: "RemoveAll RemoveAll"},
		{name: "SSH protocol 1, bytes left over", send: "00000002 09 00", want: "00000001 05"},
		{name: "unknown message", send: "00000001 ff", want: "00000001 05"},
		{name: "two at once", send: "00000001 13 00000001 13", want: "00000001 06 00000001 06", calls: "RemoveAll RemoveAll"},
		{name: "refused, then another", send: "00000001 ff 00000001 13", want: "00000001 05 00000001 06", calls: "RemoveAll"},
		{name: "empty message", send: "00000000 00000001 13", hangsUp: true},
		{name: "message that is too long", send: "00040001 13", hangsUp: true},
		{name: "length that is far too long", send: "ffffffff", hangsUp: true},
		{name: "answers first, then the end", send: "00000001 13 00000000", want: "00000001 06", hangsUp: true, calls: "RemoveAll"},
	} {
		t.Run(test.name, func(t *testing.T) {
			keyring := &fakeKeyring{
				signers: []ssh.Signer{fixedSigner{}},
				list:    func() []agent.Identity { return []agent.Identity{{Key: fixed("KEY"), Comment: "name"}} },
				sign: func(_ context.Context, _ *request.Caller, r request.Sign) (*ssh.Signature, error) {
					if string(r.Key) != "KEY" || string(r.Data) != "abc" || r.Flags != request.SignatureRSASHA2256 {
						t.Errorf("sign request %+v", r)
					}
					return &ssh.Signature{Format: "alg", Blob: []byte("sig"), Rest: []byte("ZZ")}, nil
				},
			}
			r := serve(t, &Door{Keyring: keyring})
			conn := r.dial()
			if _, err := conn.Write(unhex(t, test.send)); err != nil {
				t.Fatal(err)
			}
			if !test.hangsUp {
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			got, err := io.ReadAll(conn)
			if err != nil && !test.hangsUp { // unread bytes make it a reset
				t.Error(err)
			}
			if want := unhex(t, test.want); !bytes.Equal(got, want) {
				t.Errorf("answer %x\nwant   %x", got, want)
			}
			var calls []string
			for _, c := range keyring.noted() {
				calls = append(calls, c.method)
			}
			if got := strings.Join(calls, " "); got != test.calls {
				t.Errorf("calls %q, want %q", got, test.calls)
			}
		})
	}
}

type fixedSigner struct{ ssh.Signer }

func (fixedSigner) PublicKey() ssh.PublicKey { return fixed("KEY") }

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPipelinedRequests(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	key := keyring.signers[0].PublicKey()
	var messages [][]byte
	for i := range 200 { // more than one buffer of them
		messages = append(messages, message(13, key.Marshal(), fmt.Sprint("message ", i), uint32(0)))
	}
	conn := r.dial()
	errs := make(chan error, 1)
	go func() {
		_, err := conn.Write(framed(messages...))
		errs <- err
	}()
	for i := range messages {
		answer, err := readAnswer(conn)
		if err != nil {
			t.Fatal(err)
		}
		in := reader{rest: answer[1:]}
		sig := reader{rest: in.bytes()}
		if answer[0] != 14 {
			t.Fatalf("answer %d is %x", i, answer)
		}
		if err := key.Verify(fmt.Append(nil, "message ", i), &ssh.Signature{Format: string(sig.bytes()), Blob: sig.bytes()}); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
	}
	if err := <-errs; err != nil {
		t.Error(err)
	}
}

func TestLargestMessage(t *testing.T) {
	keyring := newKeyring()
	keyring.sign = func(_ context.Context, _ *request.Caller, r request.Sign) (*ssh.Signature, error) {
		if len(r.Data) < maxFrame/2 || len(bytes.TrimLeft(r.Data, "d")) > 0 {
			return nil, fmt.Errorf("%d bytes arrived", len(r.Data))
		}
		return &ssh.Signature{Format: "alg"}, nil
	}
	r := serve(t, &Door{Keyring: keyring})
	large := message(13, "key", strings.Repeat("d", maxFrame-1-4-3-4-4), uint32(0))
	if len(large) != maxFrame {
		t.Fatal(len(large))
	}
	small := message(11)
	for i, answer := range ask(t, r.dial(), small, large, small, large, large, small) {
		if want := []byte{12, 14, 12, 14, 14, 12}[i]; answer[0] != want {
			t.Errorf("answer %d is %d, want %d", i, answer[0], want)
		}
	}
}

// The door cuts a list that is too long for clients. The log tells of it once.
func TestLongList(t *testing.T) {
	log, book := newLog()
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring, Log: log})
	for _, test := range []struct {
		name            string
		number, comment int
		want            int
	}{
		{"too many keys", 3000, 1, 2048},
		{"too many bytes", 100, 10000, 26},
	} {
		t.Run(test.name, func(t *testing.T) {
			keyring.list = func() []agent.Identity {
				return slices.Repeat([]agent.Identity{{Key: fixed("KEY"), Comment: strings.Repeat("c", test.comment)}}, test.number)
			}
			c := r.dial()
			answer := ask(t, c, message(11))[0]
			in := reader{rest: answer[1:]}
			n := int(in.uint32())
			for range n {
				in.bytes()
				in.bytes()
			}
			if n != test.want || in.end() != nil || len(answer) > maxAnswer {
				t.Errorf("%d keys in %d bytes, want %d keys", n, len(answer), test.want)
			}
			text := fmt.Sprintf("keys=%d listed=%d", test.number, test.want)
			book.wait(t, text)
			ask(t, c, message(11), message(11))
			if n := strings.Count(book.String(), text); n != 1 {
				t.Errorf("the log tells of it %d times", n)
			}
		})
	}
}

// TestLongListNamed checks a list that is cut short. Keys that have a name come first, and
// every list has the same order.
func TestLongListNamed(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	const many = 5000
	named := map[int]bool{7: true, 4990: true, 4999: true}
	keyring.list = func() (all []agent.Identity) {
		for i := range many {
			all = append(all, agent.Identity{Key: fixed("KEY"), Comment: fmt.Sprint(i), Named: named[i]})
		}
		return all
	}
	var before []byte
	for range 2 {
		answer := ask(t, r.dial(), message(11))[0]
		in := reader{rest: answer[1:]}
		var comments []string
		for range in.uint32() {
			in.bytes()
			comments = append(comments, string(in.bytes()))
		}
		if len(comments) != maxIdentities {
			t.Fatalf("%d keys are listed", len(comments))
		}
		if got, want := comments[:5], []string{"7", "4990", "4999", "0", "1"}; !slices.Equal(got, want) {
			t.Errorf("the list begins with %q, want %q", got, want)
		}
		if before != nil && !bytes.Equal(before, answer) {
			t.Error("the order changes")
		}
		before = bytes.Clone(answer)
	}
}

// TestListedTooLong checks that an identity that is too long for a list does not hide the
// others.
func TestListedTooLong(t *testing.T) {
	all := []agent.Identity{
		{Key: fixed("KEY"), Comment: "first"}, {Key: fixed("KEY"), Comment: strings.Repeat("c", maxAnswer)}, {Key: fixed("KEY"), Comment: "last"},
	}
	if got, want := Listed(all), []bool{true, false, true}; !slices.Equal(got, want) {
		t.Errorf("%v are listed, want %v", got, want)
	}
}
