package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"

	"p11-agent/token/tokentest"
)

// A rig is one agent under test, p11-agent or ssh-agent, and one connection to it. Its transcript
// has the answers.
type rig struct {
	t      *testing.T
	socket string
	conn   net.Conn
	client sshclient.ExtendedAgent
	said   strings.Builder
}

func (r *rig) say(format string, args ...any) { fmt.Fprintf(&r.said, format+"\n", args...) }

// connect makes a new connection without a bind.
func (r *rig) connect() {
	r.t.Helper()
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	answers, feed := io.Pipe()
	r.t.Cleanup(func() { answers.Close() })
	r.conn, r.client = conn, sshclient.NewClient(&shared{r: r, Reader: answers, feed: feed})
}

// shared lets the client of x/crypto share a connection. That client reads all the time.
type shared struct {
	r       *rig
	request []byte
	io.Reader
	feed *io.PipeWriter
}

func (s *shared) Write(b []byte) (int, error) {
	s.request = append(s.request, b...)
	for len(s.request) >= 4 {
		n := 4 + int(binary.BigEndian.Uint32(s.request))
		if len(s.request) < n {
			break
		}
		answer, err := s.r.exchange(s.request[4:n])
		s.request = s.request[n:]
		if err != nil {
			return 0, s.feed.CloseWithError(err)
		}
		go s.feed.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(answer))), answer...))
	}
	return len(b), nil
}

// exchange sends a message, and returns the answer.
func (r *rig) exchange(body []byte) ([]byte, error) {
	if err := r.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if _, err := r.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)); err != nil {
		return nil, err
	}
	var length [4]byte
	if _, err := io.ReadFull(r.conn, length[:]); err != nil {
		return nil, err
	}
	answer := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(r.conn, answer)
	return answer, err
}

// ask sends one message, and notes the type of the answer.
func (r *rig) ask(what string, number byte, fields ...any) {
	r.t.Helper()
	answer, err := r.exchange(append([]byte{number}, sshFields(fields...)...))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.t.Fatalf("%s: no answer", what)
	case err != nil:
		r.say("%s: hung up", what)
	case answer[0] == 28:
		// SSH_AGENT_EXTENSION_FAILURE (RFC 9987 section 5.8), for which OpenSSH 9.2
		// sends SSH_AGENT_FAILURE.
		r.say("%s: answer 5", what)
	default:
		r.say("%s: answer %d", what, answer[0])
	}
}

// sshFields encodes fields (RFC 4251 section 5).
func sshFields(fields ...any) (b []byte) {
	for _, f := range fields {
		switch f := f.(type) {
		case string:
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
		case []byte:
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, f)
		case byte:
			b = append(b, f)
		case rawBytes:
			b = append(b, f...)
		default:
			panic(f)
		}
	}
	return b
}

type rawBytes []byte

func (r *rig) list() {
	r.t.Helper()
	keys, err := r.client.List()
	if err != nil {
		r.t.Fatal(err)
	}
	r.say("%d keys", len(keys))
	for _, k := range keys {
		r.say("  %s %s", k.Format, k.Comment)
	}
}

func (r *rig) status(what string, err error) {
	if err != nil {
		r.say("%s: refused", what)
	} else {
		r.say("%s: done", what)
	}
}

