package token_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/bounds"
	"p11-agent/token/known"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// Two tokens have one label. One token has refused or taken a PIN of the configuration. The agent
// does not try this PIN on the other token, not even after a restart of the agent.
func TestAttack06OtherToken(t *testing.T) {
	for _, text := range []string{"wrong", rightPIN} {
		t.Run(text, func(t *testing.T) {
			state := tokentest.TempDir(t)
			uri := "pkcs11:token=card?pin-value=" + text
			var other *tokentest.FakeToken
			b := newBench(t, nil, func(b *bench, opts *token.Options) {
				opts.StateDir, opts.Sources = state, []*pkcs11uri.URI{parse(t, uri)}
				other = b.fake.AddToken("card", "Other-9153")
				other.AddKey(tokentest.P256, 2, "two", nil)
			})
			// While both tokens are present, neither gets the PIN.
			for _, id := range []byte{1, 2} {
				err := tokentest.Sign(t.Context(), b.key(id))
				if err == nil || !strings.Contains(err.Error(), "names 2 present tokens") {
					t.Errorf("got %v", err)
				}
			}
			want(t, "PINs tried", tried(b.card)+tried(other), 0)
			other.Remove()
			tokentest.Keys(t, b.store, 1)
			want(t, "signed", b.sign() == nil, text == rightPIN)
			want(t, "PINs tried", tried(b.card), 1)
			b.card.Remove()
			other.Insert()
			tokentest.Until(t, "the other is there", func() bool { return len(b.store.Keys()) == 1 && b.store.Keys()[0].ID()[0] == 2 })
			for range 2 {
				if err := tokentest.Sign(t.Context(), b.key(2)); err == nil || !strings.Contains(err.Error(), "since its first use") {
					t.Errorf("got %v", err)
				}
			}
			want(t, "PINs tried on the other", tried(other), 0)
			noError(t, b.store.Close())
			b.store = tokentest.Store(t, token.Options{
				Modules: []token.ModuleSpec{fakeSpec(b.fake)}, Command: self, StateDir: state, Sources: []*pkcs11uri.URI{parse(t, uri)},
			})
			if err := tokentest.Sign(t.Context(), b.key(2)); err == nil || !strings.Contains(err.Error(), "since its first use") {
				t.Errorf("after a restart: got %v", err)
			}
			want(t, "PINs tried on the other", tried(other), 0)
			st, err := os.Stat(filepath.Join(state, "pin-bindings"))
			noError(t, err)
			want(t, "mode", st.Mode().Perm(), 0o600)
			text, err := os.ReadFile(filepath.Join(state, "pin-bindings"))
			noError(t, err)
			if bytes.Contains(text, []byte("pin-value")) {
				t.Errorf("the file tells where the PIN is: %s", text)
			}
			// If the agent cannot read the file, it uses no PIN: the PIN may be for any token.
			noError(t, os.WriteFile(filepath.Join(state, "pin-bindings"), []byte("{"), 0o600))
			if err := tokentest.Sign(t.Context(), b.key(2)); err == nil || !strings.Contains(err.Error(), "remove the file") {
				t.Errorf("with a broken file: got %v", err)
			}
			want(t, "PINs tried on the other", tried(other), 0)
		})
	}
}

// A URI of the configuration that names no token gives no PIN, even if the check of the
// configuration has accepted the URI.
func TestAttack06NoToken(t *testing.T) {
	for _, uri := range []string{"pkcs11:?pin-value=" + rightPIN, "pkcs11:token=?pin-value=" + rightPIN, "pkcs11:model=fake;id=%01?pin-value=" + rightPIN, "pkcs11:slot-id=0?pin-value=" + rightPIN} {
		if pin.CheckURI(parse(t, uri)) == nil {
			t.Errorf("%v passes", parse(t, uri))
		}
		b := newBench(t, nil, func(b *bench, opts *token.Options) {
			b.card.Mute = true
			withSource(t, uri)(b, opts)
		})
		if b.sign() == nil {
			t.Errorf("%v gives a PIN", parse(t, uri))
		}
		want(t, "PINs tried", tried(b.card), 0)
		if b.store.AddSource(parse(t, uri), b.store.Keys()) == nil {
			t.Errorf("a client can add %v", parse(t, uri))
		}
	}
}

// A client cannot make the agent try the PIN file of one token on another token.
func TestAttack06OthersFile(t *testing.T) {
	path := filepath.Join(tokentest.TempDir(t), "pin")
	write(t, path, "Other-9153", 0o600)
	noError(t, os.Symlink(path, path+"2"))
	b := newBench(t, nil, withSource(t, "pkcs11:token=other?pin-source=file:"+escape(path)))
	for _, name := range []string{path, path + "2"} {
		u := parse(t, "pkcs11:token=card?pin-source=file:"+escape(name))
		noError(t, b.store.AddSource(u, b.store.Keys()))
		if err := b.sign(); err == nil || !strings.Contains(err.Error(), "is for another token") {
			t.Errorf("got %v", err)
		}
		b.store.RemoveSource(u)
	}
	want(t, "PINs tried", tried(b.card), 0)
}

// records counts the lines of the log.
type records struct {
	mu    sync.Mutex
	lines int
	text  []byte
}

