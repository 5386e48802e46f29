package agent

import (
	"context"
	"errors"
	"strings"
	"testing"

	"p11-agent/agent/approval"
	"p11-agent/agent/approval/approvaltest"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret/secrettest"
)

// everyKey returns rules with the same policy for every key.
func everyKey(a approval.Policy) Rules {
	return Rules{Approval: func(request.Key) approval.Policy { return a }}
}

// signs makes a request, and fails the test if the result is not want.
func (f *fixture) signs(t *testing.T, k request.Key, c *request.Caller, r request.Sign, want error) {
	t.Helper()
	r.Key = wireOf(k)
	if _, err := f.Sign(t.Context(), c, r); !errors.Is(err, want) {
		t.Errorf("sign: %v, want %v", err, want)
	}
}

// TestApprovalForgotten checks which events make the agent forget a yes.
func TestApprovalForgotten(t *testing.T) {
	w := requesttest.New(t)
	for name, test := range map[string]struct {
		do   func(t *testing.T, f *fixture, k *fakeKey)
		kept bool
	}{
		"nothing": {func(*testing.T, *fixture, *fakeKey) {}, true},
		"lock": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := errors.Join(f.Lock(t.Context(), local, secrettest.Of(t, "x")), f.Unlock(t.Context(), local, secrettest.Of(t, "x"))); err != nil {
				t.Fatal(err)
			}
		}, false},
		"remove all": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := f.RemoveAll(t.Context(), local); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"remove it": {func(t *testing.T, f *fixture, k *fakeKey) {
			if err := f.Remove(t.Context(), local, wireOf(k)); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"remove its token": {func(t *testing.T, f *fixture, _ *fakeKey) {
			if err := f.RemoveToken(t.Context(), local, request.Token{Provider: []byte("pkcs11:token=a")}); err != nil {
				t.Fatal(err)
			}
			f.add(t, "pkcs11:", request.Constraints{})
		}, false},
		"its token comes back": {func(_ *testing.T, f *fixture, k *fakeKey) {
			k.insertions++
			f.tokens.set(k)
		}, false},
		"an event for its token": {func(_ *testing.T, f *fixture, k *fakeKey) {
			f.ForgetApprovals(func(o request.Key) bool { return o == request.Key(k) })
		}, false},
		"an event for another one": {func(_ *testing.T, f *fixture, k *fakeKey) {
			f.ForgetApprovals(func(o request.Key) bool { return o != request.Key(k) })
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			k, p := edKey("pkcs11:token=a;id=1"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
			f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse}), Confirm: p, Hosts: w.Hosts}, k)
			for range 2 {
				f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), nil)
			}
			test.do(t, f, k)
			f.signs(t, k, w.Caller("ssh bash"), requesttest.Signature("git"), nil)
			want := map[bool]int{true: 1, false: 2}[test.kept]
			if p.Count() != want {
				t.Errorf("asked %d times, want %d", p.Count(), want)
			}
		})
	}
}

// A yes from before the insertion of the token lasts until the token is removed.
func TestApprovalBeforeInsertion(t *testing.T) {
	w, k, backup, p := requesttest.New(t), edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=b;id=1"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
	backup.Signer, k.insertions = k.Signer, 3
	var f *fixture
	in := &fakeInserter{answer: func(context.Context, int) (bool, error) {
		backup.insertions++
		f.tokens.setAway([]request.Key{backup}, []request.Key{k})
		return true, nil
	}}
	rules := everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse})
	rules.OfferAway = always
	f = newFixture(Options{Rules: rules, Confirm: p, Insert: in}, k)
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 3 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.Count() != 1 || len(in.asked) != 1 {
		t.Errorf("asked %d times, and %d times to insert it", p.Count(), len(in.asked))
	}
	f.tokens.setAway(nil, []request.Key{k, backup})
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.Count() != 2 {
		t.Errorf("asked %d times after it was out", p.Count())
	}
}