// sign requests a signature, and notes its format if the signature is right.
func (r *rig) sign(what string, key ssh.PublicKey, data []byte, flags sshclient.SignatureFlags) {
	r.t.Helper()
	sig, err := r.client.SignWithFlags(key, data, flags)
	if err != nil {
		r.say("%s: refused", what)
		return
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	if err := key.Verify(data, sig); err != nil {
		r.t.Errorf("%s: %v", what, err)
	}
	r.say("%s: %s", what, sig.Format)
}

// pair is a key to add.
type pair struct {
	private crypto.Signer
	signer  ssh.Signer
	public  ssh.PublicKey
	cert    *ssh.Certificate
}

func newPair(t *testing.T, private crypto.Signer) pair {
	t.Helper()
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	p := pair{private: private, signer: signer, public: signer.PublicKey()}
	p.cert = &ssh.Certificate{Key: p.public, CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity, ValidPrincipals: []string{"me"}}
	_, ca, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ssh.NewSignerFromSigner(ca)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cert.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p pair) added(comment string) sshclient.AddedKey {
	key := any(p.private)
	if ed, ok := key.(ed25519.PrivateKey); ok {
		key = &ed
	}
	return sshclient.AddedKey{PrivateKey: key, Comment: comment}
}

// behaviourPairs are one key of each type, and two hosts.
type behaviourPairs struct{ ed, ec, rsa, host, other pair }

func newBehaviourPairs(t *testing.T) behaviourPairs {
	t.Helper()
	edwards := func() pair {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return newPair(t, k)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return behaviourPairs{edwards(), newPair(t, ec), newPair(t, rsaKey), edwards(), edwards()}
}

// bind binds the connection to a session with a host. by signs the session; normally it is the
// host.
func (r *rig) bind(what, session string, host, by pair, forwarding byte) {
	r.t.Helper()
	session = sessionID(session)
	sig, err := by.signer.Sign(rand.Reader, []byte(session))
	if err != nil {
		r.t.Fatal(err)
	}
	r.ask(what, 27, "session-bind@openssh.com", host.public.Marshal(), session, ssh.Marshal(sig), forwarding)
}

// sessionID returns the identifier of a session with that name. It is a digest, like a real one.
func sessionID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return string(sum[:])
}

func loginData(session, user string, key ssh.PublicKey, host ssh.PublicKey) []byte {
	method := "publickey"
	if host != nil {
		method = "publickey-hostbound-v00@openssh.com"
	}
	b := sshFields(sessionID(session), byte(50), user, "ssh-connection", method, byte(1), key.Type(), key.Marshal())
	if host != nil {
		b = append(b, sshFields(host.Marshal())...)
	}
	return b
}

// toHost returns a destination constraint.
func toHost(user string, from *pair, host pair) []byte {
	origin := sshFields("", "", "")
	if from != nil {
		origin = sshFields("", "from", "", from.public.Marshal(), byte(0))
	}
	return sshFields(origin, sshFields(user, "host", "", host.public.Marshal(), byte(0)), "")
}

// addConstrained asks the agent to add an Ed25519 key with constraints.
func (r *rig) addConstrained(what string, k pair, constraints ...any) {
	r.t.Helper()
	private := k.private.(ed25519.PrivateKey)
	r.ask(what, 25, append([]any{ssh.KeyAlgoED25519, []byte(private[32:]), []byte(private), "c"}, constraints...)...)
}

func (r *rig) addLimited(p pair, destinations ...[]byte) {
	r.t.Helper()
	var list []byte
	for _, d := range destinations {
		list = append(list, sshFields(d)...)
	}
	key := p.added("limited")
	key.ConstraintExtensions = []sshclient.ConstraintExtension{{ExtensionName: "restrict-destination-v00@openssh.com", ExtensionDetails: list}}
	if err := r.client.Add(key); err != nil {
		r.t.Errorf("add for destinations: %v", err)
	}
}

// behaviours are the requests for both agents. differs gives the reason why p11-agent does not
// answer like ssh-agent of OpenSSH 9.2.
var behaviours = []struct {
	name    string
	differs string
	do      func(r *rig, k behaviourPairs)
}{
	{"keys of every type", "", func(r *rig, k behaviourPairs) {
		for i, p := range []pair{k.ed, k.ec, k.rsa} {
			r.status("add", r.client.Add(p.added(fmt.Sprint("key ", i))))
		}
		r.list()
		for _, p := range []pair{k.ed, k.ec, k.rsa} {
			r.sign("sign", p.public, []byte("data"), 0)
		}
		r.sign("SHA-256", k.rsa.public, []byte("data"), sshclient.SignatureFlagRsaSha256)
		r.sign("SHA-512", k.rsa.public, []byte("data"), sshclient.SignatureFlagRsaSha512)
		r.sign("both", k.rsa.public, []byte("data"), sshclient.SignatureFlagRsaSha256|sshclient.SignatureFlagRsaSha512)
		r.sign("of Ed25519, with a flag", k.ed.public, []byte("data"), sshclient.SignatureFlagRsaSha512)
		r.sign("nothing", k.ed.public, nil, 0)
	}},
	{"certificates", "", func(r *rig, k behaviourPairs) {
		for _, p := range []pair{k.ed, k.ec, k.rsa} {
			r.status("add", r.client.Add(p.added("plain")))
			key := p.added("certified")
			key.Certificate = p.cert
			r.status("add", r.client.Add(key))
		}
		r.list()
		for _, p := range []pair{k.ed, k.ec, k.rsa} {
			r.sign("sign", p.cert, []byte("data"), sshclient.SignatureFlagRsaSha512)
		}
		r.status("remove the plain one", r.client.Remove(k.ed.public))
		r.sign("with the certificate", k.ed.cert, []byte("data"), 0)
		r.sign("without", k.ed.public, []byte("data"), 0)
		r.list()
	}},
	{"added again", "", func(r *rig, k behaviourPairs) {
		r.status("add", r.client.Add(k.ed.added("first")))
		r.status("add", r.client.Add(k.ec.added("second")))
		r.status("add", r.client.Add(k.ed.added("again")))
		r.list()
	}},
	{"removed", "", func(r *rig, k behaviourPairs) {
		r.status("remove what is not there", r.client.Remove(k.ed.public))
		r.status("remove all of nothing", r.client.RemoveAll())
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.status("add", r.client.Add(k.ec.added("ec")))
		r.status("remove", r.client.Remove(k.ed.public))
		r.status("remove", r.client.Remove(k.ed.public))
		r.list()
		r.status("remove all", r.client.RemoveAll())
		r.list()
		r.sign("sign", k.ec.public, []byte("data"), 0)
	}},
	{"locked", "", func(r *rig, k behaviourPairs) {
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.status("unlock what is open", r.client.Unlock([]byte("a")))
		r.status("lock without a passphrase", r.client.Lock(nil))
		r.status("lock", r.client.Lock([]byte("a")))
		r.list()
		r.sign("sign", k.ed.public, []byte("data"), 0)
		r.status("add", r.client.Add(k.ec.added("ec")))
		r.status("remove", r.client.Remove(k.ed.public))
		r.status("remove all", r.client.RemoveAll())
		r.status("lock again", r.client.Lock([]byte("b")))
		r.status("unlock wrongly", r.client.Unlock([]byte("b")))
		r.status("unlock", r.client.Unlock([]byte("a")))
		r.list()
	}},
	{"bound while locked", "ssh-agent refuses session-bind while it is locked, and the connection stays unbound ever after", func(r *rig, k behaviourPairs) {
		r.status("lock", r.client.Lock([]byte("a")))
		r.bind("bind", "session", k.host, k.host, 0)
	}},
	{"constraints", "", func(r *rig, k behaviourPairs) {
		add := func(what string, constraints ...any) { r.addConstrained(what, k.ed, constraints...) }
		add("none")
		add("lifetime", byte(1), uint32(60))
		add("confirm", byte(2))
		add("both", byte(2), byte(1), uint32(60))
		add("lifetime twice", byte(1), uint32(60), byte(1), uint32(60))
		add("confirm twice", byte(2), byte(2))
		add("unknown", byte(99))
		add("unknown extension", byte(255), "x@example.com", "data")
		add("cut short", byte(1), rawBytes{0, 0})
		r.list()
	}},
	{"destinations without any", "", func(r *rig, k behaviourPairs) {
		r.addConstrained("add", k.ed, byte(255), "restrict-destination-v00@openssh.com", "")
		r.sign("sign", k.ed.public, []byte("data"), 0)
		r.bind("bind", "one", k.host, k.host, 1)
		r.list()
	}},
	{"messages of SSH protocol 1", "", func(r *rig, k behaviourPairs) {
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.ask("list", 1)
		r.list()
		r.ask("remove all", 9)
		r.list()
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.status("remove all", r.client.RemoveAll())
		r.ask("remove all again", 9)
		r.list()
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.status("lock", r.client.Lock([]byte("a")))
		r.ask("remove all while locked", 9)
		r.status("unlock", r.client.Unlock([]byte("a")))
		r.list()
	}},
	{"comments", "", func(r *rig, k behaviourPairs) {
		for _, comment := range []string{"", "a\x00b", "end\x00", "\x00", "\x00\x00", "\x1b[1m", "\xff"} {
			r.addIdentity(fmt.Sprintf("add %q", comment), k.ed, string(k.ed.public.Marshal()), comment)
			r.list()
		}
	}},
	{"confirmed, without a person to ask", "", func(r *rig, k behaviourPairs) {
		key := k.ed.added("c")
		key.ConfirmBeforeUse = true
		r.status("add", r.client.Add(key))
		r.sign("sign", k.ed.public, []byte("data"), 0)
	}},
	{"bound", "", func(r *rig, k behaviourPairs) {
		r.bind("bind", "one", k.host, k.host, 1)
		r.bind("the same", "one", k.host, k.host, 1)
		r.bind("the same session to another host", "one", k.other, k.other, 1)
		r.bind("with the signature of another", "two", k.host, k.other, 1)
		r.bind("for logging in", "three", k.other, k.other, 0)
		r.bind("after that", "four", k.host, k.host, 1)
		r.ask("bind, cut short", 27, "session-bind@openssh.com", k.host.public.Marshal())
	}},
	{"limited, used here", "", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("", nil, k.host))
		r.list()
		r.sign("sign", k.ed.public, loginData("one", "me", k.ed.public, k.host.public), 0)
	}},
	{"limited, used where it may be", "", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("m*", nil, k.host))
		r.bind("bind", "one", k.host, k.host, 0)
		r.list()
		r.sign("sign", k.ed.public, loginData("one", "me", k.ed.public, k.host.public), 0)
		r.sign("without the host", k.ed.public, loginData("one", "me", k.ed.public, nil), 0)
		r.sign("another user", k.ed.public, loginData("one", "you", k.ed.public, k.host.public), 0)
		r.sign("another session", k.ed.public, loginData("two", "me", k.ed.public, k.host.public), 0)
		r.sign("another host", k.ed.public, loginData("one", "me", k.ed.public, k.other.public), 0)
		r.sign("something else", k.ed.public, []byte("data"), 0)
		r.sign("with more after it", k.ed.public, append(loginData("one", "me", k.ed.public, k.host.public), 0), 0)
	}},
	{"limited, elsewhere", "", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("", nil, k.host))
		r.connect()
		r.bind("bind", "one", k.other, k.other, 0)
		r.list()
		r.sign("sign", k.ed.public, loginData("one", "me", k.ed.public, k.other.public), 0)
		r.status("remove", r.client.Remove(k.ed.public))
		r.status("add again without a limit", r.client.Add(k.ed.added("free")))
		r.connect()
		r.list()
		r.status("remove", r.client.Remove(k.ed.public))
	}},
	{"limited, behind a failed bind", "a bind that failed is remembered, as by later releases of OpenSSH; 9.2 takes the connection for a local one", func(r *rig, k behaviourPairs) {
		r.status("add", r.client.Add(k.ec.added("free")))
		r.addLimited(k.ed, toHost("", nil, k.host))
		r.bind("bind", "one", k.host, k.other, 0)
		r.list()
		r.sign("sign", k.ed.public, loginData("one", "me", k.ed.public, k.host.public), 0)
		r.sign("sign with the other", k.ec.public, []byte("data"), 0)
	}},
	{"limited, two hops", "", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("", nil, k.host), toHost("root", &k.host, k.other))
		r.bind("bind", "one", k.host, k.host, 1)
		r.list()
		r.sign("on the way", k.ed.public, loginData("one", "me", k.ed.public, k.host.public), 0)
		r.bind("bind", "two", k.other, k.other, 0)
		r.list()
		r.sign("sign", k.ed.public, loginData("two", "root", k.ed.public, k.other.public), 0)
		r.sign("without the host", k.ed.public, loginData("two", "root", k.ed.public, nil), 0)
		r.sign("another user", k.ed.public, loginData("two", "me", k.ed.public, k.other.public), 0)
	}},
	{"limited, forwarded to where it ends", "", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("", nil, k.host))
		r.bind("bind", "one", k.host, k.host, 1)
		r.list()
	}},
	{"forwarded, adds", "", func(r *rig, k behaviourPairs) {
		r.bind("bind", "one", k.host, k.host, 1)
		r.status("a key", r.client.Add(k.ed.added("remote")))
		r.ask("a token", 20, "/usr/lib/softhsm/libsofthsm2.so", "1234")
		r.list()
	}},
	{"tokens", "", func(r *rig, k behaviourPairs) {
		r.ask("a path outside the list", 20, "/tmp/x.so", "")
		r.ask("a path that is not there", 20, "/usr/lib/not-there.so", "")
		r.ask("remove what is not there", 21, "/usr/lib/not-there.so", "")
		r.ask("constrained, unknown", 26, "/usr/lib/not-there.so", "", byte(99))
		r.ask("cut short", 20, "/usr/lib")
	}},
	{"nonsense", "", func(r *rig, k behaviourPairs) {
		r.ask("unknown message", 240)
		r.ask("unknown extension", 27, "x@example.com", "data")
		r.ask("add nothing", 17)
		r.ask("add an unknown type", 17, "ssh-nothing", "x", "c")
		r.ask("sign with garbage", 13, "garbage", "data", uint32(0))
		r.ask("remove garbage", 18, "garbage")
		r.list()
	}},
	{"a frame of no length", "", func(r *rig, k behaviourPairs) {
		if _, err := r.conn.Write(make([]byte, 4)); err != nil {
			r.t.Fatal(err)
		}
		r.ask("after it", 11)
	}},
	{"a frame that is too long", "", func(r *rig, k behaviourPairs) {
		if _, err := r.conn.Write([]byte{0, 4, 0, 1}); err != nil {
			r.t.Fatal(err)
		}
		r.ask("after it", 11)
	}},
	{"unknown signature flags", "unknown means no: what the flag asks for cannot be done", func(r *rig, k behaviourPairs) {
		r.status("add", r.client.Add(k.ed.added("ed")))
		r.sign("sign", k.ed.public, []byte("data"), 128)
	}},
	{"bytes after the last field", "unknown means no: they may be what limits the request", func(r *rig, k behaviourPairs) {
		r.ask("list", 11, byte(0))
		r.ask("remove all", 19, byte(0))
	}},
	{"lifetime of no time", "", func(r *rig, k behaviourPairs) {
		r.addConstrained("add", k.ed, byte(1), uint32(0))
		r.list()
		r.addConstrained("twice", k.ed, byte(1), uint32(0), byte(1), uint32(0))
		r.status("for ever", r.client.Add(k.ed.added("ed")))
		r.list()
		r.addConstrained("no time again", k.ed, byte(1), uint32(0))
		r.list()
		r.sign("sign", k.ed.public, []byte("data"), 0)
	}},
	{"certificates beside a key in memory", "", func(r *rig, k behaviourPairs) {
		const extension = "associated-certs-v00@openssh.com"
		r.addConstrained("one", k.ed, byte(255), extension, byte(0), sshFields(k.ed.cert.Marshal()))
		r.addConstrained("none", k.ed, byte(255), extension, byte(0), "")
		r.addConstrained("none but that", k.ed, byte(255), extension, byte(1), "")
		r.list()
	}},
	{"locked by a forwarded client", "the lock concerns keys that the client does not see", func(r *rig, k behaviourPairs) {
		r.bind("bind", "one", k.host, k.host, 1)
		r.status("lock", r.client.Lock([]byte("a")))
	}},
	{"all removed by a forwarded client", "a client removes what it sees", func(r *rig, k behaviourPairs) {
		r.addLimited(k.ed, toHost("", nil, k.other))
		r.bind("bind", "one", k.host, k.host, 1)
		r.list()
		r.status("remove", r.client.Remove(k.ed.public))
		r.status("remove all", r.client.RemoveAll())
		r.connect()
		r.list()
	}},
	{"a session without an identifier", "it names no session", func(r *rig, k behaviourPairs) {
		sig, err := k.host.signer.Sign(rand.Reader, nil)
		if err != nil {
			r.t.Fatal(err)
		}
		r.ask("bind", 27, "session-bind@openssh.com", k.host.public.Marshal(), "", ssh.Marshal(sig), byte(0))
	}},
	{"a long comment", "a list has room for so many bytes only", func(r *rig, k behaviourPairs) {
		r.addIdentity("4096 bytes", k.ed, string(k.ed.public.Marshal()), strings.Repeat("x", 4096))
		r.addIdentity("4097 bytes", k.ed, string(k.ed.public.Marshal()), strings.Repeat("x", 4097))
	}},
	{"the extension query while locked", "what the agent understands is no secret", func(r *rig, k behaviourPairs) {
		r.status("lock", r.client.Lock([]byte("a")))
		r.ask("query", 27, "query")
	}},
	{"the extension query", "RFC 9987 has it; OpenSSH since 10.3", func(r *rig, k behaviourPairs) { r.ask("query", 27, "query") }},
	{"halves of different keys", "ssh-agent believes the public half", func(r *rig, k behaviourPairs) {
		private := k.rsa.private.(*rsa.PrivateKey)
		other, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			r.t.Fatal(err)
		}
		mp := func(b []byte) []byte { return append([]byte{0}, b...) }
		r.ask("add", 17, "ssh-rsa", mp(other.N.Bytes()), "\x01\x00\x01", mp(private.D.Bytes()),
			mp(private.Precomputed.Qinv.Bytes()), mp(private.Primes[0].Bytes()), mp(private.Primes[1].Bytes()), "c")
	}},
}

