package sshagent

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/sshkey/keytest"
)

// host is a host with a key.
type host struct{ ssh.Signer }

func newHost(t testing.TB) host { return host{keytest.New(t).Signer} }

// bind returns a message that binds a connection to a session with the host.
func (h host) bind(t testing.TB, session string, forwarding bool) []byte {
	t.Helper()
	sig, err := h.Sign(rand.Reader, []byte(session))
	if err != nil {
		t.Fatal(err)
	}
	return bindMessage(h.PublicKey().Marshal(), session, ssh.Marshal(sig), forwarding)
}

func bindMessage(key []byte, session string, signature []byte, forwarding bool) []byte {
	return message(27, "session-bind@openssh.com", key, session, signature, forwarding)
}

func TestSessionBind(t *testing.T) {
	a, b := newHost(t), newHost(t)
	rsaHost := host{makeSigners()[1]}
	authority := newHost(t)
	cert := &ssh.Certificate{Key: a.PublicKey(), CertType: ssh.HostCert, ValidPrincipals: []string{"a"}}
	if err := cert.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	certSigner, err := ssh.NewCertSigner(cert, a)
	if err != nil {
		t.Fatal(err)
	}
	sessions := func(n int) (messages [][]byte) {
		for i := range n {
			messages = append(messages, a.bind(t, fmt.Sprint("session ", i), true))
		}
		return messages
	}
	sign := func(h host, data string) []byte {
		sig, err := h.Sign(rand.Reader, []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		return ssh.Marshal(sig)
	}
	const yes, no = 6, 28
	for _, test := range []struct {
		name      string
		messages  [][]byte
		answers   []byte
		binds     int
		failed    bool
		forwarded bool
	}{
		{name: "none"},
		{name: "logging in", messages: [][]byte{a.bind(t, "s", false)}, answers: []byte{yes}, binds: 1},
		{name: "forwarding", messages: [][]byte{a.bind(t, "s", true)}, answers: []byte{yes}, binds: 1, forwarded: true},
		{name: "RSA host key", messages: [][]byte{rsaHost.bind(t, "s", true)}, answers: []byte{yes}, binds: 1, forwarded: true},
		{name: "host certificate", messages: [][]byte{bindMessage(cert.Marshal(), "s", sign(host{certSigner}, "s"), true)}, answers: []byte{yes}, binds: 1, forwarded: true},
		{name: "two hops and a login", messages: [][]byte{a.bind(t, "1", true), b.bind(t, "2", true), a.bind(t, "3", false)}, answers: []byte{yes, yes, yes}, binds: 3, forwarded: true},
		{name: "the same again", messages: [][]byte{a.bind(t, "s", true), a.bind(t, "s", true)}, answers: []byte{yes, yes}, binds: 1, forwarded: true},
		{name: "the same session, other host", messages: [][]byte{a.bind(t, "s", true), b.bind(t, "s", true)}, answers: []byte{yes, no}, binds: 1, failed: true, forwarded: true},
		{name: "after logging in", messages: [][]byte{a.bind(t, "1", false), a.bind(t, "2", true)}, answers: []byte{yes, no}, binds: 1, failed: true, forwarded: true},
		{name: "the same after logging in", messages: [][]byte{a.bind(t, "1", false), a.bind(t, "1", false)}, answers: []byte{yes, no}, binds: 1, failed: true, forwarded: true},
		{name: "as many as can be", messages: sessions(16), answers: bytes.Repeat([]byte{yes}, 16), binds: 16, forwarded: true},
		{name: "one more", messages: sessions(17), answers: append(bytes.Repeat([]byte{yes}, 16), no), binds: 16, failed: true, forwarded: true},
		{name: "signature of another session", messages: [][]byte{bindMessage(a.PublicKey().Marshal(), "s", sign(a, "other"), false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "signature of another host", messages: [][]byte{bindMessage(a.PublicKey().Marshal(), "s", sign(b, "s"), false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "no signature", messages: [][]byte{bindMessage(a.PublicKey().Marshal(), "s", nil, false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "no host key", messages: [][]byte{bindMessage(nil, "s", sign(a, "s"), false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "long session identifier", messages: [][]byte{a.bind(t, strings.Repeat("s", 128), false)}, answers: []byte{yes}, binds: 1},
		{name: "longer session identifier", messages: [][]byte{a.bind(t, strings.Repeat("s", 129), false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "no session identifier", messages: [][]byte{a.bind(t, "", false)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "bytes left over", messages: [][]byte{append(a.bind(t, "s", false), 0)}, answers: []byte{no}, failed: true, forwarded: true},
		{name: "a failure is not forgotten", messages: [][]byte{bindMessage(nil, "", nil, false), a.bind(t, "s", false)}, answers: []byte{no, yes}, binds: 1, failed: true, forwarded: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			keyring := newKeyring()
			r := serve(t, &Door{Keyring: keyring})
			conn := r.dial()
			ask(t, conn, message(19)) // before
			for i, answer := range ask(t, conn, test.messages...) {
				if !bytes.Equal(answer, []byte{test.answers[i]}) {
					t.Errorf("answer %d is %x, want %x", i, answer, test.answers[i])
				}
			}
			ask(t, conn, message(19)) // after
			calls := keyring.noted()
			before, after := calls[0].caller, calls[1].caller
			if len(before.Binds) > 0 || before.Forwarded || before.BindFailed {
				t.Errorf("the caller of an earlier request was changed: %+v", before)
			}
			if len(after.Binds) != test.binds || after.BindFailed != test.failed || after.Forwarded != test.forwarded {
				t.Errorf("%d binds, failed %v, forwarded %v; want %d, %v, %v", len(after.Binds), after.BindFailed, after.Forwarded, test.binds, test.failed, test.forwarded)
			}
			if after.Number != before.Number || after.Peer.PID != os.Getpid() {
				t.Errorf("caller %+v, before it was %+v", after, before)
			}
		})
	}
}

// The connection keeps a bind in other memory than the buffer of the next message.
func TestBindOutlivesItsMessage(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	conn, h := r.dial(), newHost(t)
	ask(t, conn, h.bind(t, "the session", true))
	ask(t, conn, message(18, strings.Repeat("\xff", 2000)))
	c := keyring.noted()[0].caller
	if b := c.Binds[0]; string(b.SessionID) != "the session" || !bytes.Equal(b.HostKey.Marshal(), h.PublicKey().Marshal()) || !b.Forwarding {
		t.Errorf("bind %+v", b)
	}
}

// TestRealSSH logs in at sshd with ssh, with and without forwarding the agent. It checks the
// binds of the connections.
func TestRealSSH(t *testing.T) {
	sshd, keygen, client := "/usr/sbin/sshd", needs(t, "ssh-keygen"), needs(t, "ssh")
	if _, err := os.Stat(sshd); err != nil {
		sshd = needs(t, "sshd")
	}
	needs(t, "ssh-add")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if me.Uid == "0" {
		// Its privilege separation directory, which a service manager makes.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	dir := doortest.Dir(t)
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	hostKey := filepath.Join(dir, "host")
	if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", hostKey).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	public, err := os.ReadFile(hostKey + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	authorized := file("authorized_keys", string(ssh.MarshalAuthorizedKey(keyring.signers[0].PublicKey())))
	config := file("sshd_config", "HostKey "+hostKey+"\nAuthorizedKeysFile "+authorized+
		"\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nAllowAgentForwarding yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n")
	known := file("known_hosts", "there "+string(public))

	for _, test := range []struct {
		name      string
		args      []string
		command   string
		forwarded bool // there is a connection that is
	}{
		{"login", []string{"-a"}, "true", false},
		{"forwarding", []string{"-A"}, "ssh-add -l", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := len(keyring.noted())
			cmd := exec.Command(client, append(test.args, "-F", "none", "-o", "ProxyCommand="+sshd+" -i -f "+config,
				"-o", "UserKnownHostsFile="+known, "-o", "HostKeyAlias=there", "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes",
				"-o", "IdentityFile=none", me.Username+"@there", test.command)...)
			cmd.Env = []string{"SSH_AUTH_SOCK=" + r.socket, "HOME=" + dir, "PATH=" + os.Getenv("PATH")}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("ssh: %v\n%s", err, out)
			}
			if test.forwarded && !strings.Contains(string(out), ssh.FingerprintSHA256(keyring.signers[0].PublicKey())) {
				t.Errorf("the other end sees %s", out)
			}
			signed, forwarded := false, false
			for _, c := range keyring.noted()[before:] {
				if len(c.caller.Binds) != 1 || c.caller.BindFailed {
					t.Errorf("%s over a connection with %d binds, failed: %v", c.method, len(c.caller.Binds), c.caller.BindFailed)
				}
				signed = signed || c.method == "Sign" && !c.caller.Forwarded
				forwarded = forwarded || c.method == "List" && c.caller.Forwarded
			}
			if !signed || forwarded != test.forwarded {
				t.Errorf("signed for the login: %v, listed forwarded: %v, want true, %v", signed, forwarded, test.forwarded)
			}
		})
	}
}
