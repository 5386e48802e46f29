package agent

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret/secrettest"
)

func addKey(k keytest.Key, c request.Constraints) request.AddKey {
	return request.AddKey{Private: k.Private, Public: k.Public, Comment: "file", Constraints: c}
}

// boundTo returns a caller that is bound to sessions with hosts, one after the other. All
// sessions but the last are for forwarding. The last is if forwarding is true.
func boundTo(forwarding bool, hosts ...ssh.PublicKey) *request.Caller {
	c := &request.Caller{Number: 7}
	for i, h := range hosts {
		last := i == len(hosts)-1
		c.Binds = append(c.Binds, request.Bind{HostKey: h, SessionID: []byte{byte(i + 1)}, Forwarding: !last || forwarding})
		c.Forwarded = c.Forwarded || !last || forwarding
	}
	return c
}

// to makes a destination from a host (nil: where the agent runs) to another one.
func to(user string, from, host ssh.PublicKey) request.Destination {
	d := request.Destination{To: request.Hop{User: user, Host: "host", Keys: []request.HostKey{{Key: host}}}}
	if from != nil {
		d.From = request.Hop{Host: "from", Keys: []request.HostKey{{Key: from}}}
	}
	return d
}

func login(user string, c *request.Caller) *request.Login {
	l := &request.Login{User: user}
	if n := len(c.Binds); n > 0 {
		l.SessionID, l.HostKey = c.Binds[n-1].SessionID, c.Binds[n-1].HostKey.Marshal()
	}
	return l
}

