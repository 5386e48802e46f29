package token_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// escape escapes a path, or another text, for a URI.
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

func parse(t testing.TB, text string) *pkcs11uri.URI {
	t.Helper()
	u, err := pkcs11uri.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// withSource makes a URI the configured source.
func withSource(t *testing.T, text string) func(b *bench, opts *token.Options) {
	return func(_ *bench, opts *token.Options) { opts.Sources = []*pkcs11uri.URI{parse(t, text)} }
}

func write(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestPINFile(t *testing.T) {
	regular := func(text string, mode os.FileMode) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			t.Helper()
			write(t, path, text, mode)
		}
	}
	tests := []struct {
		name string
		make func(t *testing.T, path string)
		err  string // empty: the URI is right
	}{
		{"without a newline", regular(rightPIN, 0o600), ""},
		{"with a newline", regular(rightPIN+"\n", 0o600), ""},
		{"with CR LF", regular(rightPIN+"\r\n", 0o600), ""},
		{"only to be read", regular(rightPIN+"\n", 0o400), ""},
		{"through a link", func(t *testing.T, path string) {
			write(t, path+".real", rightPIN, 0o600)
			if err := os.Symlink(path+".real", path); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"missing", func(*testing.T, string) {}, "no such file"},
		{"empty", regular("", 0o600), "is empty"},
		{"only a newline", regular("\n", 0o600), "is empty"},
		{"two lines", regular(rightPIN+"\nmore\n", 0o600), "more than one line"},
		{"a zero byte", regular(rightPIN+"\x00", 0o600), "more than one line"},
		{"too long", regular(strings.Repeat("9", wire.MaxPIN+1), 0o600), "longer than a PIN"},
		{"far too long", regular(strings.Repeat("9", 1<<20), 0o600), "longer than a PIN"},
		{"readable by the group", regular(rightPIN, 0o640), "chmod 600"},
		{"readable by the world", regular(rightPIN, 0o604), "chmod 600"},
		{"writable by the world", regular(rightPIN, 0o602), "chmod 600"},
		{"of another user", func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				if os.Getenv("CI") == "true" {
					t.Fatal("this needs root, which CI has to provide")
				}
				t.Skip("only root can give files away")
			}
			write(t, path, rightPIN, 0o600)
			if err := os.Chown(path, 12345, 0); err != nil {
				t.Fatal(err)
			}
		}, "belongs to user 12345"},
		{"a FIFO", func(t *testing.T, path string) {
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
		{"a directory", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(tokentest.TempDir(t), "pin")
			tt.make(t, path)
			uri := "pkcs11:token=card?pin-source=file:" + escape(path)
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, withSource(t, uri))
			err := b.sign()
			check := pin.CheckSource(parse(t, uri))
			for what, err := range map[string]error{"use": err, "check": check} {
				switch {
				case tt.err == "" && err != nil:
					t.Errorf("%s: %v", what, err)
				case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
					t.Errorf("%s: %v, want %q", what, err, tt.err)
				case err != nil && strings.Contains(err.Error(), rightPIN):
					t.Errorf("%s: the error quotes the PIN", what)
				}
			}
			want(t, "prompts", p.Prompts(), 0)
			want(t, "wrong PINs", b.card.Wrong(), 0)
		})
	}
}

func TestOtherSources(t *testing.T) {
	credentials := tokentest.TempDir(t)
	write(t, filepath.Join(credentials, "card"), rightPIN, 0o400)
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	tests := []struct {
		name string
		uri  string
		err  string
	}{
		{"value", "pkcs11:token=card?pin-value=" + rightPIN, ""},
		{"value for another token", "pkcs11:token=other?pin-value=wrong", "no way to ask a person"},
		{"empty value", "pkcs11:token=card?pin-value=", "pin-value is empty"},
		{"command", "pkcs11:token=card?pin-source=" + escape("|/bin/echo "+rightPIN), ""},
		{"credential", "pkcs11:token=card?pin-source=credential:card", ""},
		{"credential that is not there", "pkcs11:token=card?pin-source=credential:other", "no such file"},
		{"command that fails", "pkcs11:token=card?pin-source=" + escape("|/bin/echo "+rightPIN+"; exit 3"), "exit status 3"},
		{"command that prints nothing", "pkcs11:token=card?pin-source=" + escape("|/bin/true"), "is empty"},
		{"command that is not there", "pkcs11:token=card?pin-source=" + escape("|/nonexistent/program"), "exit status 127"},
		{"command that prints for ever", "pkcs11:token=card?pin-source=" + escape("|/usr/bin/yes"), "longer than a PIN"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, nil, withSource(t, tt.uri))
			err := b.sign()
			switch {
			case tt.err == "" && err != nil:
				t.Error(err)
			case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
				t.Errorf("got %v, want %q", err, tt.err)
			}
			want(t, "wrong PINs", b.card.Wrong(), 0)
		})
	}
}

