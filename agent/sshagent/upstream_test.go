package sshagent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/door"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/request"
)

// checkUpstreamLeaks returns an Upstream, closes it at the end of the test, and checks for
// leaks.
func checkUpstreamLeaks(t *testing.T, path string) *Upstream {
	t.Helper()
	checkLeaks(t)
	u := NewUpstream(path)
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	return u
}

// A fakeAgent listens on a socket. A test says what it does with its clients.
type fakeAgent struct {
	path  string
	l     net.Listener
	group sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

// fake starts an agent. handle gets each connection in a goroutine of its own, and the
// number of earlier connections. When handle returns, the agent closes the connection.
func fake(t *testing.T, path string, handle func(n int, conn net.Conn)) *fakeAgent {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeAgent{path: path, l: l}
	f.group.Go(func() { f.accept(handle) })
	t.Cleanup(f.stop)
	return f
}

func (f *fakeAgent) accept(handle func(int, net.Conn)) {
	for n := 0; ; n++ {
		conn, err := f.l.Accept()
		if err != nil {
			return
		}
		f.mu.Lock()
		f.conns = append(f.conns, conn)
		f.mu.Unlock()
		f.group.Go(func() {
			defer conn.Close()
			handle(n, conn)
		})
	}
}

func (f *fakeAgent) stop() {
	f.l.Close()
	f.mu.Lock()
	for _, conn := range f.conns {
		conn.Close()
	}
	f.mu.Unlock()
	f.group.Wait()
}

// serveUpstream starts an agent, and returns an Upstream for it.
func serveUpstream(t *testing.T, handle func(n int, conn net.Conn)) *Upstream {
	t.Helper()
	u := checkUpstreamLeaks(t, filepath.Join(doortest.Dir(t), "s"))
	fake(t, u.path, handle)
	return u
}

// answering answers every message of a client with the same bytes.
func answering(answer []byte) func(int, net.Conn) {
	return func(_ int, conn net.Conn) {
		for {
			if _, err := readAnswer(conn); err != nil {
				return
			}
			if _, err := conn.Write(answer); err != nil {
				return
			}
		}
	}
}

// identitiesAnswer returns an answer that lists keys, each with a comment.
func identitiesAnswer(fields ...any) []byte {
	return message(12, append([]any{uint32(len(fields) / 2)}, fields...)...)
}

// requests has each kind of request of an Upstream.
var requests = map[string]func(context.Context, *Upstream, *request.Caller) error{
	"list": func(ctx context.Context, u *Upstream, c *request.Caller) error {
		ids, err := u.List(ctx, c)
		if err != nil && ids != nil {
			return errors.New("an error and identities")
		}
		return err
	},
	"sign": func(ctx context.Context, u *Upstream, c *request.Caller) error {
		sig, err := u.Sign(ctx, c, request.Sign{Key: []byte("confidential key"), Data: []byte("confidential data")})
		if err != nil && sig != nil {
			return errors.New("an error and a signature")
		}
		return err
	},
	"remove": func(ctx context.Context, u *Upstream, c *request.Caller) error {
		return u.Remove(ctx, c, []byte("confidential key"))
	},
	"pass": func(ctx context.Context, u *Upstream, c *request.Caller) error {
		answer, err := u.Pass(ctx, c, message(200, "confidential"))
		if err != nil && answer != nil {
			return errors.New("an error and an answer")
		}
		return err
	},
}

// realAgent starts ssh-agent and returns its socket. If uid is not 0, ssh-agent runs as that
// user.
func realAgent(t *testing.T, uid uint32) string {
	t.Helper()
	dir := doortest.Dir(t)
	path := filepath.Join(dir, "s")
	cmd := exec.Command(needs(t, "ssh-agent"), "-D", "-a", path)
	cmd.Env = []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}
	if uid != 0 {
		if err := os.Chown(dir, int(uid), int(uid)); err != nil {
			t.Fatal(err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 10000 {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			return path
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("ssh-agent does not listen")
	return ""
}

// newKey makes a key pair with ssh-keygen.
func newKey(t *testing.T, kind string) (file string, pub ssh.PublicKey) {
	t.Helper()
	file = filepath.Join(doortest.Dir(t), "key")
	args := []string{"-q", "-t", kind, "-N", "", "-C", "my " + kind + " key", "-f", file}
	if out, err := exec.Command(needs(t, "ssh-keygen"), args...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	if pub, _, _, _, err = ssh.ParseAuthorizedKey(text); err != nil {
		t.Fatal(err)
	}
	return file, pub
}

// add runs ssh-add with a real agent.
func add(t *testing.T, socket string, args ...string) {
	t.Helper()
	cmd := exec.Command(needs(t, "ssh-add"), args...)
	cmd.Env = []string{"SSH_AUTH_SOCK=" + socket, "HOME=" + filepath.Dir(socket), "PATH=" + os.Getenv("PATH")}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add %v: %v: %s", args, err, out)
	}
}

func TestUpstreamSSHAgent(t *testing.T) {
	socket := realAgent(t, 0)
	u := checkUpstreamLeaks(t, socket)
	c := &request.Caller{}
	if u.Name() != socket {
		t.Errorf("name %s", u.Name())
	}
	if ids, err := u.List(t.Context(), c); len(ids) > 0 || err != nil {
		t.Errorf("empty agent: %v, %v", ids, err)
	}
	pubs := make(map[string]ssh.PublicKey)
	var want []string
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		file, pub := newKey(t, kind)
		add(t, socket, file)
		pubs[kind] = pub
		want = append(want, string(pub.Marshal())+"my "+kind+" key")
	}
	list := func() (got []string) {
		t.Helper()
		ids, err := u.List(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			got = append(got, string(id.Key.Marshal())+id.Comment)
		}
		return got
	}
	if got := list(); !slices.Equal(got, want) {
		t.Errorf("identities %q, want %q", got, want)
	}
	for _, test := range []struct {
		kind   string
		flags  request.SignatureFlags
		format string
	}{
		{"ed25519", 0, ssh.KeyAlgoED25519},
		{"ecdsa", 0, ssh.KeyAlgoECDSA256},
		{"rsa", 0, ssh.KeyAlgoRSA},
		{"rsa", request.SignatureRSASHA2256, ssh.KeyAlgoRSASHA256},
		{"rsa", request.SignatureRSASHA2512, ssh.KeyAlgoRSASHA512},
	} {
		t.Run("sign "+test.format, func(t *testing.T) {
			data := bytes.Repeat([]byte("data"), 1000)
			sig, err := u.Sign(t.Context(), c, request.Sign{Key: pubs[test.kind].Marshal(), Data: data, Flags: test.flags})
			if err != nil {
				t.Fatal(err)
			}
			if err := pubs[test.kind].Verify(data, sig); err != nil || sig.Format != test.format {
				t.Errorf("format %s, %v", sig.Format, err)
			}
		})
	}
	t.Run("many at once", func(t *testing.T) {
		var group sync.WaitGroup
		for i := range 32 {
			group.Go(func() {
				data := fmt.Append(nil, i)
				sig, err := u.Sign(t.Context(), c, request.Sign{Key: pubs["ed25519"].Marshal(), Data: data})
				if err == nil {
					err = pubs["ed25519"].Verify(data, sig)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	})
	t.Run("refused", func(t *testing.T) {
		unknown := makeSigners()[0].PublicKey().Marshal()
		_, signErr := u.Sign(t.Context(), c, request.Sign{Key: unknown})
		_, passErr := u.Pass(t.Context(), c, message(200))
		_, extensionErr := u.Pass(t.Context(), c, message(27, "no-such@example.com"))
		for _, err := range []error{signErr, passErr, extensionErr, u.Remove(t.Context(), c, unknown)} {
			if !errors.Is(err, errRefused) || err.Error() != "the agent at "+socket+" refused" {
				t.Errorf("%v", err)
			}
		}
	})
	t.Run("pass", func(t *testing.T) {
		answer, err := u.Pass(t.Context(), c, message(22, "phrase"))
		if err != nil || !bytes.Equal(answer, []byte{6}) {
			t.Errorf("lock: %x, %v", answer, err)
		}
		if got := list(); len(got) > 0 {
			t.Errorf("a locked agent lists %q", got)
		}
		answer, err = u.Pass(t.Context(), c, message(23, "phrase"))
		if err != nil || !bytes.Equal(answer, []byte{6}) {
			t.Errorf("unlock: %x, %v", answer, err)
		}
		if answer, err = u.Pass(t.Context(), c, message(11)); err != nil || answer[0] != 12 {
			t.Errorf("list: %x, %v", answer, err)
		}
	})
	t.Run("remove", func(t *testing.T) {
		if err := u.Remove(t.Context(), c, pubs["ecdsa"].Marshal()); err != nil {
			t.Error(err)
		}
		if got := list(); !slices.Equal(got, []string{want[0], want[2]}) {
			t.Errorf("identities %q", got)
		}
	})
}

// The upstream agent applies its own constraints.
func TestUpstreamDestinations(t *testing.T) {
	socket := realAgent(t, 0)
	u := checkUpstreamLeaks(t, socket)
	file, pub := newKey(t, "ed25519")
	right, wrong := newHost(t), newHost(t)
	known := filepath.Join(doortest.Dir(t), "known_hosts")
	line := append([]byte("right.example "), ssh.MarshalAuthorizedKey(right.PublicKey())...)
	if err := os.WriteFile(known, line, 0o600); err != nil {
		t.Fatal(err)
	}
	add(t, socket, "-H", known, "-h", "right.example", file)

	bound := func(messages ...[]byte) *request.Caller {
		c := &request.Caller{}
		for _, m := range messages {
			c.Binds = append(c.Binds, request.Bind{Message: m})
		}
		return c
	}
	for _, test := range []struct {
		name           string
		caller         *request.Caller
		listed, signed bool
	}{
		// Without a session, the upstream agent does not know the host.
		{"not bound", bound(), true, false},
		{"bound to the host", bound(right.bind(t, "session", false)), true, true},
		{"bound to another host", bound(wrong.bind(t, "session", false)), false, false},
		{"bound to another session", bound(right.bind(t, "another", false)), true, false},
		{"on the way through the host", bound(right.bind(t, "session", true), wrong.bind(t, "2", false)), false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			ids, err := u.List(t.Context(), test.caller)
			if err != nil || (len(ids) == 1) != test.listed {
				t.Errorf("%d identities, %v", len(ids), err)
			}
			_, err = u.Sign(t.Context(), test.caller, request.Sign{Key: pub.Marshal(), Data: loginTo(pub, "session", right)})
			if (err == nil) != test.signed {
				t.Errorf("sign: %v", err)
			}
		})
	}
}

// If the upstream agent is p11-agent, it gets the binds of the caller.
func TestUpstreamCaller(t *testing.T) {
	keyring := newKeyring()
	u := checkUpstreamLeaks(t, "")
	u.path = serve(t, &Door{Keyring: keyring}).socket
	h := newHost(t)
	for _, test := range []struct {
		name   string
		caller request.Caller
	}{
		{"not bound", request.Caller{}},
		{"forwarded and bound", request.Caller{Binds: []request.Bind{{Message: h.bind(t, "1", true)}, {Message: h.bind(t, "2", false)}}, Forwarded: true}},
		{"failed", request.Caller{BindFailed: true, Forwarded: true}},
		{"bound and failed", request.Caller{Binds: []request.Bind{{Message: h.bind(t, "1", false)}}, BindFailed: true, Forwarded: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := len(keyring.noted())
			if err := u.Remove(t.Context(), &test.caller, keyring.signers[0].PublicKey().Marshal()); err != nil {
				t.Fatal(err)
			}
			got := keyring.noted()[before].caller
			if len(got.Binds) != len(test.caller.Binds) || got.BindFailed != test.caller.BindFailed || got.Forwarded != test.caller.Forwarded {
				t.Errorf("caller %+v, want %+v", got, test.caller)
			}
		})
	}
}

// loginTo returns the data of a login at a host.
func loginTo(pub ssh.PublicKey, session string, h host) []byte {
	return encode(session, raw{50}, "me", "ssh-connection", "publickey-hostbound-v00@openssh.com", true,
		pub.Type(), pub.Marshal(), h.PublicKey().Marshal())
}

// The test uses the real kernel and a real other user: ssh-agent runs as uid 65534.
func TestUpstreamOfAnotherUser(t *testing.T) {
	const nobody = 65534
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("this needs root, to become another user")
	}
	u := checkUpstreamLeaks(t, realAgent(t, nobody))
	for name, call := range requests {
		err := call(t.Context(), u, nil)
		if err == nil || !strings.Contains(err.Error(), u.path) || !strings.Contains(err.Error(), "another user (uid 65534)") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMayAsk(t *testing.T) {
	for _, test := range []struct {
		name      string
		uid, ours int
		want      bool
	}{
		{"the same user", 1000, 1000, true},
		{"root", 0, 1000, true},
		{"root for root", 0, 0, true},
		{"another user", 1001, 1000, false},
		{"another user for root", 1001, 0, false},
		{"unknown", -1, 1000, false},
	} {
		if err := mayAsk(test.uid, test.ours); (err == nil) != test.want {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestUpstreamDead(t *testing.T) {
	dir := doortest.Dir(t)
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for path, want := range map[string]error{filepath.Join(dir, "none"): syscall.ENOENT, dead: syscall.ECONNREFUSED} {
		t.Run(want.Error(), func(t *testing.T) {
			u := checkUpstreamLeaks(t, path)
			for name, call := range requests {
				for range 2 {
					err := call(t.Context(), u, nil)
					if !errors.Is(err, want) || !strings.HasPrefix(err.Error(), "the agent at "+path+" ") || strings.Count(err.Error(), path) != 1 {
						t.Errorf("%s: %v, want %v", name, err, want)
					}
				}
			}
			if u.slow {
				t.Error("an agent that is not there counts as slow")
			}
		})
	}
}

// An upstream agent whose queue of connections is full does not delay a client.
func TestUpstreamQueueFull(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	u := checkUpstreamLeaks(t, path)
	for name, call := range requests {
		if err := call(t.Context(), u, nil); !errors.Is(err, syscall.EAGAIN) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUpstreamBinds(t *testing.T) {
	h := newHost(t)
	binds := [][]byte{h.bind(t, "1", true), h.bind(t, "2", true), h.bind(t, "3", false)}
	caller := &request.Caller{}
	for _, b := range binds {
		caller.Binds = append(caller.Binds, request.Bind{Message: b})
	}
	failed := *caller
	failed.BindFailed = true
	key := h.PublicKey().Marshal()
	last := map[string][]byte{
		"list":   message(11),
		"sign":   message(13, "confidential key", "confidential data", uint32(0)),
		"remove": message(18, "confidential key"),
		"pass":   message(200, "confidential"),
	}
	answers := map[byte][]byte{
		11:  identitiesAnswer(key, "comment"),
		13:  message(14, encode("alg", "blob")),
		18:  {6},
		200: {201},
	}
	for _, test := range []struct {
		name   string
		caller *request.Caller
		answer byte // to binds
		want   [][]byte
	}{
		{"without a caller", nil, 6, nil},
		{"not bound", &request.Caller{}, 6, nil},
		{"bound", caller, 6, binds},
		{"refused", caller, 5, binds},
		{"refused as an extension", caller, 28, binds},
		{"failed here", &failed, 28, append(slices.Clone(binds), message(27, "session-bind@openssh.com", "", "", "", false))},
	} {
		for name, call := range requests {
			t.Run(test.name+" "+name, func(t *testing.T) {
				got := make(chan [][]byte, 2)
				u := serveUpstream(t, func(_ int, conn net.Conn) {
					var frames [][]byte
					defer func() { got <- frames }()
					for {
						b, err := readAnswer(conn)
						if err != nil {
							return
						}
						frames = append(frames, b)
						answer := []byte{test.answer}
						if b[0] != 27 {
							answer = answers[b[0]]
						}
						conn.Write(framed(answer))
					}
				})
				for range 2 { // each on a connection of its own
					if err := call(t.Context(), u, test.caller); err != nil {
						t.Fatal(err)
					}
					want := append(slices.Clone(test.want), last[name])
					if frames := <-got; !slices.EqualFunc(frames, want, bytes.Equal) {
						t.Errorf("messages %x, want %x", frames, want)
					}
				}
			})
		}
	}
}

func TestUpstreamBadBinds(t *testing.T) {
	caller := &request.Caller{Binds: []request.Bind{{Message: newHost(t).bind(t, "s", false)}}}
	for name, answer := range map[string][]byte{
		"list":          framed(identitiesAnswer()),
		"signature":     framed(message(14, encode("alg", "blob"))),
		"nothing":       {0, 0, 0, 0},
		"huge":          {0xff, 0xff, 0xff, 0xff},
		"cut short":     {0, 0, 0},
		"unknown":       framed([]byte{200}),
		"no connection": {},
	} {
		t.Run(name, func(t *testing.T) {
			u := serveUpstream(t, func(_ int, conn net.Conn) {
				readAnswer(conn)
				conn.Write(answer)
			})
			for name, call := range requests {
				if err := call(t.Context(), u, caller); err == nil || !strings.Contains(err.Error(), u.path) {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
	t.Run("cannot be repeated", func(t *testing.T) {
		u := serveUpstream(t, answering(framed([]byte{6})))
		for name, call := range requests {
			if err := call(t.Context(), u, &request.Caller{Binds: []request.Bind{{}}}); err == nil {
				t.Errorf("%s without the bind", name)
			}
		}
	})
}

func TestUpstreamBadAnswers(t *testing.T) {
	key := makeSigners()[0].PublicKey().Marshal()
	list := identitiesAnswer(key, "a", key, "b")
	sig := message(14, encode("alg", "blob"))
	all := []string{"list", "sign", "remove", "pass"}
	but := func(name string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == name })
	}
	large := make([]byte, maxFrame+1)
	large[0] = 12
	for _, test := range []struct {
		name   string
		answer []byte
		bad    []string // requests that it is no answer for
	}{
		{"nothing", nil, all},
		{"length cut short", []byte{0, 0, 0}, all},
		{"no length", []byte{0, 0, 0, 0}, all},
		{"huge length", []byte{0xff, 0xff, 0xff, 0xff, 12}, all},
		{"too large", framed(large), all},
		{"garbage", []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), all},
		{"hangs up within", framed(list)[:len(list)], all},
		{"failure", framed([]byte{5}), all},
		{"extension failure", framed([]byte{28}), all},
		{"failure with more", framed([]byte{5, 1, 2, 3}), all},
		{"success", framed([]byte{6}), []string{"list", "sign"}},
		{"success with more", framed([]byte{6, 0}), []string{"list", "sign", "remove"}},
		{"list", framed(list), []string{"sign", "remove"}},
		{"signature", framed(sig), []string{"list", "remove"}},
		{"list without a number", framed([]byte{12, 0, 0, 0}), but("pass")},
		{"list cut short", framed(list[:len(list)-1]), but("pass")},
		{"list of less than it says", framed(message(12, uint32(3), key, "a")), but("pass")},
		{"list of more than it says", framed(message(12, uint32(1), key, "a", key, "b")), but("pass")},
		{"list of 2^32-1", framed(message(12, uint32(1<<32-1), key, "a")), but("pass")},
		{"list with a huge key", framed(message(12, uint32(1), uint32(1<<32-1), "a")), but("pass")},
		{"signature cut short", framed(sig[:len(sig)-1]), but("pass")},
		{"signature with more", framed(append(slices.Clone(sig), 0)), but("pass")},
		{"empty signature", framed(message(14, "")), but("pass")},
		{"signature without format", framed(message(14, encode("", "blob"))), but("pass")},
		{"signature without blob", framed(message(14, encode("alg", ""))), but("pass")},
		{"signature of format only", framed(message(14, encode("alg"))), but("pass")},
	} {
		t.Run(test.name, func(t *testing.T) {
			u := serveUpstream(t, func(_ int, conn net.Conn) {
				readAnswer(conn)
				conn.Write(test.answer)
			})
			for name, call := range requests {
				err := call(t.Context(), u, nil)
				switch {
				case (err != nil) != slices.Contains(test.bad, name):
					t.Errorf("%s: %v", name, err)
				case err == nil:
				case !strings.HasPrefix(err.Error(), "the agent at "+u.path+" ") || strings.Contains(err.Error(), "confidential"):
					t.Errorf("%s: %v", name, err)
				}
			}
			if u.slow {
				t.Error("an agent that answers counts as slow")
			}
		})
	}
}

func TestUpstreamList(t *testing.T) {
	signers := makeSigners()
	ed, rsa := signers[0].PublicKey().Marshal(), signers[1].PublicKey().Marshal()
	cert := newCert(t).Marshal()
	sk := encode("sk-ssh-ed25519@openssh.com", bytes.Repeat([]byte{1}, 32), "ssh:")
	// The exponent has a leading zero: it is still 65537, in another wire form.
	padded := encode("ssh-rsa", []byte{0, 0, 1, 0, 1}, append([]byte{0}, bytes.Repeat([]byte{0xff}, 256)...))
	many := func(n int) (fields []any) {
		for range n {
			fields = append(fields, ed, "")
		}
		return fields
	}
	for _, test := range []struct {
		name   string
		answer []byte
		want   []string // wire form and comment
		err    bool
	}{
		{"none", identitiesAnswer(), nil, false},
		{"some", identitiesAnswer(ed, "a", rsa, "b"), []string{string(ed) + "a", string(rsa) + "b"}, false},
		{"certificate", identitiesAnswer(cert, "a"), []string{string(cert) + "a"}, false},
		{"security key", identitiesAnswer(sk, "a"), []string{string(sk) + "a"}, false},
		{"unknown type", identitiesAnswer(encode("ssh-future", "x"), "a", ed, "b"), []string{string(ed) + "b"}, false},
		{"no key", identitiesAnswer("", "a", ed, "b", "x", "c"), []string{string(ed) + "b"}, false},
		{"key with more", identitiesAnswer(append(slices.Clone(ed), 0), "a", ed, "b"), []string{string(ed) + "b"}, false},
		{"key written otherwise", identitiesAnswer(padded, "a", ed, "b"), []string{string(ed) + "b"}, false},
		{"the same twice", identitiesAnswer(ed, "a", ed, "b"), []string{string(ed) + "a", string(ed) + "b"}, false},
		{"as many as can be", identitiesAnswer(many(2048)...), slices.Repeat([]string{string(ed)}, 2048), false},
		{"one more", identitiesAnswer(many(2049)...), nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			ids, err := parseIdentities(test.answer, nil)
			if (err != nil) != test.err {
				t.Error(err)
			}
			var got []string
			for _, id := range ids {
				got = append(got, string(id.Key.Marshal())+id.Comment)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%d identities %q, want %d", len(got), got, len(test.want))
			}
		})
	}
}

func TestUpstreamSignature(t *testing.T) {
	u := serveUpstream(t, answering(framed(message(14, encode("sk-ssh-ed25519@openssh.com", "blob", byte(5), uint32(7))))))
	sig, err := u.Sign(t.Context(), nil, request.Sign{Key: []byte("key"), Data: []byte("data")})
	if err != nil {
		t.Fatal(err)
	}
	if sig.Format != "sk-ssh-ed25519@openssh.com" || string(sig.Blob) != "blob" || !bytes.Equal(sig.Rest, []byte{5, 0, 0, 0, 7}) {
		t.Errorf("signature %+v", sig)
	}
}

func TestUpstreamLargestMessage(t *testing.T) {
	u := serveUpstream(t, answering(framed([]byte{6})))
	if _, err := u.Pass(t.Context(), nil, make([]byte, maxFrame)); err != nil {
		t.Error(err)
	}
	for _, n := range []int{0, maxFrame + 1} {
		if _, err := u.Pass(t.Context(), nil, make([]byte, n)); err == nil {
			t.Errorf("a message of %d bytes was sent", n)
		}
	}
}

func TestUpstreamLargestAnswer(t *testing.T) {
	large := append([]byte{99}, bytes.Repeat([]byte{'x'}, maxFrame-1)...)
	u := serveUpstream(t, answering(framed(large)))
	if answer, err := u.Pass(t.Context(), nil, []byte{1}); err != nil || !bytes.Equal(answer, large) {
		t.Errorf("answer of %d bytes, %v", len(answer), err)
	}
}

// A request that is cancelled closes its connection, at every stage of waiting.
func TestUpstreamCancel(t *testing.T) {
	caller := &request.Caller{Binds: []request.Bind{{Message: newHost(t).bind(t, "s", false)}}}
	for _, stage := range []string{"bind", "answer", "rest of the answer"} {
		for name, request := range requests {
			t.Run(name+" waiting for the "+stage, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				ended := make(chan error, 1)
				u := serveUpstream(t, func(_ int, conn net.Conn) {
					readAnswer(conn)
					if stage != "bind" {
						conn.Write(framed([]byte{6}))
						readAnswer(conn)
					}
					if stage == "rest of the answer" {
						conn.Write([]byte{0, 0})
					}
					cancel()
					_, err := conn.Read(make([]byte, 1))
					ended <- err
				})
				if err := request(ctx, u, caller); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), u.path) {
					t.Errorf("%v", err)
				}
				// Unread bytes make it a reset.
				if err := <-ended; !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the connection was not closed: %v", err)
				}
				if u.slow {
					t.Error("an agent that was not waited for counts as slow")
				}
			})
		}
	}
	t.Run("before it begins", func(t *testing.T) {
		u := serveUpstream(t, answering(framed([]byte{6})))
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(gone)
		for name, request := range requests {
			if err := request(ctx, u, nil); !errors.Is(err, gone) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("the agent does not read", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan struct{})
		u := serveUpstream(t, func(_ int, conn net.Conn) {
			conn.Read(make([]byte, 1))
			cancel()
			<-ended
		})
		_, err := u.Pass(ctx, nil, make([]byte, maxFrame))
		close(ended)
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A slow agent delays a single list. When the agent answers again, lists have its keys.
func TestUpstreamSlow(t *testing.T) {
	key := makeSigners()[0].PublicKey()
	answer := framed(identitiesAnswer(key.Marshal(), "a"))
	begun := make(chan int, 100)
	closed := make(chan int, 100)
	recover := make(chan struct{})
	u := serveUpstream(t, func(n int, conn net.Conn) {
		readAnswer(conn)
		begun <- n
		if n == 1 { // the check
			<-recover
		}
		if n > 0 {
			conn.Write(answer)
		}
		conn.Read(make([]byte, 1))
		closed <- n
	})
	_, err := u.List(t.Context(), nil)
	if !errors.Is(err, errSilent) || !strings.Contains(err.Error(), u.path) {
		t.Fatalf("%v, want that it %v", err, errSilent)
	}
	for want := range 2 {
		if n := <-begun; n != want {
			t.Errorf("request %d, want %d", n, want)
		}
	}
	if n := <-closed; n != 0 {
		t.Errorf("connection %d was closed first", n)
	}
	for range 10 {
		// The text stays the same, so that the log has it once.
		if _, again := u.List(t.Context(), nil); again == nil || again.Error() != err.Error() {
			t.Fatalf("%v, then %v", err, again)
		}
	}
	select {
	case n := <-begun:
		t.Errorf("request %d while the check waits", n)
	default:
	}
	close(recover)
	<-closed
	for { // until the check is done
		ids, err := u.List(t.Context(), nil)
		if err == nil {
			if len(ids) != 1 || !bytes.Equal(ids[0].Key.Marshal(), key.Marshal()) {
				t.Errorf("identities %v", ids)
			}
			break
		}
		if !errors.Is(err, errSilent) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
	if n := <-begun; n != 2 {
		t.Errorf("request %d, want the list", n)
	}
}

// Only lists are affected by an agent that counts as slow.
func TestUpstreamSlowSigns(t *testing.T) {
	u := serveUpstream(t, func(_ int, conn net.Conn) {
		b, err := readAnswer(conn)
		if err == nil && b[0] == 13 {
			conn.Write(framed(message(14, encode("alg", "blob"))))
		}
		conn.Read(make([]byte, 1))
	})
	if _, err := u.List(t.Context(), nil); !errors.Is(err, errSilent) {
		t.Fatal(err)
	}
	if err := requests["sign"](t.Context(), u, nil); err != nil {
		t.Error(err)
	}
}

// If a slow agent dies, it does not count as slow any more.
func TestUpstreamSlowDies(t *testing.T) {
	u := checkUpstreamLeaks(t, filepath.Join(doortest.Dir(t), "s"))
	checking := make(chan struct{})
	f := fake(t, u.path, func(n int, conn net.Conn) {
		if n == 1 {
			close(checking)
		}
		io.Copy(io.Discard, conn)
	})
	if _, err := u.List(t.Context(), nil); !errors.Is(err, errSilent) {
		t.Fatal(err)
	}
	<-checking
	f.stop()
	for {
		_, err := u.List(t.Context(), nil)
		if errors.Is(err, syscall.ENOENT) {
			return
		}
		if !errors.Is(err, errSilent) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}

func TestUpstreamClose(t *testing.T) {
	checking, ended := make(chan struct{}), make(chan struct{})
	u := serveUpstream(t, func(n int, conn net.Conn) {
		readAnswer(conn)
		if n == 1 {
			close(checking)
		}
		conn.Read(make([]byte, 1))
		if n == 1 {
			close(ended)
		}
	})
	if _, err := u.List(t.Context(), nil); !errors.Is(err, errSilent) {
		t.Fatal(err)
	}
	<-checking
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			if err := u.Close(); err != nil {
				t.Error(err)
			}
			u.mu.Lock()
			defer u.mu.Unlock()
			if u.stop != nil {
				t.Error("Close did not wait for the check")
			}
		})
	}
	group.Wait()
	<-ended
	for name, call := range requests {
		if err := call(t.Context(), u, nil); !errors.Is(err, errClosed) {
			t.Errorf("%s: %v, want %v", name, err, errClosed)
		}
	}
}

// Lists, checks and Close at the same time.
func TestUpstreamCloseDuringLists(t *testing.T) {
	for range 20 {
		t.Run("", func(t *testing.T) {
			listed := make(chan struct{}, 1)
			u := serveUpstream(t, answering(framed(identitiesAnswer())))
			u.slow = true
			var group sync.WaitGroup
			for range 8 {
				group.Go(func() {
					for {
						_, err := u.List(t.Context(), nil)
						switch {
						case errors.Is(err, errClosed):
							return
						case err == nil:
							select {
							case listed <- struct{}{}:
							default:
							}
						case errors.Is(err, errSilent):
							runtime.Gosched()
						}
					}
				})
			}
			<-listed
			if err := u.Close(); err != nil {
				t.Error(err)
			}
			group.Wait()
		})
	}
}

// piped returns an Upstream for synctest bubbles, where waiting costs no time. handle
// answers the requests on connection n.
func piped(t *testing.T, handle func(n int, conn net.Conn)) *Upstream {
	t.Helper()
	var group sync.WaitGroup
	var n atomic.Int64
	u := NewUpstream("/pipe")
	u.testOnlyDial = func(context.Context) (net.Conn, error) {
		client, conn := net.Pipe()
		n := int(n.Add(1) - 1)
		group.Go(func() {
			defer conn.Close()
			handle(n, conn)
		})
		return client, nil
	}
	t.Cleanup(func() {
		u.Close()
		group.Wait()
	})
	return u
}

func TestUpstreamPatience(t *testing.T) {
	const never = 24 * time.Hour
	for _, test := range []struct {
		name string
		want time.Duration
	}{
		{"list", listPatience},
		{"remove", 5 * time.Second},
		{"pass", 30 * time.Second},
		{"sign", never},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := piped(t, func(_ int, conn net.Conn) { io.Copy(io.Discard, conn) })
				ctx, cancel := context.WithTimeout(t.Context(), never)
				defer cancel()
				began := time.Now()
				err := requests[test.name](ctx, u, nil)
				if took := time.Since(began); took != test.want {
					t.Errorf("took %v, want %v", took, test.want)
				}
				if errors.Is(err, errSilent) != (test.want != never) || errors.Is(err, context.DeadlineExceeded) != (test.want == never) {
					t.Error(err)
				}
				if u.slow != (test.name == "list") {
					t.Errorf("slow: %t", u.slow)
				}
			})
		})
	}
	t.Run("a list that takes longer than its client waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := piped(t, func(_ int, conn net.Conn) { io.Copy(io.Discard, conn) })
			ctx, cancel := context.WithTimeout(t.Context(), listPatience/2)
			defer cancel()
			if _, err := u.List(ctx, nil); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errSilent) || u.slow {
				t.Errorf("%v, slow: %t", err, u.slow)
			}
		})
	})
}

// An agent sends its answer byte after byte. A list must be complete in time. A signature
// may begin late, but must then be complete in time.
func TestUpstreamDrip(t *testing.T) {
	sig := framed(message(14, encode("alg", "blob")))
	for _, test := range []struct {
		name, request string
		answer        []byte
		begins, pause time.Duration // before the first byte, and before each other one
		takes         time.Duration
		fails         bool
	}{
		{"a slow list", "list", framed(identitiesAnswer()), 0, listPatience / 7, listPatience, true},
		{"a list in time", "list", framed(identitiesAnswer()), 0, listPatience / 10, 8 * listPatience / 10, false},
		{"a slow signature", "sign", sig, time.Hour, door.Patience / 20, time.Hour + door.Patience, true},
		{"a signature in time", "sign", sig, time.Hour, door.Patience / 40, time.Hour + time.Duration(len(sig)-1)*door.Patience/40, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := piped(t, func(_ int, conn net.Conn) {
					readAnswer(conn)
					time.Sleep(test.begins)
					for _, b := range test.answer {
						if _, err := conn.Write([]byte{b}); err != nil {
							return
						}
						time.Sleep(test.pause)
					}
				})
				began := time.Now()
				err := requests[test.request](t.Context(), u, nil)
				if took := time.Since(began); took != test.takes || (err != nil) != test.fails {
					t.Errorf("%v after %v, want that after %v", err, took, test.takes)
				}
			})
		})
	}
}

// A check ends after checkPatience, and the next list starts another.
func TestUpstreamChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		u := piped(t, func(n int, conn net.Conn) {
			asked.Store(int64(n) + 1)
			readAnswer(conn)
			if n == 2 {
				time.Sleep(9 * time.Second)
			}
			if n >= 2 {
				conn.Write(framed(identitiesAnswer()))
			}
			io.Copy(io.Discard, conn)
		})
		list := func(fails bool, took time.Duration, total int64) {
			t.Helper()
			synctest.Wait()
			began := time.Now()
			_, err := u.List(t.Context(), nil)
			if d := time.Since(began); errors.Is(err, errSilent) != fails || d != took {
				t.Errorf("%v after %v, want that after %v", err, d, took)
			}
			synctest.Wait()
			if n := asked.Load(); n != total {
				t.Errorf("%d connections, want %d", n, total)
			}
		}
		list(true, listPatience, 2) // the first check begins
		time.Sleep(checkPatience - time.Millisecond)
		list(true, 0, 2)
		time.Sleep(time.Millisecond)
		list(true, 0, 3) // and the second
		time.Sleep(9*time.Second - time.Millisecond)
		list(true, 0, 3)
		time.Sleep(time.Millisecond)
		list(false, 0, 4)
		list(false, 0, 5)
	})
}

