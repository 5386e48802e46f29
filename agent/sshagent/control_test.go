package sshagent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"p11-agent/agent/door"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/secret/secrettest"
)

func dialControl(t *testing.T, path string) *Control {
	t.Helper()
	c, err := DialControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestControl(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	c := dialControl(t, r.socket)
	if text, err := c.Status(t.Context(), "pkcs11:token=a"); err != nil || string(text) != `{"version":"1"}` {
		t.Errorf("status: %s, %v", text, err)
	}
	want := ControlAnswer{LoginAnswer: request.LoginAnswer{Already: true, Tries: request.TriesLow}}
	if a, err := c.Login(t.Context(), "pkcs11:", secrettest.Of(t, "12 34\xff")); err != nil || a != want {
		t.Errorf("login: %+v, %v", a, err)
	}
	if a, err := c.Login(t.Context(), "pkcs11:", nil); err != nil || a != want {
		t.Errorf("login: %+v, %v", a, err)
	}
	if a, err := c.Logout(t.Context(), ""); err != nil || a != (ControlAnswer{}) {
		t.Errorf("logout: %+v, %v", a, err)
	}
	for _, do := range []func(context.Context, *secret.Secret) (bool, error){c.Lock, c.Unlock} {
		if ok, err := do(t.Context(), secrettest.Of(t, "open")); !ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
	}
	var got []string
	for _, call := range keyring.noted() {
		got = append(got, fmt.Sprintf("%s %q %q", call.method, call.provider, call.pin))
	}
	if want := []string{
		`Status "pkcs11:token=a" ""`, `Login "pkcs11:" "12 34\xff"`, `Login "pkcs11:" ""`,
		`Logout "" ""`, `Lock "" "open"`, `Unlock "" "open"`,
	}; !slices.Equal(got, want) {
		t.Errorf("asked was %q", got)
	}
}

// On a socket for others the agent says nothing, not even that the extension exists. It
// does not pass such a request on either: the upstream agent would see this program as
// the client.
func TestControlOfNamedSocket(t *testing.T) {
	keyring := newKeyring()
	keyring.pass = func(message []byte) ([]byte, error) {
		t.Errorf("passed on: %q", message)
		return []byte{msgSuccess}, nil
	}
	l, err := door.Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- (&Door{Keyring: keyring}).Serve(ctx, l, &request.Socket{Name: "others"}) }()
	defer func() { stop(); <-done }()
	c := dialControl(t, l.Path())
	if _, err := c.Status(t.Context(), ""); !errors.Is(err, ErrControlRefused) {
		t.Errorf("status: %v", err)
	}
	if _, err := c.Login(t.Context(), "pkcs11:", secrettest.Of(t, "1234")); !errors.Is(err, ErrControlRefused) {
		t.Errorf("login: %v", err)
	}
	for _, bad := range [][]byte{message(msgExtension, extensionControl), message(msgExtension, extensionControl, "shutdown", "")} {
		if answer, err := c.exchange(t.Context(), bad, nil, nil); err != nil || !bytes.Equal(answer, []byte{msgExtensionFailure}) {
			t.Errorf("%q: %q, %v", bad, answer, err)
		}
	}
	answer, err := c.exchange(t.Context(), message(msgExtension, extensionQuery), nil, nil)
	if err != nil || bytes.Contains(answer, []byte(extensionControl)) {
		t.Errorf("query: %q, %v", answer, err)
	}
}

// The client sends no PIN to an agent that is not p11-agent.
func TestControlOfOtherAgents(t *testing.T) {
	for name, answers := range map[string][]byte{
		"refuses":              {0, 0, 0, 1, msgFailure},
		"says yes":             {0, 0, 0, 1, msgSuccess},
		"another extension":    framed(message(msgExtensionResponse, "query", "")),
		"cut short":            {0, 0, 0, 9, msgExtensionResponse},
		"nothing":              {0, 0, 0, 0},
		"more than there is":   {0xff, 0xff, 0xff, 0xff, msgExtensionResponse},
		"no JSON":              framed(message(msgExtensionResponse, extensionControl, "{")),
		"hangs up immediately": {},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("unix", filepath.Join(doortest.Dir(t), "s"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				var b [1024]byte
				if _, err := conn.Read(b[:]); err == nil {
					_, _ = conn.Write(answers)
				}
			}()
			c := dialControl(t, l.Addr().String())
			if text, err := c.Status(t.Context(), ""); err == nil {
				t.Errorf("status: %s", text)
			}
		})
	}
}