// systemd gives a special mode to a credential of a service that has its own user. A credential
// may have this mode, and no other file may.
func TestModesOfCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("only root's files are like credentials of systemd")
	}
	dir := tokentest.TempDir(t)
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for _, tt := range []struct {
		name  string
		mode  os.FileMode
		group int
		err   string
	}{
		{"closed", 0o400, 0, ""},
		{"by an access control list", 0o440, 0, ""},
		{"for a group", 0o440, 1, "can be read or changed by others"},
		{"changed by a group", 0o460, 0, "can be read or changed by others"},
		{"for all", 0o444, 0, "can be read or changed by others"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "pin")
			os.Remove(path)
			write(t, path, rightPIN, tt.mode)
			if err := os.Chown(path, 0, tt.group); err != nil {
				t.Fatal(err)
			}
			uri := "pkcs11:token=card?pin-source=credential:pin"
			b := newBench(t, nil, withSource(t, uri))
			for what, err := range map[string]error{"use": b.sign(), "check": pin.CheckSource(parse(t, uri))} {
				if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%s: %v, want %q", what, err, tt.err)
				}
			}
			if err := pin.CheckSource(parse(t, "pkcs11:token=card?pin-source=file:"+escape(path))); tt.mode != 0o400 && err == nil {
				t.Errorf("as any file it is believed with mode %#o", tt.mode)
			}
		})
	}
}

// When a client hangs up, the agent ends the command.
func TestPINCommandIsStopped(t *testing.T) {
	fifo := filepath.Join(tokentest.TempDir(t), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// The command reports that it runs, and then waits for ever for its child.
	b := newBench(t, nil, withSource(t, "pkcs11:token=card?pin-source="+escape("|/bin/echo started >"+fifo+"; /bin/sleep 1000 & wait")))
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- tokentest.Sign(ctx, b.key(1)) }()
	if got, err := os.ReadFile(fifo); err != nil || string(got) != "started\n" {
		t.Fatal(string(got), err)
	}
	cancel()
	want(t, "cancelled", errors.Is(<-end, context.Canceled), true)
}