// upstreamSeeds are answers of an agent, good and bad.
func upstreamSeeds(t testing.TB) [][]byte {
	t.Helper()
	var seeds [][]byte
	for _, s := range makeSigners() {
		key := s.PublicKey().Marshal()
		sig, err := s.Sign(rand.Reader, []byte("data"))
		if err != nil {
			t.Fatal(err)
		}
		list := identitiesAnswer(key, "comment", "", "\x1b\xff", newCert(t).Marshal(), strings.Repeat("é", 600))
		seeds = append(seeds, list, list[:len(list)-1], append(slices.Clone(list), 0), message(14, ssh.Marshal(sig)))
	}
	return append(seeds,
		nil, []byte{5}, []byte{6}, []byte{28}, []byte{200},
		identitiesAnswer(),
		identitiesAnswer(encode("sk-ssh-ed25519@openssh.com", bytes.Repeat([]byte{1}, 32), "ssh:"), "touch me"),
		message(12, uint32(1<<32-1)), message(12, uint32(2048)), message(12, uint32(1), uint32(1<<32-1)),
		message(14, encode("sk-ssh-ed25519@openssh.com", "blob", byte(5), uint32(7))),
		message(14, encode("", "")), message(14, uint32(1<<32-1)),
	)
}

// FuzzUpstreamAnswer reads answers as lists and as signatures. The result is within its
// bounds and has memory of its own. Written and read again, it is the same.
func FuzzUpstreamAnswer(f *testing.F) {
	seeds := upstreamSeeds(f)
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		before := bytes.Clone(answer)
		ids, listErr := parseIdentities(answer, nil)
		sig, signErr := parseSignature(answer)
		if listErr == nil && signErr == nil || listErr != nil && ids != nil || (signErr == nil) != (sig != nil) {
			t.Fatalf("identities %v, %v; signature %v, %v", ids, listErr, sig, signErr)
		}
		if !bytes.Equal(answer, before) {
			t.Fatal("the answer was changed")
		}
		for i := range answer {
			answer[i] ^= 0xff
		}
		if listErr == nil {
			checkIdentities(t, before, ids)
		}
		if signErr == nil {
			again := message(14, encode(sig.Format, sig.Blob, raw(sig.Rest)))
			if !bytes.Equal(again, before) {
				t.Errorf("signature %x became %x", before, again)
			}
		}
	})
}

func checkIdentities(t *testing.T, answer []byte, ids []agent.Identity) {
	t.Helper()
	if n := binary.BigEndian.Uint32(answer[1:]); n > maxIdentities || len(ids) > int(n) {
		t.Errorf("%d identities of %d", len(ids), n)
	}
	var fields []any
	for _, id := range ids {
		bad := func(r rune) bool { return unicode.IsControl(r) || !unicode.IsPrint(r) }
		if len(id.Comment) > maxUpstreamComment || !utf8.ValidString(id.Comment) || strings.ContainsFunc(id.Comment, bad) {
			t.Errorf("comment %q", id.Comment)
		}
		wire := id.Key.Marshal()
		if !bytes.Contains(answer, wire) {
			t.Errorf("key %x is not in %x", wire, answer)
		}
		fields = append(fields, wire, id.Comment)
	}
	again, err := parseIdentities(identitiesAnswer(fields...), nil)
	same := func(a, b agent.Identity) bool {
		return a.Comment == b.Comment && bytes.Equal(a.Key.Marshal(), b.Key.Marshal())
	}
	if err != nil || !slices.EqualFunc(ids, again, same) {
		t.Errorf("%v became %v, %v", ids, again, err)
	}
}
