package agent

import (
	"testing"

	"golang.org/x/crypto/ssh"
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
	f := newFixture(Options{Rules: Rules{Name: func(Key) string { return "laptop" }}}, key)
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
				if use.Comment != "laptop" || use.Caller != caller || (use.Login == nil) != (test.login == nil) || use.Login != nil && use.Login.User != test.login.User || string(use.Key.Marshal()) != string(wireOf(key)) {
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
