package agent

import (
	"context"
	"errors"
	"slices"
	"testing"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// Do serves a use that is not an SSH signature. It applies the rules, the lock, the tokens
// and the log as the Keyring does.
func TestGuardDo(t *testing.T) {
	here, absent, denied := edKey("pkcs11:token=a"), edKey("pkcs11:token=b"), edKey("pkcs11:token=c")
	f := newFixture(Options{Rules: Rules{
		Allow: func(request.Key) []request.Kind { return []request.Kind{request.KindTLS} },
		Approval: func(k request.Key) approval.Policy {
			if k == request.Key(denied) {
				return approval.Policy{Confirm: approval.ConfirmDeny}
			}
			return approval.Policy{}
		},
	}}, here, denied)
	do := func(kind request.Kind, homes ...request.Key) (used []string, err error) {
		target := &request.Target{ID: "id", Comment: "a key", Fingerprint: "SHA256:x", PublicKey: homes[0].Public(), Homes: homes}
		use := &request.Use{Caller: local, Content: request.Content{Kind: kind}}
		err = f.Do(t.Context(), use, target, func(_ context.Context, k request.Key) error {
			used = append(used, k.URI())
			if k == request.Key(absent) {
				return errNowhere
			}
			return nil
		})
		return used, err
	}
	last := func() audit.Event { return f.Now().Events[0] }

	used, err := do(request.KindTLS, absent, here)
	if e := last(); err != nil || !slices.Equal(used, []string{absent.uri, here.uri}) || e.Result != audit.OK || e.Kind != request.KindTLS || e.URI != here.uri || e.PublicKey == nil {
		t.Errorf("used %q, %v, %+v", used, err, e)
	}
	if used, err = do(request.KindX509, here); used != nil || last().Result != audit.Refused {
		t.Errorf("a kind that is not allowed: used %q, %v", used, err)
	}
	used, err = do(request.KindTLS, denied)
	if _, ok := errors.AsType[*approval.DeniedError](err); !ok || used != nil {
		t.Errorf("denied: used %q, %v", used, err)
	}
	phrase, err := secret.From([]byte("phrase"))
	if err != nil {
		t.Fatal(err)
	}
	defer phrase.Wipe()
	if err := f.Lock(t.Context(), local, phrase); err != nil {
		t.Fatal(err)
	}
	if used, err = do(request.KindTLS, here); used != nil || !errors.Is(err, request.ErrLocked) {
		t.Errorf("locked: used %q, %v", used, err)
	}
}
