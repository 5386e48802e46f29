package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/secret/secrettest"
)

func TestLock(t *testing.T) {
	k, soft := edKey("pkcs11:token=a"), keytest.New(t)
	f := newFixture(Options{SoftwareKeys: true}, k)
	f.add(t, "pkcs11:token=a", request.Constraints{})
	ctx := t.Context()
	if err := f.Add(ctx, local, addKey(soft, request.Constraints{})); err != nil {
		t.Fatal(err)
	}
	if err := f.Unlock(ctx, local, secrettest.Of(t, "sesame")); !errors.Is(err, errNotLocked) {
		t.Errorf("unlock what is open: %v", err)
	}
	if err := f.Lock(ctx, local, secrettest.Of(t, "")); !errors.Is(err, errNoPhrase) {
		t.Errorf("lock without a passphrase: %v", err)
	}
	f.wantList(t, k.uri, "file")
	if err := f.Lock(ctx, local, secrettest.Of(t, "sesame")); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	if f.tokens.logouts != 1 || !slices.Contains(f.tokens.dropped, "pkcs11:token=a") {
		t.Errorf("%d logouts, dropped %q", f.tokens.logouts, f.tokens.dropped)
	}
	for what, do := range map[string]func() error{
		"sign": func() error {
			_, err := f.Sign(ctx, local, request.Sign{Key: wireOf(k)})
			return err
		},
		"add":           func() error { return f.Add(ctx, local, addKey(keytest.New(t), request.Constraints{})) },
		"add tokens":    func() error { return f.AddToken(ctx, local, request.Token{Provider: []byte("pkcs11:")}) },
		"remove":        func() error { return f.Remove(ctx, local, wireOf(k)) },
		"remove tokens": func() error { return f.RemoveToken(ctx, local, request.Token{Provider: []byte("pkcs11:")}) },
		"remove all":    func() error { return f.RemoveAll(ctx, local) },
		"lock":          func() error { return f.Lock(ctx, local, secrettest.Of(t, "other")) },
		"pass": func() error {
			_, err := f.Pass(ctx, local, []byte{1})
			return err
		},
	} {
		if err := do(); !errors.Is(err, request.ErrLocked) {
			t.Errorf("%s while locked: %v", what, err)
		}
	}
	if err := f.Unlock(ctx, local, secrettest.Of(t, "sesame!")); !errors.Is(err, errWrongPhrase) {
		t.Errorf("wrong passphrase: %v", err)
	}
	f.wantList(t)
	if err := f.Unlock(ctx, local, secrettest.Of(t, "sesame")); err != nil {
		t.Fatal(err)
	}
	f.wantList(t, k.uri, "file")
	if _, err := f.Sign(ctx, local, request.Sign{Key: wireOf(k)}); err != nil {
		t.Error(err)
	}
}

// Each wrong passphrase makes the next try wait longer, ten seconds at most. No try
// overtakes another.
func TestUnlockDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(Options{})
		if err := f.Lock(t.Context(), local, secrettest.Of(t, "sesame")); err != nil {
			t.Fatal(err)
		}
		wrong, right := secrettest.Of(t, "wrong"), secrettest.Of(t, "sesame")
		for n := range 120 {
			began := time.Now()
			if err := f.Unlock(t.Context(), local, wrong); !errors.Is(err, errWrongPhrase) {
				t.Fatal(err)
			}
			if got, want := time.Since(began), min(time.Duration(n)*100*time.Millisecond, 10*time.Second); got != want {
				t.Fatalf("try %d took %v, want %v", n+1, got, want)
			}
		}
		// Many tries at once are not faster. A try ends when its client hangs up.
		ends := make(chan error)
		began := time.Now()
		for range 5 {
			go func() { ends <- f.Unlock(t.Context(), local, wrong) }()
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() { gone <- f.Unlock(ctx, local, wrong) }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) || time.Since(began) != 0 {
			t.Errorf("hung up: %v after %v", err, time.Since(began))
		}
		for range 5 {
			<-ends
		}
		if got := time.Since(began); got != 50*time.Second {
			t.Errorf("five tries took %v", got)
		}
		if err := f.Unlock(t.Context(), local, right); err != nil {
			t.Error(err)
		}
		// The pauses begin anew.
		if err := f.Lock(t.Context(), local, right); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		_ = f.Unlock(t.Context(), local, wrong)
		_ = f.Unlock(t.Context(), local, wrong)
		if got := time.Since(began); got != 100*time.Millisecond {
			t.Errorf("two tries took %v", got)
		}
	})
}

// When the agent is locked, a signature that waits for a person fails.
func TestLockEndsSignatures(t *testing.T) {
	k := edKey("pkcs11:token=a")
	waits := make(chan struct{})
	f := newFixture(Options{Confirm: confirmFunc(func(ctx context.Context, _ approval.Question) (approval.Answer, error) {
		close(waits)
		<-ctx.Done()
		return approval.Answer{}, ctx.Err()
	})}, k)
	f.add(t, "pkcs11:token=a", request.Constraints{Confirm: true})
	end := make(chan error, 1)
	go func() {
		_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(k)})
		end <- err
	}()
	<-waits
	if err := f.Lock(t.Context(), local, secrettest.Of(t, "sesame")); err != nil {
		t.Fatal(err)
	}
	if err := <-end; !errors.Is(err, request.ErrLocked) {
		t.Errorf("got %v", err)
	}
}

type confirmFunc func(context.Context, approval.Question) (approval.Answer, error)

func (f confirmFunc) Confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	return f(ctx, r)
}
