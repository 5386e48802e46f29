package token_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/known"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// knownStore opens a Store on a Fake. The Store remembers keys in a directory.
func knownStore(t *testing.T, f *tokentest.Fake, p *tokentest.Person, dir string) *token.Store {
	t.Helper()
	return tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: p, StateDir: dir, Known: token.KnownKept,
	}, rightPIN)
}

// untilWritten waits until the list has the text, or lacks it if has is false.
func untilWritten(t *testing.T, dir, text string, has bool) {
	t.Helper()
	tokentest.Until(t, "the list of known keys is written", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, known.File))
		return err == nil && strings.Contains(string(b), text) == has
	})
}

func uris(keys []*token.Key) (all []string) {
	for _, k := range keys {
		all = append(all, k.URI())
	}
	return all
}

// After a restart, the Store lists the keys before the module has answered. The first signature
// waits for the module.
func TestKnownKeysAreListedAtOnce(t *testing.T) {
	dir := tokentest.TempDir(t)
	f := tokentest.NewFake(t)
	card := f.AddToken("card", rightPIN)
	card.AddKey(tokentest.P256, 1, "one", nil)
	card.AddKey(tokentest.RSA2048, 2, "two", func(k *tokentest.FakeKey) { k.Always = true })
	card.AddKey(tokentest.Ed25519, 3, "three", func(k *tokentest.FakeKey) { k.NoSign = true })
	p := &tokentest.Person{Always: rightPIN}
	s := knownStore(t, f, p, dir)
	for _, id := range []byte{1, 2} { // from the login on, the agent knows a key that shows only after a login
		if err := tokentest.Sign(t.Context(), tokentest.Key(t, s, "card", id)); err != nil {
			t.Fatal(err)
		}
	}
	before := uris(s.Keys())
	untilWritten(t, dir, "pin_each_use", true)
	noError(t, s.Close())
	st, err := os.Stat(filepath.Join(dir, known.File))
	noError(t, err)
	want(t, "mode of the list", st.Mode().Perm(), 0o600)

	release := make(chan struct{})
	f.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type == wire.TypeSlots {
			<-release
		}
		return false
	})
	s = token.Open(token.Options{ // tokentest.Store waits for the module
		Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, PINs: p, StateDir: dir, Known: token.KnownKept,
		Log: slog.New(slog.DiscardHandler),
	})
	defer s.Close()
	if after := uris(s.Keys()); !slices.Equal(after, before) {
		t.Errorf("listed %q, was %q", after, before)
	}
	select {
	case <-s.Settled():
		t.Error("the module was looked at already")
	default:
	}
	want(t, "the token needs a login", s.Modules()[0].Tokens[0].Flags&wire.CKFLoginRequired != 0, true)
	keys := s.Keys()
	want(t, "asks each time", keys[1].AlwaysAuthenticate(), true)
	if keys[2].Unfit() == "" {
		t.Error("it is not known any more that the key is not for signing")
	}
	signed := make(chan error)
	go func() { signed <- tokentest.Sign(t.Context(), keys[0]) }()
	close(release)
	noError(t, <-signed)
	tokentest.Wait(t, s.Settled())
	if after := uris(s.Keys()); !slices.Equal(after, before) {
		t.Errorf("after the look %q, was %q", after, before)
	}
	want(t, "insertions", s.Keys()[0].Insertions(), uint64(0))
}

func TestKnownKeysOfAbsentTokens(t *testing.T) {
	dir := tokentest.TempDir(t)
	f := tokentest.NewFake(t)
	card := f.AddToken("card", rightPIN)
	card.AddKey(tokentest.P256, 1, "one", nil)
	f.AddToken("other", rightPIN).AddKey(tokentest.P256, 1, "one", nil)
	p := &tokentest.Person{Always: rightPIN}
	s := knownStore(t, f, p, dir)
	tokentest.Keys(t, s, 2)
	k := tokentest.Key(t, s, "card", 1)
	card.Remove()
	tokentest.Keys(t, s, 1)
	away := s.Away()
	want(t, "keys away", len(away), 1)
	want(t, "key away", away[0], k)
	want(t, "present", k.Present(), false)
	st := s.Modules()[0]
	if len(st.Away) != 1 || st.Away[0].ID.Label != "card" || time.Since(st.Away[0].Seen) > time.Minute {
		t.Errorf("status of what is away: %+v", st.Away)
	}
	untilWritten(t, dir, `"there": false`, true)
	noError(t, s.Close())

	s = knownStore(t, f, p, dir)
	tokentest.Wait(t, s.Settled())
	want(t, "keys", len(s.Keys()), 1)
	want(t, "keys away", len(s.Away()), 1)
	want(t, "the key", s.Away()[0].URI(), k.URI())
	err := tokentest.Sign(t.Context(), s.Away()[0])
	if !errors.Is(err, token.ErrAbsent) || !strings.Contains(err.Error(), `insert token "card" (serial `) {
		t.Errorf("a signature with it: %v", err)
	}
	want(t, "prompts", p.Prompts(), 0)
	k = s.Away()[0]
	card.Insert()
	tokentest.Keys(t, s, 2)
	want(t, "keys away", len(s.Away()), 0)
	want(t, "present", k.Present(), true)
	noError(t, tokentest.Sign(t.Context(), k))
	want(t, "insertions", k.Insertions(), uint64(1))

	// The agent forgets a key that is no longer on its token.
	card.Change(1, func(k *tokentest.FakeKey) { k.NoPublic, k.NoPrivate = true, true })
	noError(t, s.Rescan(t.Context()))
	tokentest.Keys(t, s, 1)
	want(t, "keys away", len(s.Away()), 0)
	tokentest.Until(t, "the list has one key", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, known.File))
		return err == nil && strings.Count(string(b), `"public"`) == 1
	})
	// The list keeps the home of the token, because the token took a PIN through the module.
	untilWritten(t, dir, `"card"`, true)
}