// TestBehaviour sends the same requests to p11-agent and to ssh-agent.
func TestBehaviour(t *testing.T) {
	needPrograms(t, "ssh-agent")
	k := newBehaviourPairs(t)
	for _, b := range behaviours {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			transcripts := make(map[string]string)
			for _, program := range []string{"p11-agent", "ssh-agent"} {
				r := &rig{t: t, socket: startOne(t, program)}
				r.connect()
				b.do(r, k)
				transcripts[program] = r.said.String()
			}
			ours, theirs := transcripts["p11-agent"], transcripts["ssh-agent"]
			switch {
			case b.differs == "" && ours != theirs:
				t.Errorf("p11-agent:\n%s\nssh-agent:\n%s", ours, theirs)
			case b.differs != "" && ours == theirs:
				t.Errorf("they no longer differ:\n%s", ours)
			}
		})
	}
}

// startOne starts an agent that has no keys and no pinentry. For p11-agent, the configuration
// begins with lines.
func startOne(t *testing.T, program string, lines ...string) (socket string) {
	t.Helper()
	dir := tokentest.TempDir(t)
	socket = filepath.Join(dir, "s")
	args := []string{"-D", "-a", socket}
	name, err := exec.LookPath(program) // testscript puts p11-agent into PATH
	if err != nil {
		t.Fatal(err)
	}
	if program == "p11-agent" {
		args = append([]string{"--config", filepath.Join(dir, "config.toml"), "agent"}, args...)
		if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(strings.Join(lines, "")+"keys = []\n[pinentry]\nprogram = \"/nonexistent/pinentry\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "SSH_ASKPASS=/nonexistent", "GORACE=atexit_sleep_ms=0"}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // a signal ends the agent
		if t.Failed() {
			t.Logf("%s said:\n%s", program, log.String())
		}
	})
	if err := eventually(func() error {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	}); err != nil {
		t.Fatal(errors.Join(err, errors.New(log.String())))
	}
	return socket
}