// When a client hangs up, its request ends.
func TestControlHangsUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l, err := net.Listen("unix", filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan error)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			var b [1024]byte
			_, err = conn.Read(b[:])
			cancel()
			for err == nil {
				_, err = conn.Read(b[:])
			}
		}
		ended <- err
	}()
	if _, err := dialControl(t, l.Addr().String()).Login(ctx, "pkcs11:", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("login: %v", err)
	}
	<-ended
}

func controlSeeds() [][]byte {
	var all [][]byte
	for _, fields := range [][]any{
		{controlStatus, ""},
		{controlStatus, "pkcs11:token=a"},
		{controlLogin, "pkcs11:", "1234", false},
		{controlLogin, "pkcs11:", "", true},
		{controlLogin, "pkcs11:"},
		{controlLogin, "pkcs11:", strings.Repeat("1", maxPIN+1), true},
		{controlLogin, "pkcs11:", "12\x0034", true},
		{controlLogout, ""},
		{controlLogout, strings.Repeat("x", maxURI+1)},
		{controlLogout, "a\x00b"},
		{"shutdown", ""},
		{},
	} {
		all = append(all, message(0, fields...)[1:])
	}
	return all
}

func TestControlRequests(t *testing.T) {
	want := []bool{true, true, true, true, false, false, false, true, false, false, false, false}
	for i, seed := range controlSeeds() {
		if _, err := parseControl(reader{rest: seed}); (err == nil) != want[i] {
			t.Errorf("%q: %v", seed, err)
		}
		if want[i] {
			if _, err := parseControl(reader{rest: append(bytes.Clone(seed), 0)}); err == nil {
				t.Errorf("%q and a byte: no error", seed)
			}
		}
	}
}

// FuzzControl checks that a request that the door understands is within bounds, and that
// the result has all of its fields.
func FuzzControl(f *testing.F) {
	for _, seed := range controlSeeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		r, err := parseControl(reader{rest: bytes.Clone(input)})
		if err != nil {
			if len(err.Error()) > 200 {
				t.Errorf("the error quotes much: %v", err)
			}
			return
		}
		if len(r.uri) > maxURI || len(r.pin) > maxPIN {
			t.Errorf("%d bytes of URI, %d of PIN", len(r.uri), len(r.pin))
		}
		again := message(0, r.what, r.uri)
		if r.what == controlLogin {
			again = message(0, r.what, r.uri, r.pin, false)
			again[len(again)-1] = input[len(input)-1] // the reserved boolean
		}
		if !bytes.Equal(again[1:], input) {
			t.Errorf("%q is read as %+v", input, r)
		}
	})
}

// The client sends no PIN to an agent of another user: that user may have put a socket
// there.
func TestControlOfOtherUser(t *testing.T) {
	const nobody = 65534
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("this needs root, to listen as another user")
	}
	dir := doortest.Dir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	listening := make(chan error)
	done := make(chan struct{})
	defer close(done)
	go func() {
		// The thread ends with this goroutine, because nothing unlocks it. The kernel
		// reports the user that the thread had when it began to listen.
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), nobody, ^uintptr(0)); errno != 0 {
			listening <- errno
			return
		}
		l, err := net.Listen("unix", path)
		listening <- err
		if err == nil {
			<-done
			l.Close()
		}
	}()
	if err := <-listening; err != nil {
		t.Fatal(err)
	}
	c, err := DialControl(t.Context(), path)
	if err == nil {
		c.Close()
		t.Fatal("connected")
	}
	if want := "the agent runs as another user (uid 65534)"; err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