// The agent tries a wrong PIN of the configuration once, until the PIN changes.
func TestWrongSourceIsTriedOnce(t *testing.T) {
	dir := tokentest.TempDir(t)
	path := filepath.Join(dir, "pin")
	write(t, path, "wrong", 0o600)
	tests := []struct {
		name    string
		uri     string
		restart bool // the agent restarts, and must remember the refusal
		change  func(b *bench)
	}{
		{"file", "pkcs11:token=card?pin-source=file:" + escape(path), true, func(*bench) {
			write(t, path, rightPIN, 0o600)
		}},
		{"value", "pkcs11:token=card?pin-value=wrong", false, func(b *bench) {
			b.store.SetSources([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?pin-value="+rightPIN)})
		}},
		{"the same value once more", "pkcs11:token=card?pin-value=wrong", false, func(b *bench) {
			b.store.SetSources([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?pin-value=wrong")})
			pinError(t, b.sign(), false, pin.TriesLow)
			want(t, "wrong PINs", b.card.Wrong(), 1)
			b.store.SetSources([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?pin-value="+rightPIN)})
		}},
		{"command", "pkcs11:token=card?pin-source=" + escape("|/bin/echo wrong"), false, func(b *bench) {
			b.store.SetSources([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?pin-source="+escape("|/bin/echo "+rightPIN))})
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			state := filepath.Join(tokentest.TempDir(t), "state")
			b := newBench(t, p, func(b *bench, opts *token.Options) {
				withSource(t, tt.uri)(b, opts)
				opts.StateDir = state
			})
			pinError(t, b.sign(), true, pin.TriesLow)
			for range 3 {
				pinError(t, b.sign(), false, pin.TriesLow)
			}
			want(t, "wrong PINs", b.card.Wrong(), 1)
			if tt.restart {
				t.Run("restart", func(t *testing.T) {
					again := tokentest.Store(t, token.Options{
						Modules: []token.ModuleSpec{fakeSpec(b.fake)}, Command: self, StateDir: state,
						Sources: []*pkcs11uri.URI{parse(t, tt.uri)},
					})
					pinError(t, tokentest.Sign(t.Context(), tokentest.Key(t, again, "card", 1)), false, pin.TriesLow)
				})
				want(t, "wrong PINs", b.card.Wrong(), 1)
				st, err := os.Stat(filepath.Join(state, "refused-pins"))
				if err != nil {
					t.Fatal(err)
				}
				want(t, "mode", st.Mode().Perm(), 0o600)
			} else if _, err := os.Stat(filepath.Join(state, "refused-pins")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something was written: %v", err)
			}
			tt.change(b)
			b.mustSign()
			want(t, "wrong PINs", b.card.Wrong(), 1)
			want(t, "prompts", p.Prompts(), 0)
		})
	}
}

func TestSourceLeavesTheLastTry(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN, Consents: true}
	b := newBench(t, p, func(b *bench, opts *token.Options) {
		withSource(t, "pkcs11:token=card?pin-value="+rightPIN)(b, opts)
		b.card.SetTries(1, 3)
	})
	pinError(t, b.sign(), false, pin.TriesLast)
	want(t, "PINs tried", b.card.Wrong()+b.card.Right(), 0)
	// The same holds if the flags change between the look at the flags and the login.
	b.card.SetTries(3, 3)
	var once sync.Once
	b.fake.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeLogin {
			once.Do(func() { b.card.SetTries(1, 3) })
		}
		return false
	})
	pinError(t, b.sign(), false, pin.TriesLast)
	want(t, "PINs tried", b.card.Wrong()+b.card.Right(), 0)
	// The token did not refuse the PIN, so the agent uses the PIN again.
	b.card.SetTries(3, 3)
	b.mustSign()
}

func TestAddedSource(t *testing.T) {
	b := newBench(t, nil, nil)
	if err := b.store.AddSource(parse(t, "pkcs11:token=card?pin-source="+escape("|/bin/echo "+rightPIN)), b.store.Keys()); err == nil {
		t.Error("a client can have a command run")
	}
	if err := b.store.AddSource(parse(t, "pkcs11:token=card?pin-source=credential:card"), b.store.Keys()); err == nil {
		t.Error("a client can use the credentials of the service")
	}
	if err := b.store.AddSource(parse(t, "pkcs11:token=card"), b.store.Keys()); err != nil {
		t.Errorf("without a PIN: %v", err)
	}
	pinError(t, b.sign(), false, pin.TriesUnknown)
	u := parse(t, "pkcs11:token=card?pin-value="+rightPIN)
	if err := b.store.AddSource(u, b.store.Keys()); err != nil {
		t.Fatal(err)
	}
	b.mustSign()
	b.store.RemoveSource(u)
	if u.PIN() != nil {
		t.Error("the PIN is still there")
	}
	if err := b.store.LogoutAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	pinError(t, b.sign(), false, pin.TriesUnknown)
}

// Sources change while signatures use them. The agent never uses a half-wiped PIN.
func TestSourceRemovedWhileUsed(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, func(b *bench, _ *token.Options) { b.card.SetTries(1000, 1000) })
	var stop atomic.Bool
	var changers sync.WaitGroup
	changers.Go(func() {
		for !stop.Load() {
			u := parse(t, "pkcs11:token=card?pin-value="+rightPIN)
			if err := b.store.AddSource(u, b.store.Keys()); err != nil {
				t.Error(err)
			}
			b.store.SetSources([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?pin-value="+rightPIN)})
			b.store.RemoveSource(u)
		}
	})
	for range 50 {
		if err := b.sign(); err != nil && !strings.Contains(err.Error(), "was just removed") {
			t.Error(err)
		}
		if err := b.store.LogoutAll(t.Context()); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	changers.Wait()
	want(t, "wrong PINs", b.card.Wrong(), 0)
}