func TestDestinations(t *testing.T) {
	a, b, other, ca := keytest.New(t), keytest.New(t), keytest.New(t), keytest.New(t)
	hostCert := func(change func(*ssh.Certificate)) ssh.PublicKey {
		return a.Certificate(t, ca, ssh.HostCert, func(c *ssh.Certificate) {
			c.ValidPrincipals = []string{"host"}
			if change != nil {
				change(c)
			}
		})
	}
	byCA := func(host string) []request.Destination {
		return []request.Destination{{To: request.Hop{Host: host, Keys: []request.HostKey{{Key: ca.Public, CA: true}}}}}
	}
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaCA, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	byRSA := func(host string) []request.Destination {
		return []request.Destination{{To: request.Hop{Host: host, Keys: []request.HostKey{{Key: rsaCA.PublicKey(), CA: true}}}}}
	}
	rsaCert := func(algorithm string) ssh.PublicKey {
		s, err := ssh.NewSignerWithAlgorithms(rsaCA.(ssh.AlgorithmSigner), []string{algorithm})
		if err != nil {
			t.Fatal(err)
		}
		return a.Certificate(t, keytest.Key{Signer: s}, ssh.HostCert, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"host"} })
	}
	sha1Cert, sha2Cert := rsaCert(ssh.KeyAlgoRSA), rsaCert(ssh.KeyAlgoRSASHA256)
	local := &request.Caller{}
	toA := []request.Destination{to("", nil, a.Public)}
	chain := append(slices.Clone(toA), to("", a.Public, b.Public))
	for _, test := range []struct {
		name     string
		dest     []request.Destination
		caller   *request.Caller
		shown    bool
		user     string
		noLogin  bool
		change   func(*request.Login)
		may      bool
		errorHas string
	}{
		{name: "not limited", caller: local, shown: true, may: true},
		{name: "local and unbound", dest: toA, caller: local, shown: true, errorHas: "bound to no session"},
		{name: "to the host", dest: toA, caller: boundTo(false, a.Public), shown: true, may: true},
		{name: "to another host", dest: toA, caller: boundTo(false, b.Public)},
		{name: "signs something else", dest: toA, caller: boundTo(false, a.Public), shown: true, noLogin: true, errorHas: "no request to log in"},
		{name: "another session", dest: toA, caller: boundTo(false, a.Public), shown: true, change: func(l *request.Login) { l.SessionID = []byte("x") }, errorHas: "another session"},
		{name: "names another host", dest: toA, caller: boundTo(false, a.Public), shown: true, change: func(l *request.Login) { l.HostKey = b.Public.Marshal() }, errorHas: "another session or host"},
		{name: "names no host, first hop", dest: toA, caller: boundTo(false, a.Public), shown: true, change: func(l *request.Login) { l.HostKey = nil }, may: true},
		{name: "forwarded to the host, not from there", dest: toA, caller: boundTo(true, a.Public)},
		{name: "forwarded to the host and on", dest: chain, caller: boundTo(true, a.Public), shown: true, errorHas: "for forwarding"},
		{name: "two hops", dest: chain, caller: boundTo(false, a.Public, b.Public), shown: true, may: true},
		{name: "two hops, names no host", dest: chain, caller: boundTo(false, a.Public, b.Public), shown: true, change: func(l *request.Login) { l.HostKey = nil }, errorHas: "does not name the host"},
		{name: "two hops, the second elsewhere", dest: chain, caller: boundTo(false, a.Public, other.Public)},
		{name: "two hops, the first elsewhere", dest: chain, caller: boundTo(false, other.Public, b.Public)},
		{name: "straight to the second", dest: chain, caller: boundTo(false, b.Public)},
		{name: "bind failed", dest: toA, caller: &request.Caller{BindFailed: true, Forwarded: true}, errorHas: "could not be bound"},
		{name: "a bind failed after one that did not", dest: toA, caller: func() *request.Caller { c := boundTo(false, a.Public); c.BindFailed = true; return c }(), shown: true, may: true},
		{name: "the user", dest: []request.Destination{to("root", nil, a.Public)}, caller: boundTo(false, a.Public), shown: true, user: "root", may: true},
		{name: "another user", dest: []request.Destination{to("root", nil, a.Public)}, caller: boundTo(false, a.Public), shown: true, user: "me"},
		{name: "a pattern for the user", dest: []request.Destination{to("m?-*", nil, a.Public)}, caller: boundTo(false, a.Public), shown: true, user: "me-too", may: true},
		{name: "certified host", dest: byCA("host"), caller: boundTo(false, hostCert(nil)), shown: true, may: true},
		{name: "certified host, plain key expected", dest: toA, caller: boundTo(false, hostCert(nil))},
		{name: "plain key, certified host expected", dest: byCA("host"), caller: boundTo(false, a.Public)},
		{name: "the authority itself", dest: byCA("host"), caller: boundTo(false, ca.Public)},
		{name: "certified for another name", dest: byCA("other"), caller: boundTo(false, hostCert(nil))},
		{name: "certified for a pattern", dest: byCA("a.example"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"x", "*.example"} })), shown: true, may: true},
		{name: "certified for any name", dest: byCA("a.example"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.ValidPrincipals = nil }))},
		{name: "certified with SHA-1", dest: byRSA("host"), caller: boundTo(false, sha1Cert)},
		{name: "certified with SHA-2", dest: byRSA("host"), caller: boundTo(false, sha2Cert), shown: true, may: true},
		{name: "certified for a name in capitals", dest: byCA("host"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"HOST"} }))},
		{name: "certificate of a user", dest: byCA("host"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.CertType = ssh.UserCert }))},
		{name: "certificate with a critical option", dest: byCA("host"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"x": ""} }))},
		{name: "expired certificate", dest: byCA("host"), caller: boundTo(false, hostCert(func(c *ssh.Certificate) { c.ValidBefore = 1 }))},
		{name: "certificate with a wrong signature", dest: byCA("host"), caller: func() *request.Caller {
			c := hostCert(nil).(*ssh.Certificate)
			c.KeyId = "changed"
			return boundTo(false, c)
		}()},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := keytest.New(t)
			f := newFixture(Options{SoftwareKeys: true})
			if err := f.Add(t.Context(), local, addKey(k, request.Constraints{Destinations: test.dest})); err != nil {
				t.Fatal(err)
			}
			list, err := f.List(t.Context(), test.caller)
			if shown := len(list.Identities) == 1; err != nil || shown != test.shown {
				t.Errorf("shown: %v, %v", shown, err)
			}
			r := request.Sign{Key: k.Public.Marshal(), Data: []byte("data")}
			if !test.noLogin {
				user := test.user
				if user == "" {
					user = "me"
				}
				if r.Login = login(user, test.caller); test.change != nil {
					test.change(r.Login)
				}
			}
			_, err = f.Sign(t.Context(), test.caller, r)
			if (err == nil) != test.may || err != nil && !strings.Contains(err.Error(), test.errorHas) {
				t.Errorf("sign: %v", err)
			}
			// If a client may not see a key, it may neither change nor remove the key.
			err = f.Add(t.Context(), test.caller, addKey(k, request.Constraints{Destinations: test.dest}))
			if (err == nil) != test.shown {
				t.Errorf("add again: %v", err)
			}
			err = f.Remove(t.Context(), test.caller, k.Public.Marshal())
			if (err == nil) != test.shown {
				t.Errorf("remove: %v", err)
			}
		})
	}
}

