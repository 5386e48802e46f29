package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
)

func publicOf(t testing.TB, k request.Key) ssh.PublicKey {
	t.Helper()
	pub, err := ssh.NewPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// The token and the person who confirms get the use of the key.
func TestUse(t *testing.T) {
	key := edKey("pkcs11:token=a;id=1")
	host, other := publicOf(t, edKey("host")), publicOf(t, edKey("other"))
	caller := &request.Caller{Number: 7, Binds: []request.Bind{
		{HostKey: other, SessionID: []byte("first"), Forwarding: true},
		{HostKey: host, SessionID: []byte("second")},
	}}
	f := newFixture(Options{Rules: Rules{Name: func(request.Key) string { return "laptop" }}}, key)
	f.confirm.answer = true
	f.add(t, key.uri, request.Constraints{Confirm: true})
	for name, test := range map[string]struct {
		login *request.Login
		want  ssh.PublicKey
	}{
		"no login":                      {nil, nil},
		"by the bind":                   {&request.Login{User: "me", SessionID: []byte("second")}, host},
		"of a session for forwarding":   {&request.Login{User: "me", SessionID: []byte("first")}, nil},
		"of another session":            {&request.Login{User: "me", SessionID: []byte("third")}, nil},
		"by the request":                {&request.Login{User: "me", SessionID: []byte("third"), HostKey: other.Marshal()}, other},
		"a key that cannot be read":     {&request.Login{User: "me", SessionID: []byte("second"), HostKey: []byte("x")}, nil},
		"by the request, bound as well": {&request.Login{User: "me", SessionID: []byte("second"), HostKey: host.Marshal()}, host},
	} {
		t.Run(name, func(t *testing.T) {
			key.use, f.confirm.use = nil, nil
			if _, err := f.Sign(t.Context(), caller, request.Sign{Key: wireOf(key), Data: []byte("data"), Login: test.login}); err != nil {
				t.Fatal(err)
			}
			for who, use := range map[string]*request.Use{"the token": key.use, "who confirms": f.confirm.use} {
				if use == nil {
					t.Fatalf("%s was not told", who)
				}
				if use.Comment != "laptop" || use.Caller != caller || !reflect.DeepEqual(use.Login, test.login) || !key.Public().(ed25519.PublicKey).Equal(use.Key) {
					t.Errorf("%s was told %+v", who, use)
				}
				got := use.Where().Key
				if (got == nil) != (test.want == nil) || got != nil && string(got.Marshal()) != string(test.want.Marshal()) {
					t.Errorf("%s was told of the host %v", who, got)
				}
			}
		})
	}
	if request.UseFrom(t.Context()) != nil {
		t.Error("a use came from nowhere")
	}
}

// fakeHosts has names for some keys.
type fakeHosts map[string]request.HostName

func (f fakeHosts) HostName(key ssh.PublicKey, _ peer.Peer) request.HostName {
	return f[string(key.Marshal())]
}

// A use stays the same after the end of its request.
func TestUseIsApart(t *testing.T) {
	key := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{}, key)
	r := request.Sign{Key: wireOf(key), Data: []byte("data"), Login: &request.Login{User: "me", SessionID: []byte("session"), HostKey: []byte("host")}}
	if _, err := f.Sign(t.Context(), local, r); err != nil {
		t.Fatal(err)
	}
	clear(r.Login.SessionID)
	clear(r.Login.HostKey)
	if got := key.use.Login; string(got.SessionID) != "session" || string(got.HostKey) != "host" {
		t.Errorf("it has changed with the request's memory: %+v", got)
	}
}

// A prompt gets the client of the request, and learns whether the request was forwarded.
func TestCallerGoesAlong(t *testing.T) {
	key := edKey("pkcs11:token=a;id=1")
	f := newFixture(Options{RemoteTokens: true}, key)
	f.confirm.answer = true
	for _, caller := range []*request.Caller{local, forwarded} {
		if err := f.AddToken(t.Context(), caller, request.Token{Provider: []byte(key.uri), Constraints: request.Constraints{Confirm: true}}); err != nil {
			t.Fatal(err)
		}
		if f.tokens.caller != caller {
			t.Errorf("the tokens were told of %+v", f.tokens.caller)
		}
		if _, err := f.Sign(t.Context(), caller, request.Sign{Key: wireOf(key), Data: []byte("data")}); err != nil {
			t.Fatal(err)
		}
		if f.confirm.caller != caller || key.caller != caller {
			t.Errorf("who confirms was told of %+v, and the key of %+v", f.confirm.caller, key.caller)
		}
	}
	if request.CallerFrom(t.Context()) != nil || request.PeerFrom(t.Context()).Known {
		t.Error("a caller came from nowhere")
	}
	if p := request.PeerFrom(forwarded.Context(t.Context())); p.PID != forwarded.Peer.PID {
		t.Errorf("the caller's peer is %v", p)
	}
}

// A shared prompt names the request that has waited longest. When that request leaves, the
// prompt names the next.
func TestInsertMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := edKey("pkcs11:token=a;id=%01")
		asked := make(chan *request.Caller, 10)
		in := &fakeInserter{answer: func(ctx context.Context, _ int) (bool, error) {
			asked <- request.CallerFrom(ctx)
			<-ctx.Done()
			return false, ctx.Err()
		}}
		f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: in, RemoteTokens: true})
		f.tokens.setAway(nil, []request.Key{key})
		done := make(chan error, 2)
		sign := func(c *request.Caller) func() {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				_, err := f.Sign(ctx, c, request.Sign{Key: wireOf(key), Data: []byte("data")})
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
		f.tokens.setAway([]request.Key{key}, nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