// String returns the last lines.
func (r *records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.text[max(0, len(r.text)-4000):])
}

func (r *records) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines += bytes.Count(b, []byte("\n"))
	r.text = append(r.text, b...)
	return len(b), nil
}

// A module shows 10,000 different tokens, or 2,000 with -short, 250 at a time. Bounds hold for what the agent
// remembers, logs and writes of the module. Another module loses nothing.
func TestAttack14ManyTokens(t *testing.T) {
	tokentest.Parallel(t)
	const slots = 250
	looks := 40
	if testing.Short() {
		looks = 8 // which is still eight times bounds.MaxTokens
	}
	dir := tokentest.TempDir(t)
	commands := filepath.Join(dir, "commands")
	epoch := func(n int) {
		text := fmt.Sprintf("slots=%d epoch=%d", slots, n)
		noError(t, os.WriteFile(commands+".new", []byte(text), 0o600))
		noError(t, os.Rename(commands+".new", commands))
	}
	epoch(0)
	f := tokentest.NewFake(t)
	f.AddToken("there", rightPIN).AddKey(tokentest.P256, 1, "one", nil)
	away := f.AddToken("away", rightPIN)
	away.AddKey(tokentest.P256, 1, "one", nil)
	var log records
	s := token.Open(token.Options{
		Modules: []token.ModuleSpec{
			realSpec("liar", tokentest.BuildBadModule(t), tokentest.BadModuleEnv("", commands, "")...), fakeSpec(f),
		},
		Command: self, PINs: &tokentest.Person{Always: rightPIN}, StateDir: dir, Known: token.KnownKept,
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	defer s.Close()
	tokentest.Until(t, "all keys are there", func() bool { return has(s, "there") && has(s, "away") && has(s, "lie 0 249") })
	k := tokentest.Key(t, s, "there", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	away.Remove()
	tokentest.Until(t, "a token has gone", func() bool { return len(s.Away()) == 1 })
	for n := 1; n <= looks; n++ {
		epoch(n)
		noError(t, s.Rescan(t.Context()))
		if !has(s, fmt.Sprintf("lie %d 0", n)) {
			t.Fatalf("the tokens of epoch %d are not there; the log:\n%s", n, log.String())
		}
	}
	tokens, size := token.Remembered(s, "liar")
	if tokens > bounds.MaxTokens || size.Keys > bounds.MaxKeys || size.KeyBytes > bounds.MaxKeyBytes || size.OtherBytes > bounds.MaxOtherBytes {
		t.Errorf("%d tokens and %+v are remembered", tokens, size)
	}
	devices, homes, queues := token.Shared(s, "liar")
	if most := bounds.MaxTokens + 2; devices > most || homes > most || queues > slots+1 {
		t.Errorf("%d devices, %d homes and %d queues are remembered", devices, homes, queues)
	}
	if st := status(s, "liar"); len(st.Tokens)+len(st.Away) > bounds.MaxTokens {
		t.Errorf("the status has %d tokens", len(st.Tokens)+len(st.Away))
	}
	log.mu.Lock()
	if log.lines > 20 {
		t.Errorf("%d lines are logged", log.lines)
	}
	log.mu.Unlock()
	// The other module.
	noError(t, tokentest.Sign(t.Context(), k))
	want(t, "keys away of the other module", len(status(s, "fake").Away), 1)
	noError(t, s.Close())
	list, err := os.ReadFile(filepath.Join(dir, known.File))
	noError(t, err)
	for _, label := range []string{`"there"`, `"away"`} {
		if !bytes.Contains(list, []byte(`"label": `+label)) {
			t.Errorf("token %s is not in the list any more", label)
		}
	}
	if n := bytes.Count(list, []byte(`"module": "liar"`)); n > bounds.MaxTokens {
		t.Errorf("%d tokens of the liar are in the list", n)
	}
}

// A module asks for a new process again and again. The agent limits the pace of new processes.
func TestAttack14RenewedWithoutEnd(t *testing.T) {
	liar := tokentest.NewFake(t)
	liar.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeSlots {
			p.Lose(&wire.Error{Reason: wire.ReasonRenew})
		}
		return r.Type == wire.TypeSlots
	})
	began := time.Now()
	b := newBench(t, &tokentest.Person{Always: rightPIN}, func(_ *bench, opts *token.Options) {
		spec := fakeSpec(liar)
		spec.Name = "liar"
		opts.Modules = append(opts.Modules, spec)
	})
	b.mustSign()
	tokentest.Until(t, "it has had all that it may have at once", func() bool { return liar.Started() > token.RenewBurst+2 })
	n := liar.Started()
	if most := token.RenewBurst + int(time.Since(began)/token.RenewEvery) + 2; n > most {
		t.Errorf("%d processes were started, and %d are the most for that time", n, most)
	}
	b.mustSign()
}

// The agent stops a module process that reports events without end.
func TestAttack14EventsWithoutEnd(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, nil)
	b.key(1)
	tokentest.Until(t, "the process is replaced", func() bool {
		for range 200 {
			b.card.Insert()
		}
		return b.store.Modules()[0].Restarts > 0
	})
	b.mustSign()
}