// TestConstraintMatrix tries every combination of constraints, on both kinds of keys, for
// local and for forwarded requests.
func TestConstraintMatrix(t *testing.T) {
	for bits := range 1 << 6 {
		has := func(i int) bool { return bits&(1<<i) != 0 }
		confirm, lifetime, destination, certified, software, remote := has(0), has(1), has(2), has(3), has(4), has(5)
		t.Run(fmt.Sprintf("confirm %v, lifetime %v, destination %v, certificate %v, software %v, forwarded %v",
			confirm, lifetime, destination, certified, software, remote), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, ca, k := keytest.New(t), keytest.New(t), keytest.New(t)
				away := keytest.New(t)
				caller := boundTo(false, host.Public)
				path := []request.Destination{to("", nil, host.Public)}
				if remote {
					caller = boundTo(false, away.Public, host.Public)
					path = []request.Destination{to("", nil, away.Public), to("", away.Public, host.Public)}
				}
				cert := k.Certificate(t, ca, ssh.UserCert, nil)
				c := request.Constraints{Confirm: confirm}
				if lifetime {
					c.Lifetime = time.Minute
				}
				if destination {
					c.Destinations = path
				}
				f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}, SoftwareKeys: true}, &fakeKey{Signer: k.Private, uri: "pkcs11:token=a;id=1", insertions: 1})
				used := k.Public
				var err error
				switch {
				case software && certified:
					used = cert
					err = f.Add(t.Context(), local, request.AddKey{Private: k.Private, Public: cert, Constraints: c})
				case software:
					err = f.Add(t.Context(), local, addKey(k, c))
				default:
					if certified {
						c.Certificates, c.CertificatesOnly = []*ssh.Certificate{cert}, true
						used = cert
					}
					err = f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a"), Constraints: c})
				}
				if err != nil {
					t.Fatal(err)
				}
				list := func(c *request.Caller) int {
					list, err := f.List(t.Context(), c)
					if err != nil {
						t.Error(err)
					}
					return len(list.Identities)
				}
				sign := func(c *request.Caller) error {
					sig, err := f.Sign(t.Context(), c, request.Sign{Key: used.Marshal(), Data: []byte("data"), Login: login("me", c)})
					if err == nil {
						err = k.Public.Verify([]byte("data"), sig)
					}
					return err
				}
				if n := list(caller); n != 1 {
					t.Errorf("%d keys are listed", n)
				}
				err = sign(caller)
				if confirm {
					if !errors.Is(err, approval.ErrDeclined) {
						t.Errorf("declined: %v", err)
					}
					f.confirm.answer = true
					time.Sleep(firstPause) // that a forwarded request has to wait
					err = sign(caller)
				}
				if err != nil {
					t.Error(err)
				}
				if n := len(f.confirm.asked); confirm && n != 2 || !confirm && n != 0 {
					t.Errorf("%d questions", n)
				}
				elsewhere := boundTo(false, keytest.New(t).Public)
				if err := sign(elsewhere); (err != nil) != destination {
					t.Errorf("elsewhere: %v", err)
				}
				if n := list(elsewhere); (n == 0) != destination {
					t.Errorf("elsewhere %d keys are listed", n)
				}
				time.Sleep(time.Minute)
				if err := sign(caller); (err != nil) != lifetime {
					t.Errorf("a minute later: %v", err)
				}
				if n := list(caller); (n == 0) != lifetime {
					t.Errorf("a minute later %d keys are listed", n)
				}
			})
		})
	}
}

