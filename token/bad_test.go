package token_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/procstat"
	"p11-agent/token"
	"p11-agent/token/retention"
	"p11-agent/token/tokentest"
)

// A badModule is SoftHSM behind a module that misbehaves on command. Its token has one key.
type badModule struct {
	t    *testing.T
	spec token.ModuleSpec
	dir  string
}

// newBad makes a badModule. name is the name of the module and of its token. hsm has one token
// with one key. Several modules may show this token.
func newBad(t *testing.T, library string, hsm *tokentest.SoftHSM, name string) *badModule {
	t.Helper()
	b := &badModule{t: t, dir: tokentest.TempDir(t)}
	env := append(hsm.Env(), tokentest.BadModuleEnv("", filepath.Join(b.dir, "commands"), filepath.Join(b.dir, "log"))...)
	b.spec = realSpec(name, library, append(env, "BADMODULE_WRAP="+hsm.Module())...)
	b.command("")
	return b
}

// command gives the module other commands.
func (b *badModule) command(commands string) {
	b.t.Helper()
	file := filepath.Join(b.dir, "commands")
	noError(b.t, os.WriteFile(file+".new", []byte("label="+b.spec.Name+" "+commands), 0o600))
	noError(b.t, os.Rename(file+".new", file))
}

// calls counts the calls of a function.
func (b *badModule) calls(function string) int {
	b.t.Helper()
	log, err := os.ReadFile(filepath.Join(b.dir, "log"))
	noError(b.t, err)
	return strings.Count(string(log), function+"\n")
}

// newHSM returns a SoftHSM with a token that has the key 1.
func newHSM(t *testing.T, label string) *tokentest.SoftHSM {
	t.Helper()
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken(label, tokentest.PIN)
	hsm.GenerateKey(label, tokentest.P256, "01", "key")
	return hsm
}

// status returns the state of a module.
func status(s *token.Store, name string) token.ModuleStatus {
	all := s.Modules()
	return all[slices.IndexFunc(all, func(m token.ModuleStatus) bool { return m.Name == name })]
}

// has reports whether the Store lists the keys of a token.
func has(s *token.Store, label string) bool {
	return slices.ContainsFunc(s.Keys(), func(k *token.Key) bool { return k.Token().Label == label })
}

// calledHere returns the functions of PKCS#11 that the module process calls when the agent uses
// keys. TestNewTokenFails tests the two functions that make tokens.
func calledHere(t *testing.T) []string {
	t.Helper()
	source, err := os.ReadFile("module/library.go")
	noError(t, err)
	all := regexp.MustCompile(`"(C_[A-Za-z]+)"`).FindAllStringSubmatch(string(source), -1)
	functions := []string{"C_GetFunctionList"}
	for _, m := range all {
		functions = append(functions, m[1])
	}
	functions = slices.DeleteFunc(functions, func(f string) bool { return f == "C_InitToken" || f == "C_InitPIN" })
	slices.Sort(functions)
	return slices.Compact(functions)
}

