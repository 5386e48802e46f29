package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"golang.org/x/crypto/ssh"

	"p11-agent/pinentry/waiting"
)

func publicOf(t *testing.T, k Key) ssh.PublicKey {
	t.Helper()
	pub, err := ssh.NewPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// A token, and a person who confirms, can be told what for.
func TestUse(t *testing.T) {
	key := edKey("pkcs11:token=a;id=1")
	host, other := publicOf(t, edKey("host")), publicOf(t, edKey("other"))
	caller := &Caller{Number: 7, Binds: []Bind{
		{HostKey: other, SessionID: []byte("first"), Forwarding: true},
		{HostKey: host, SessionID: []byte("second")},
	}}
	f := newFixture(Options{Name: func(Key) string { return "laptop" }}, key)
	f.confirm.answer = true
	f.add(t, key.uri, Constraints{Confirm: true})
	for name, test := range map[string]struct {
		login *Login
		want  ssh.PublicKey
	}{
		"no login":                      {nil, nil},
		"by the bind":                   {&Login{User: "me", SessionID: []byte("second")}, host},
		"of a session for forwarding":   {&Login{User: "me", SessionID: []byte("first")}, nil},
		"of another session":            {&Login{User: "me", SessionID: []byte("third")}, nil},
		"by the request":                {&Login{User: "me", SessionID: []byte("third"), HostKey: other.Marshal()}, other},
		"a key that cannot be read":     {&Login{User: "me", SessionID: []byte("second"), HostKey: []byte("x")}, nil},
		"by the request, bound as well": {&Login{User: "me", SessionID: []byte("second"), HostKey: host.Marshal()}, host},
	} {
		t.Run(name, func(t *testing.T) {
			key.use, f.confirm.use = nil, nil
			if _, err := f.Sign(t.Context(), caller, SignRequest{Key: wireOf(key), Data: []byte("data"), Login: test.login}); err != nil {
				t.Fatal(err)
			}
			for who, use := range map[string]*Use{"the token": key.use, "who confirms": f.confirm.use} {
				if use == nil {
					t.Fatalf("%s was not told", who)
				}
				if use.Comment != "laptop" || use.Caller != caller || use.Login != test.login || string(use.Key.Marshal()) != string(wireOf(key)) {
					t.Errorf("%s was told %+v", who, use)
				}
				got := use.Host()
				if (got == nil) != (test.want == nil) || got != nil && string(got.Marshal()) != string(test.want.Marshal()) {
					t.Errorf("%s was told of the host %v", who, got)
				}
			}
		})
	}
	if UseFromContext(t.Context()) != nil {
		t.Error("a use came from nowhere")
	}
}

// Whoever asks a person learns whose request it is, and whether it was forwarded.
func TestCallerGoesAlong(t *testing.T) {
	key := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{RemoteTokens: true}, key)
	f.confirm.answer = true
	for _, caller := range []*Caller{local, forwarded} {
		if err := f.AddToken(t.Context(), caller, TokenRequest{Provider: []byte(key.uri), Constraints: Constraints{Confirm: true}}); err != nil {
			t.Fatal(err)
		}
		if f.tokens.caller != caller {
			t.Errorf("the tokens were told of %+v", f.tokens.caller)
		}
		if _, err := f.Sign(t.Context(), caller, SignRequest{Key: wireOf(key), Data: []byte("data")}); err != nil {
			t.Fatal(err)
		}
		if f.confirm.caller != caller || key.caller != caller {
			t.Errorf("who confirms was told of %+v, and the key of %+v", f.confirm.caller, key.caller)
		}
	}
	if CallerFromContext(t.Context()) != nil {
		t.Error("a caller came from nowhere")
	}
}

// A prompt that many share is about the one who has waited longest, and moves on
// when that one leaves.
func TestInsertMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := edKey("pkcs11:token=a;id=%01")
		asked := make(chan *Caller, 10)
		in := &fakeInserter{answer: func(ctx context.Context, _ int) (bool, error) {
			err := waiting.Ask(ctx, func(ctx context.Context) error {
				asked <- CallerFromContext(ctx)
				<-ctx.Done()
				return ctx.Err()
			})
			return false, err
		}}
		f := newFixture(Options{OfferAway: always, Insert: in, RemoteTokens: true})
		f.tokens.setAway(nil, []Key{key})
		done := make(chan error, 2)
		sign := func(c *Caller) func() {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				_, err := f.Sign(ctx, c, SignRequest{Key: wireOf(key), Data: []byte("data")})
				done <- err
			}()
			synctest.Wait()
			return cancel
		}
		hangUp := sign(local)
		defer sign(forwarded)()
		if c := <-asked; c != local || len(asked) > 0 {
			t.Errorf("asked %+v first", c)
		}
		hangUp()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if c := <-asked; c != forwarded {
			t.Errorf("asked %+v then", c)
		}
		f.tokens.setAway([]Key{key}, nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
