package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/waiting"
)

func publicOf(t testing.TB, k request.Key) ssh.PublicKey {
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

// What a person is told can be judged: a host is called verified only when it has
// proved to be the one that the request is for.
func TestLines(t *testing.T) {
	shared, any, many := publicOf(t, edKey("shared")), publicOf(t, edKey("any")), publicOf(t, edKey("many"))
	hub, inner, evil, gone, secret := publicOf(t, edKey("hub")), publicOf(t, edKey("inner")), publicOf(t, edKey("evil")), publicOf(t, edKey("gone")), publicOf(t, edKey("secret"))
	names := fakeHosts{
		string(hub.Marshal()):    {Names: []string{"hub.example.org", "192.0.2.1"}},
		string(inner.Marshal()):  {Names: []string{"inner.example.org"}},
		string(gone.Marshal()):   {Names: []string{"gone.example.org"}, Revoked: true},
		string(secret.Marshal()): {Hashed: true},
		string(shared.Marshal()): {Names: []string{"web1", "*.example.com"}},
		string(any.Marshal()):    {Names: []string{"*"}},
		string(many.Marshal()):   {Names: []string{"db?.example.com", "a,b", "c", "d", "e"}},
	}
	print := ssh.FingerprintLegacyMD5
	bound := func(forwarding bool, keys ...ssh.PublicKey) *request.Caller {
		c := &request.Caller{Forwarded: forwarding || len(keys) > 1}
		for i, k := range keys {
			c.Binds = append(c.Binds, request.Bind{HostKey: k, SessionID: []byte{byte(i)}, Forwarding: forwarding || i < len(keys)-1})
		}
		return c
	}
	login := func(user string, session byte, host ssh.PublicKey) *request.Login {
		l := &request.Login{User: user, SessionID: []byte{session}}
		if host != nil {
			l.HostKey = host.Marshal()
		}
		return l
	}
	local := new(request.Caller)
	for name, test := range map[string]struct {
		caller  *request.Caller
		content request.Content
		login   *request.Login
		want    []string
	}{
		"login, proved":              {bound(false, hub), request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at hub.example.org (host verified)"}},
		"login, proved and said":     {bound(false, hub), request.Content{}, login("root", 0, hub), []string{"For: SSH login as root at hub.example.org (host verified)"}},
		"login, only said":           {local, request.Content{}, login("root", 0, hub), []string{"For: SSH login as root at hub.example.org (NOT VERIFIED: only the request says so)"}},
		"login, another session":     {bound(false, hub), request.Content{}, login("root", 9, nil), []string{"For: SSH login as root at an unknown host"}},
		"login, another host":        {bound(false, evil), request.Content{}, login("root", 0, hub), []string{"For: SSH login as root at ANOTHER HOST than the one connected to, with the key " + print(hub)}},
		"login, said, no name":       {local, request.Content{}, login("root", 0, evil), []string{"For: SSH login as root at a host NOT VERIFIED, key " + print(evil)}},
		"login, no host":             {local, request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at an unknown host"}},
		"login, no name":             {bound(false, evil), request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host that is not in known_hosts, key " + print(evil)}},
		"login, hashed name":         {bound(false, secret), request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host whose name is hashed in known_hosts, key " + print(secret)}},
		"login, revoked":             {bound(false, gone), request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host with a REVOKED key, " + print(gone)}},
		"login, a wildcard":          {bound(false, shared), request.Content{}, login("root", 0, shared), []string{"For: SSH login as root at a host of web1, *.example.com (host verified)"}},
		"login, a wildcard for all":  {bound(false, any), request.Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host of * (host verified)"}},
		"login, many wildcards":      {bound(false, many), request.Content{}, login("root", 0, nil), []string{`For: SSH login as root at a host of db?.example.com, "a,b", c and 2 more (host verified)`}},
		"login, a wildcard, said":    {local, request.Content{}, login("root", 0, any), []string{"For: SSH login as root at a host of * (NOT VERIFIED: only the request says so)"}},
		"forwarded by a wildcard":    {bound(false, shared, inner), request.Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through a host of web1, *.example.com"}},
		"login, odd user":            {bound(false, hub), request.Content{}, login("root at github.com (host verified)\n\x1b[2J", 0, nil), []string{`For: SSH login as "root at github.com (host verified)\n\x1b[2J" at hub.example.org (host verified)`}},
		"login, no user":             {bound(false, hub), request.Content{}, login("", 0, nil), []string{`For: SSH login as "" at hub.example.org (host verified)`}},
		"forwarded":                  {bound(false, hub, inner), request.Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through hub.example.org"}},
		"forwarded, host not proved": {bound(true, hub), request.Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through hub.example.org"}},
		"the hub's own session":      {bound(true, hub), request.Content{}, login("me", 0, hub), []string{"For: SSH login as me at hub.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through hub.example.org"}},
		"forwarded twice":            {bound(false, hub, evil, inner), request.Content{}, login("me", 2, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through hub.example.org, " + print(evil)}},
		"a session bound as its own": {bound(false, evil, hub), request.Content{}, login("me", 1, nil), []string{"For: SSH login as me at hub.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through " + print(evil)}},
		"a wrong proof":              {&request.Caller{Forwarded: true, BindFailed: true}, request.Content{}, login("me", 0, nil), []string{"For: SSH login as me at an unknown host", "FORWARDED by a host whose proof of itself is wrong"}},
		"git":                        {local, request.Content{Kind: request.KindSignature, Namespace: "git"}, nil, []string{"For: git signature (a commit, a tag or a push)"}},
		"git, forwarded":             {bound(true, hub), request.Content{Kind: request.KindSignature, Namespace: "git"}, nil, []string{"For: git signature (a commit, a tag or a push)", "FORWARDED through hub.example.org"}},
		"odd namespace":              {local, request.Content{Kind: request.KindSignature, Namespace: "git\x00"}, nil, []string{`For: SSH signature, namespace "git\x00"`}},
		"host key":                   {local, request.Content{Kind: request.KindHostKey}, nil, []string{"WARNING: this is no SSH login, but: host key of an SSH server"}},
		"unknown":                    {local, request.Content{Kind: request.KindUnknown}, nil, []string{"WARNING: this is UNKNOWN DATA: no SSH login, and no signature of a file or commit."}},
		"unknown, forwarded":         {bound(true, evil), request.Content{}, nil, []string{"WARNING: this is UNKNOWN DATA: no SSH login, and no signature of a file or commit.", "FORWARDED through " + print(evil)}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.login != nil {
				test.content.Kind = request.KindLogin
			}
			u := &request.Use{Caller: test.caller, Content: test.content, Login: test.login, Hosts: names, Fingerprint: print}
			if got := u.Lines(); !slices.Equal(got, test.want) {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// A use outlives its request.
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

// A prompt gets the client of the request, and whether it was forwarded.
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

// A prompt that many share is about the request that has waited longest, and moves on when
// that request leaves.
func TestInsertMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := edKey("pkcs11:token=a;id=%01")
		asked := make(chan *request.Caller, 10)
		in := &fakeInserter{answer: func(ctx context.Context, _ int) (bool, error) {
			err := waiting.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) error {
				asked <- request.CallerFrom(ctx)
				<-ctx.Done()
				return ctx.Err()
			}})
			return false, err
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