// With ssh-add -c, the agent asks in spite of an earlier yes.
func TestConstraintAsksInSpiteOfApproval(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("pkcs11:token=a;id=1"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
	f := newFixture(Options{Rules: everyKey(approval.Policy{Confirm: approval.ConfirmFirstUse}), Confirm: p}, k)
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	f.add(t, k.uri, request.Constraints{Confirm: true})
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	if p.Count() != 2 {
		t.Errorf("asked %d times", p.Count())
	}
}

func TestDenied(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("pkcs11:token=a"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
	rules := everyKey(approval.Policy{Rules: []approval.Rule{{Programs: []string{"ide"}, Confirm: approval.ConfirmDeny}}})
	f := newFixture(Options{Rules: rules, Confirm: p}, k)
	r := requesttest.Signature("git")
	r.Key = wireOf(k)
	_, err := f.Sign(t.Context(), w.Caller("ssh git ide"), r)
	if _, ok := errors.AsType[*approval.DeniedError](err); !ok || p.Count() != 0 || k.signed != 0 {
		t.Errorf("%v, %d questions, %d signatures", err, p.Count(), k.signed)
	}
	if !strings.Contains(f.log.String(), "rule 1 of the key in the configuration refuses it") {
		t.Errorf("the log does not say why: %s", f.log)
	}
	f.signs(t, k, w.Caller("ssh git bash"), requesttest.Signature("git"), nil)
	// Not even with a constraint that asks.
	f.add(t, "pkcs11:", request.Constraints{Confirm: true})
	if _, err := f.Sign(t.Context(), w.Caller("ssh git ide"), r); err == nil || p.Count() != 0 {
		t.Errorf("%v, %d questions", err, p.Count())
	}
}

// The rules for keys on no token apply to keys in memory and of upstream agents.
func TestApprovalOfOtherKeys(t *testing.T) {
	w, k, p := requesttest.New(t), edKey("soft"), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock})
	rules := Rules{Approval: func(k request.Key) approval.Policy {
		if k != nil {
			t.Errorf("asked about %v", k)
		}
		return approval.Policy{Confirm: approval.ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, SoftwareKeys: true})
	pub := publicOf(t, k)
	if err := f.Add(t.Context(), local, request.AddKey{Private: k.Signer, Public: pub}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	}
	if p.Count() != 1 {
		t.Errorf("asked %d times", p.Count())
	}
	f.ForgetApprovals(func(k request.Key) bool { return k == nil })
	f.signs(t, k, w.Caller("ssh"), requesttest.Signature("git"), nil)
	if p.Count() != 2 {
		t.Errorf("asked %d times after all was forgotten", p.Count())
	}
}

func TestApprovalOfUpstreamKeys(t *testing.T) {
	w, p, deny := requesttest.New(t), approvaltest.Says(approval.Answer{Allowed: true, For: approval.UntilLock}), false
	up := keytest.New(t)
	rules := Rules{Approval: func(k request.Key) approval.Policy {
		if deny {
			return approval.Policy{Rules: []approval.Rule{{Confirm: approval.ConfirmDeny}}}
		}
		return approval.Policy{Confirm: approval.ConfirmFirstUse}
	}}
	f := newFixture(Options{Rules: rules, Confirm: p, Upstreams: []Upstream{&fakeUpstream{name: "gcr", keys: []keytest.Key{up}}}})
	r := requesttest.Signature("git")
	r.Key = up.Public.Marshal()
	for range 2 {
		if _, err := f.Sign(t.Context(), w.Caller("ssh"), r); err != nil {
			t.Error(err)
		}
	}
	if p.Count() != 1 || p.Asked()[0].Comment != "a key of the agent at gcr" || p.Asked()[0].Content != r.Content {
		t.Errorf("asked %+v", p.Asked())
	}
	deny = true
	if _, err := f.Sign(t.Context(), w.Caller("ssh"), r); err == nil {
		t.Error("the other agent has signed what is denied")
	}
}