// A token that left while the agent was stopped is present until the first look at its module.
func TestKnownTokenIsGone(t *testing.T) {
	dir := tokentest.TempDir(t)
	f := tokentest.NewFake(t)
	card := f.AddToken("card", rightPIN)
	card.AddKey(tokentest.P256, 1, "one", nil)
	s := knownStore(t, f, nil, dir)
	tokentest.Keys(t, s, 1)
	untilWritten(t, dir, `"card"`, true)
	noError(t, s.Close())
	card.Remove()
	s = knownStore(t, f, nil, dir)
	tokentest.Wait(t, s.Settled())
	tokentest.Keys(t, s, 0)
	want(t, "keys away", len(s.Away()), 1)
	noError(t, s.Close())

	// Without its module, the agent cannot use the token.
	s = tokentest.Store(t, token.Options{Command: self, StateDir: dir, Known: token.KnownKept})
	want(t, "keys away without the module", len(s.Away()), 0)
	noError(t, s.Close())
	// A Store that does not read the list does not know the token.
	s = tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{fakeSpec(f)}, Command: self, StateDir: dir})
	want(t, "keys away for those who ignore them", len(s.Away()), 0)
	noError(t, s.Close())
	noError(t, known.Remove(dir))
	noError(t, known.Remove(dir))
	s = knownStore(t, f, nil, dir)
	want(t, "keys away after they were forgotten", len(s.Away()), 0)
}

// The agent ignores a list that it cannot have written, and works without the list.
func TestKnownKeysBadFile(t *testing.T) {
	good := func(t *testing.T) string {
		dir := tokentest.TempDir(t)
		f := tokentest.NewFake(t)
		f.AddToken("card", rightPIN).AddKey(tokentest.P256, 1, "one", nil)
		s := knownStore(t, f, nil, dir)
		tokentest.Keys(t, s, 1)
		untilWritten(t, dir, `"card"`, true)
		noError(t, s.Close())
		return filepath.Join(dir, known.File)
	}
	rewrite := func(from, to string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			noError(t, err)
			if !strings.Contains(string(b), from) {
				t.Fatalf("there is no %s in %s", from, b)
			}
			noError(t, os.WriteFile(path, []byte(strings.Replace(string(b), from, to, 1)), 0o600))
		}
	}
	tests := []struct {
		name string
		do   func(t *testing.T, path string)
		keys int
	}{
		{"good", func(*testing.T, string) {}, 1},
		{"others could have written it", func(t *testing.T, path string) { noError(t, os.Chmod(path, 0o622)) }, 0},
		{"a link", func(t *testing.T, path string) {
			noError(t, os.Rename(path, path+"2"))
			noError(t, os.Symlink(path+"2", path))
		}, 0},
		{"a directory", func(t *testing.T, path string) {
			noError(t, os.Remove(path))
			noError(t, os.Mkdir(path, 0o700))
		}, 0},
		{"empty", func(t *testing.T, path string) { noError(t, os.Truncate(path, 0)) }, 0},
		{"too long", func(t *testing.T, path string) { noError(t, os.Truncate(path, 17<<20)) }, 0},
		{"another version", rewrite(`"version": 2`, `"version": 3`), 0},
		{"something unknown", rewrite(`"there"`, `"their"`), 0},
		{"a bad key", rewrite(`"public": "MF`, `"public": "AA`), 0},
		{"more behind its end", rewrite("\n}\n", "\n}\n{}"), 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := good(t)
			tt.do(t, path)
			f := tokentest.NewFake(t)
			s := knownStore(t, f, nil, filepath.Dir(path))
			want(t, "keys", len(s.Keys())+len(s.Away()), tt.keys)
		})
	}
}
