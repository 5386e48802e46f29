package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret/secrettest"
)

func TestSoftwareKeys(t *testing.T) {
	k, other, ca := keytest.New(t), keytest.New(t), keytest.New(t)
	cert := k.Certificate(t, ca, ssh.UserCert, nil)
	f := newFixture(Options{SoftwareKeys: true}, edKey("pkcs11:token=a"))
	ctx := t.Context()
	for _, r := range []request.AddKey{addKey(k, request.Constraints{}), {Private: k.Private, Public: cert, Comment: "certified"}, addKey(other, request.Constraints{})} {
		if err := f.Add(ctx, forwarded, r); err != nil { // as ssh-agent lets
			t.Fatal(err)
		}
	}
	f.wantList(t, "pkcs11:token=a", "file", "certified", "file")
	for _, key := range []ssh.PublicKey{k.Public, cert} {
		sig, err := f.Sign(ctx, local, request.Sign{Key: key.Marshal(), Data: []byte("data")})
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Public.Verify([]byte("data"), sig); err != nil || sig.Format != ssh.KeyAlgoED25519 {
			t.Errorf("%s, %v", sig.Format, err)
		}
	}
	// Again: in its place, with another name.
	again := addKey(k, request.Constraints{})
	again.Comment = "again"
	if err := f.Add(ctx, local, again); err != nil {
		t.Fatal(err)
	}
	f.wantList(t, "pkcs11:token=a", "again", "certified", "file")
	if err := f.Remove(ctx, local, k.Public.Marshal()); err != nil {
		t.Fatal(err)
	}
	f.wantList(t, "pkcs11:token=a", "certified", "file")
	if err := f.RemoveAll(ctx, local); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	if _, err := f.Sign(ctx, local, request.Sign{Key: cert.Marshal()}); !errors.Is(err, errUnknownKey) {
		t.Errorf("a removed key: %v", err)
	}
}

func TestSoftwareKeyRefusals(t *testing.T) {
	k, other, ca := keytest.New(t), keytest.New(t), keytest.New(t)
	mixed := addKey(k, request.Constraints{})
	mixed.Public = other.Public
	for name, test := range map[string]struct {
		off     bool
		request request.AddKey
	}{
		"switched off":                {true, addKey(k, request.Constraints{})},
		"halves of different keys":    {false, mixed},
		"certificate of another key":  {false, request.AddKey{Private: k.Private, Public: other.Certificate(t, ca, ssh.UserCert, nil)}},
		"with certificates":           {false, addKey(k, request.Constraints{Certificates: []*ssh.Certificate{k.Certificate(t, ca, ssh.UserCert, nil)}})},
		"with certificates, and only": {false, addKey(k, request.Constraints{CertificatesOnly: true})},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(Options{SoftwareKeys: !test.off})
			if err := f.Add(t.Context(), local, test.request); err == nil || !strings.Contains(f.log.String(), "request refused") {
				t.Errorf("%v, the log has %s", err, f.log)
			}
			f.wantList(t)
		})
	}
	f := newFixture(Options{SoftwareKeys: true})
	f.Keyring.opts.Confirm = nil
	if err := f.Add(t.Context(), local, addKey(k, request.Constraints{Confirm: true})); !errors.Is(err, approval.ErrNoPrompt) {
		t.Errorf("without a prompt: %v", err)
	}
}

func TestHowMuchCanBeAdded(t *testing.T) {
	f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}, SoftwareKeys: true}, edKey("pkcs11:token=a"))
	for i := range maxSoftwareKeys {
		f.software.put(&softwareKey{identity: identity{Target: request.Target{ID: fmt.Sprint(i)}}})
	}
	if err := f.Add(t.Context(), local, addKey(keytest.New(t), request.Constraints{})); !errors.Is(err, errTooMany) {
		t.Errorf("keys in memory: %v", err)
	}
	f.software = softwareKeys{}
	for range maxAdditions + 1 { // under the same name it is no more
		f.add(t, "pkcs11:token=a", request.Constraints{})
	}
	f.Keyring.added = slices.Repeat([]*addition{{selection: prefix("other")}}, maxAdditions)
	if err := f.AddToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a")}); !errors.Is(err, errTooMany) {
		t.Errorf("tokens: %v", err)
	}
}

// A key on a token and in memory is a single identity. It signs while the token is absent,
// and keeps the limits of both.
func TestSoftwareKeyOfToken(t *testing.T) {
	k := keytest.New(t)
	token := &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1}
	f := newFixture(Options{SoftwareKeys: true}, token)
	if err := f.Add(t.Context(), local, addKey(k, request.Constraints{Confirm: true})); err != nil {
		t.Fatal(err)
	}
	f.wantList(t, token.uri)
	sign := func() error {
		_, err := f.Sign(t.Context(), local, request.Sign{Key: k.Public.Marshal()})
		return err
	}
	if err := sign(); !errors.Is(err, approval.ErrDeclined) {
		t.Errorf("got %v", err)
	}
	f.confirm.answer = true
	if err := sign(); err != nil || token.signed != 1 {
		t.Errorf("%v, %d signatures of the token", err, token.signed)
	}
	token.absent = true
	if err := sign(); err != nil || token.signed != 1 {
		t.Errorf("%v, %d signatures of the token", err, token.signed)
	}
	token.absent, token.err = false, errors.New("declined")
	if err := sign(); err == nil {
		t.Error("what was declined on the token was signed in memory")
	}
}