// For each function that the module process calls, there is a module that crashes in it, exits
// in it or hangs in it. All modules run at once. The good module signs all the time, and the
// Store lists its keys. The agent ends each bad process, starts it again, and reports the
// failure. When the modules work again, their keys sign.
func TestEveryCall(t *testing.T) {
	tokentest.Parallel(t)
	library := tokentest.BuildBadModule(t)
	functions := calledHere(t)
	if len(functions) < 20 {
		t.Fatalf("only %d functions are called: %v", len(functions), functions)
	}
	good, hsm := newHSM(t, "good"), newHSM(t, "bad")
	hsm.GenerateKey("bad", tokentest.RSA2048, "02", "to decrypt with")
	const timeout = 3 * time.Second
	for _, tt := range []struct{ command, says string }{
		{"hang", "did not answer within " + timeout.String()},
		{"crash", "it crashed (segmentation fault)"},
		{"exit", "exit status 3"},
	} {
		t.Run(tt.command, func(t *testing.T) {
			specs := []token.ModuleSpec{realSpec("good", good.Module(), good.Env()...)}
			var bad []*badModule
			for _, f := range functions {
				b := newBad(t, library, hsm, f)
				b.spec.Timeout = timeout
				bad = append(bad, b)
				specs = append(specs, b.spec)
			}
			s := tokentest.Store(t, token.Options{
				Modules: specs, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
				Policy: func(k *token.Key) token.Policy {
					return token.Policy{Retention: retention.Rule{Never: k.Token().Label == "C_Logout"}}
				},
			}, tokentest.PIN)
			key := tokentest.Key(t, s, "good", 1)
			keys, decrypting := make(map[string]*token.Key), make(map[string]*token.Key)
			for _, f := range functions {
				keys[f], decrypting[f] = tokentest.Key(t, s, f, 1), tokentest.Key(t, s, f, 2)
			}

			// Clients use the good module and the bad modules. The errors of the bad modules do
			// not matter yet.
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var users sync.WaitGroup
			var signed atomic.Int64
			users.Go(func() {
				for ctx.Err() == nil {
					if err := tokentest.Sign(t.Context(), key); err != nil {
						t.Errorf("the good module: %v", err)
					}
					if !has(s, "good") {
						t.Error("the good module's key is not listed")
					}
					signed.Add(1)
				}
			})
			users.Go(func() {
				for ctx.Err() == nil {
					_ = s.Rescan(ctx)
				}
			})
			for _, b := range bad {
				b.command(tt.command + "=" + b.spec.Name)
				if pid := status(s, b.spec.Name).PID; pid != 0 {
					// A new process is to start. The old process may have ended just now, on command.
					if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
						t.Error(err)
					}
				}
				var use func() error
				switch f := b.spec.Name; f {
				case "C_Login", "C_Logout", "C_SignInit", "C_Sign":
					use = func() error { return tokentest.Sign(ctx, keys[f]) }
				case "C_DecryptInit", "C_Decrypt":
					use = func() error { return tokentest.Decrypt(ctx, decrypting[f]) }
				case "C_DeriveKey":
					use = func() error { return tokentest.Derive(ctx, keys[f]) }
				default:
					continue
				}
				users.Go(func() {
					for ctx.Err() == nil {
						_ = use()
					}
				})
			}
			for _, b := range bad {
				if tt.command == "hang" && b.spec.Name == "C_WaitForSlotEvent" {
					continue // this function may always hang, but the process may not wait for it
				}
				tokentest.Until(t, b.spec.Name+" is said to be the matter", func() bool {
					err := status(s, b.spec.Name).Err
					return err != nil && strings.Contains(err.Error(), tt.says)
				})
			}
			now := signed.Load()
			tokentest.Until(t, "the good module signs on", func() bool { return signed.Load() > now })
			for _, b := range bad {
				b.command("")
			}
			cancel()
			users.Wait()
			want(t, "restarts of the good module", status(s, "good").Restarts, 0)
			for _, b := range bad {
				tokentest.Until(t, b.spec.Name+" is well again", func() bool {
					_ = s.Rescan(t.Context()) // ends the pause
					return tokentest.Sign(t.Context(), keys[b.spec.Name]) == nil
				})
			}
		})
	}
}

// TestBadModules tests other ways in which a module can misbehave.
func TestBadModules(t *testing.T) {
	tokentest.Parallel(t)
	library := tokentest.BuildBadModule(t)
	good, hsm := newHSM(t, "good"), newHSM(t, "bad")
	const timeout = 2 * time.Second
	signsOnce := func(t *testing.T, err error, _ *token.Store, _ *badModule) { noError(t, err) }
	wrong := func(text string) func(*testing.T, error, *token.Store, *badModule) {
		return func(t *testing.T, err error, _ *token.Store, _ *badModule) {
			if err == nil || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), `"bad"`) {
				t.Errorf("got %v", err)
			}
		}
	}
	for _, tt := range []struct {
		commands string
		check    func(t *testing.T, err error, s *token.Store, b *badModule) // checks the outcome of the first signature
	}{
		{"signature=wrong", wrong("the token gave a wrong signature")},
		{"signature=long", wrong("the result has")},
		{"signature=empty", wrong("the result has")},
		{"mechanisms=lie", func(t *testing.T, err error, _ *token.Store, b *badModule) {
			noError(t, err)
			want(t, "calls of C_SignInit", b.calls("C_SignInit"), 2) // with the mechanism that is listed, and with the one that works
		}},
		{"sign-room=72", signsOnce}, // for the 64 bytes of a key of P-256
		{"spam", signsOnce},
		{"fork", signsOnce},
		{"flip=C_Sign", signsOnce},
		{"flip=C_SignInit", signsOnce},
		{"flip=C_OpenSession", signsOnce},
		{"flip=C_GetSlotList", nil},
		{"flip=C_GetTokenInfo", nil},
		{"flip=C_GetAttributeValue", nil},
		{"flip=C_FindObjects", nil},
		{"close=C_Sign", func(t *testing.T, _ error, s *token.Store, _ *badModule) {
			tokentest.Until(t, "the process is replaced", func() bool { return status(s, "bad").Restarts > 0 })
		}},
		{"stubborn hang=C_Sign", func(t *testing.T, err error, s *token.Store, _ *badModule) {
			if err == nil || !strings.Contains(err.Error(), "did not answer within 2s") {
				t.Errorf("got %v", err)
			}
			tokentest.Until(t, "the process is replaced", func() bool { return status(s, "bad").Restarts > 0 })
		}},
	} {
		t.Run(tt.commands, func(t *testing.T) {
			b := newBad(t, library, hsm, "bad")
			b.spec.Timeout = timeout
			if strings.HasPrefix(tt.commands, "mechanisms") {
				b.command(tt.commands) // the agent asks for it once for each process
			}
			s := tokentest.Store(t, token.Options{
				Modules: []token.ModuleSpec{b.spec, realSpec("good", good.Module(), good.Env()...)},
				Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
			}, tokentest.PIN)
			bad, other := tokentest.Key(t, s, "bad", 1), tokentest.Key(t, s, "good", 1)
			b.command(tt.commands)
			first := make(chan error, 1)
			go func() { first <- tokentest.Sign(t.Context(), bad) }()
			for range 20 {
				noError(t, tokentest.Sign(t.Context(), other))
				if !has(s, "good") {
					t.Error("the good key is not listed")
				}
			}
			err := <-first
			if tt.check != nil {
				tt.check(t, err, s, b)
			}
			// From now on, the module answers with a signature or with an error.
			for range 20 {
				if strings.Contains(tt.commands, "C_Sign") && status(s, "bad").Restarts > 0 {
					break // each signature takes long
				}
				_ = tokentest.Sign(t.Context(), bad)
				_ = s.Rescan(t.Context())
			}
			b.command("")
			tokentest.Until(t, "it is well again", func() bool {
				_ = s.Rescan(t.Context())
				return tokentest.Sign(t.Context(), bad) == nil
			})
			want(t, "restarts of the good module", status(s, "good").Restarts, 0)
			noError(t, tokentest.Sign(t.Context(), other))
		})
	}
}