func TestLooser(t *testing.T) {
	d := []request.Destination{to("", nil, keytest.New(t).Public)}
	for _, test := range []struct {
		old, now request.Constraints
		looser   bool
	}{
		{request.Constraints{}, request.Constraints{}, false},
		{request.Constraints{}, request.Constraints{Confirm: true, Lifetime: time.Minute, Destinations: d}, false},
		{request.Constraints{Confirm: true}, request.Constraints{}, true},
		{request.Constraints{Lifetime: 2 * time.Minute}, request.Constraints{Lifetime: time.Minute}, false},
		{request.Constraints{Lifetime: 2 * time.Minute}, request.Constraints{Lifetime: 3 * time.Minute}, true},
		{request.Constraints{Lifetime: 2 * time.Minute}, request.Constraints{}, true},
		{request.Constraints{Destinations: d}, request.Constraints{Destinations: d}, false},
		{request.Constraints{Destinations: d}, request.Constraints{}, true},
		{request.Constraints{Destinations: d}, request.Constraints{Destinations: append(slices.Clone(d), d...)}, true},
	} {
		k := keytest.New(t)
		f := newFixture(Options{SoftwareKeys: true})
		for _, c := range []request.Constraints{test.old, test.now} {
			if err := f.Add(t.Context(), local, addKey(k, c)); err != nil {
				t.Fatal(err)
			}
		}
		if said := strings.Contains(f.log.String(), "constraints loosened"); said != test.looser {
			t.Errorf("%+v to %+v: the log has %s", test.old, test.now, f.log)
		}
		// A key of a token keeps its limits when a client adds it again, by any name.
		for _, name := range []string{"pkcs11:token=a;id=1", "pkcs11:token=a"} {
			f = newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, edKey("pkcs11:token=a;id=1"))
			f.add(t, "pkcs11:token=a;id=1", test.old)
			f.add(t, name, test.now)
			if said := strings.Contains(f.log.String(), "constraints kept"); said != test.looser {
				t.Errorf("token, as %s, %+v to %+v: the log has %s", name, test.old, test.now, f.log)
			}
			old := limitsOf(&test.old, 0)
			if has := f.now().identities[0].limits; has.looser(&old) {
				t.Errorf("token, as %s, %+v to %+v: it has %+v", name, test.old, test.now, has)
			}
		}
	}
}

func TestSocketRules(t *testing.T) {
	a, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1")
	f := newFixture(Options{SoftwareKeys: true}, a, b)
	k := keytest.New(t)
	if err := f.Add(t.Context(), local, addKey(k, request.Constraints{})); err != nil {
		t.Fatal(err)
	}
	at := func(s request.Socket) *request.Caller { return &request.Caller{Socket: &s} }
	comments := func(c *request.Caller) (all []string) {
		list, err := f.List(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range list.Identities {
			all = append(all, id.Comment)
		}
		return all
	}
	only := at(request.Socket{Only: []request.Selection{prefix("pkcs11:token=b")}})
	if got := comments(only); !slices.Equal(got, []string{b.uri}) {
		t.Errorf("listed: %q", got)
	}
	if got := comments(at(request.Socket{})); !slices.Equal(got, []string{a.uri, b.uri, "file"}) {
		t.Errorf("without a list of keys: %q", got)
	}
	if got := comments(at(request.Socket{Only: []request.Selection{}})); len(got) > 0 {
		t.Errorf("with an empty one: %q", got)
	}
	sign := func(c *request.Caller, key []byte) error {
		_, err := f.Sign(t.Context(), c, request.Sign{Key: key})
		return err
	}
	if err := sign(only, wireOf(b)); err != nil {
		t.Error(err)
	}
	if err := sign(only, wireOf(a)); !errors.Is(err, errUnknownKey) {
		t.Errorf("a key that is not shown: %v", err)
	}
	if err := f.Remove(t.Context(), only, wireOf(a)); !errors.Is(err, errUnknownKey) {
		t.Errorf("remove a key that is not shown: %v", err)
	}
	if err := sign(at(request.Socket{Confirm: approval.ConfirmAlways}), wireOf(a)); !errors.Is(err, approval.ErrDeclined) || len(f.confirm.asked) != 1 {
		t.Errorf("to be confirmed: %v", err)
	}
	readOnly := at(request.Socket{ReadOnly: true})
	if err := sign(readOnly, wireOf(a)); err != nil {
		t.Error(err)
	}
	ctx := t.Context()
	for what, do := range map[string]func() error{
		"add":           func() error { return f.Add(ctx, readOnly, addKey(keytest.New(t), request.Constraints{})) },
		"add tokens":    func() error { return f.AddToken(ctx, readOnly, request.Token{Provider: []byte("pkcs11:")}) },
		"remove":        func() error { return f.Remove(ctx, readOnly, wireOf(a)) },
		"remove tokens": func() error { return f.RemoveToken(ctx, readOnly, request.Token{Provider: []byte("pkcs11:")}) },
		"remove all":    func() error { return f.RemoveAll(ctx, readOnly) },
		"lock":          func() error { return f.Lock(ctx, readOnly, secrettest.Of(t, "x")) },
		"unlock":        func() error { return f.Unlock(ctx, readOnly, secrettest.Of(t, "x")) },
		"pass": func() error {
			_, err := f.Pass(ctx, readOnly, []byte{1})
			return err
		},
	} {
		if err := do(); !errors.Is(err, errReadOnly) {
			t.Errorf("%s at a read-only socket: %v", what, err)
		}
	}
	if got := comments(local); len(got) != 3 {
		t.Errorf("left: %q", got)
	}
}