// fakeUpstream plays another agent.
type fakeUpstream struct {
	name    string
	keys    []keytest.Key
	err     error
	removed [][]byte
	passed  [][]byte
	refuse  bool
}

func (u *fakeUpstream) Name() string { return u.name }

func (u *fakeUpstream) List(context.Context, *request.Caller) (all []Identity, err error) {
	for _, k := range u.keys {
		all = append(all, Identity{Key: k.Public, Comment: u.name})
	}
	return all, u.err
}

func (u *fakeUpstream) Sign(_ context.Context, _ *request.Caller, r request.Sign) (*ssh.Signature, error) {
	for _, k := range u.keys {
		if string(k.Public.Marshal()) == string(r.Key) {
			return k.Signer.Sign(rand.Reader, r.Data)
		}
	}
	return nil, errors.New("refused")
}

func (u *fakeUpstream) Remove(_ context.Context, _ *request.Caller, key []byte) error {
	u.removed = append(u.removed, key)
	return nil
}

func (u *fakeUpstream) Pass(_ context.Context, _ *request.Caller, message []byte) ([]byte, error) {
	if u.refuse {
		return nil, errors.New("refused")
	}
	u.passed = append(u.passed, message)
	return []byte(u.name), nil
}

func TestUpstream(t *testing.T) {
	own, a, b := keytest.New(t), keytest.New(t), keytest.New(t)
	token := &fakeKey{Signer: own.Private, uri: "pkcs11:token=a", insertions: 1}
	dead := &fakeUpstream{name: "dead", err: errors.New("connection refused")}
	one := &fakeUpstream{name: "one", keys: []keytest.Key{own, a}, refuse: true}
	two := &fakeUpstream{name: "two", keys: []keytest.Key{a, b}}
	f := newFixture(Options{Upstreams: []Upstream{dead, one, two}}, token)
	for range 3 {
		f.wantList(t, token.uri, "one", "two")
	}
	if n := strings.Count(f.log.String(), "connection refused"); n != 1 {
		t.Errorf("%d lines about the dead agent:\n%s", n, f.log)
	}
	dead.err = nil
	f.wantList(t, token.uri, "one", "two")
	if !strings.Contains(f.log.String(), "can be used again") {
		t.Errorf("the log has %s", f.log)
	}
	for _, k := range []keytest.Key{own, a, b} {
		f.Keyring.origins = nil // without a list before
		sig, err := f.Sign(t.Context(), local, request.Sign{Key: k.Public.Marshal(), Data: []byte("data")})
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Public.Verify([]byte("data"), sig); err != nil {
			t.Error(err)
		}
	}
	if token.signed != 1 {
		t.Errorf("%d signatures of the token", token.signed)
	}
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: keytest.New(t).Public.Marshal()}); !errors.Is(err, errUnknownKey) {
		t.Errorf("an unknown key: %v", err)
	}
	if err := f.Remove(t.Context(), local, b.Public.Marshal()); err != nil || len(two.removed) != 1 {
		t.Errorf("remove: %v, %d", err, len(two.removed))
	}
	answer, err := f.Pass(t.Context(), local, []byte("message"))
	if err != nil || len(dead.passed) != 1 || string(answer) != "dead" {
		t.Errorf("pass: %q, %v", answer, err)
	}
	dead.refuse = true
	if answer, err := f.Pass(t.Context(), local, []byte("message")); err != nil || string(answer) != "two" {
		t.Errorf("pass: %q, %v", answer, err)
	}
	two.refuse = true
	if _, err := f.Pass(t.Context(), local, []byte("message")); err == nil {
		t.Error("a message that all refuse was answered")
	}

	// A socket for some keys shows no keys of upstream agents. A socket that confirms asks
	// for their keys, too.
	some := &request.Caller{Socket: &request.Socket{Only: []request.Selection{prefix("pkcs11:")}}}
	if list, err := f.List(t.Context(), some); err != nil || len(list.Identities) != 1 {
		t.Errorf("%d keys, %v", len(list.Identities), err)
	}
	if _, err := f.Sign(t.Context(), some, request.Sign{Key: a.Public.Marshal()}); !errors.Is(err, errUnknownKey) {
		t.Errorf("got %v", err)
	}
	asks := &request.Caller{Socket: &request.Socket{Confirm: approval.ConfirmAlways}}
	if _, err := f.Sign(t.Context(), asks, request.Sign{Key: a.Public.Marshal()}); !errors.Is(err, approval.ErrDeclined) {
		t.Errorf("got %v", err)
	}
	// While the agent is locked, no request computes.
	if err := f.Lock(t.Context(), local, secrettest.Of(t, "x")); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)

	f = newFixture(Options{})
	if _, err := f.Pass(t.Context(), local, []byte("message")); !errors.Is(err, ErrNotPassed) {
		t.Errorf("without any: %v", err)
	}
}