// A module does not close the sessions that it is told to close, and runs out of sessions. Then
// the agent starts a new process.
func TestLeakedSessions(t *testing.T) {
	tokentest.Parallel(t)
	hsm := newHSM(t, "bad")
	b := newBad(t, tokentest.BuildBadModule(t), hsm, "bad")
	b.command("leak limit=5")
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
	}, tokentest.PIN)
	k := tokentest.Key(t, s, "bad", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	b.command("leak limit=5 rv=C_Sign:0x5b") // each failure makes the process give up a session
	for range 10 {
		if err := tokentest.Sign(t.Context(), k); err == nil {
			t.Fatal("it signs")
		}
	}
	b.command("leak limit=5")
	noError(t, tokentest.Sign(t.Context(), k))
	if n := status(s, "bad").Restarts; n == 0 {
		t.Error("it is the same process still")
	}
}

// A module does not destroy the key object with a derived secret. Then the process closes the session, which destroys
// the object.
func TestDerivedSecretStays(t *testing.T) {
	tokentest.Parallel(t)
	hsm := newHSM(t, "bad")
	b := newBad(t, tokentest.BuildBadModule(t), hsm, "bad")
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{b.spec}, Command: self, PINs: &tokentest.Person{Always: tokentest.PIN},
	}, tokentest.PIN)
	k := tokentest.Key(t, s, "bad", 1)
	noError(t, tokentest.Derive(t.Context(), k))
	noError(t, tokentest.Sign(t.Context(), k))
	before := b.calls("C_CloseSession")
	b.command("undestroyable")
	noError(t, tokentest.Derive(t.Context(), k)) // twice
	b.command("")
	noError(t, tokentest.Derive(t.Context(), k))
	want(t, "sessions closed", b.calls("C_CloseSession")-before, 2)
	want(t, "restarts", status(s, "bad").Restarts, 0)
}

// The children of a module process end with the process, in each way that it can end.
func TestChildrenEnd(t *testing.T) {
	hsm := newHSM(t, "bad")
	library := tokentest.BuildBadModule(t)
	for _, how := range []string{"killed", "crash", "closed"} {
		t.Run(how, func(t *testing.T) {
			b := newBad(t, library, hsm, "bad")
			b.command("fork")
			s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{b.spec}, Command: self})
			tokentest.Until(t, "the module runs", func() bool { return status(s, "bad").Running })
			group := status(s, "bad").PID
			if n := inGroup(t, group); n != 2 {
				t.Fatalf("%d processes are there, want the module's and its child", n)
			}
			b.command("")
			switch how {
			case "killed":
				noError(t, unix.Kill(group, unix.SIGKILL))
			case "crash":
				b.command("crash=C_GetSlotList")
			case "closed":
				noError(t, s.Close())
			}
			tokentest.Until(t, "all of them are gone", func() bool { return inGroup(t, group) == 0 })
		})
	}
}

// inGroup counts the running processes of a group.
func inGroup(t *testing.T, group int) (n int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	noError(t, err)
	for _, dir := range all {
		pid, err := strconv.Atoi(filepath.Base(dir))
		noError(t, err)
		if s, ok := procstat.Of(pid); ok && s.Group == group && s.State != 'Z' {
			n++
		}
	}
	return n
}
