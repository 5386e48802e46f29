package token_test

import (
	"context"
	"sync"
	"testing"

	"p11-agent/token"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// work counts the calls of Options.Working.
type work struct {
	mu           sync.Mutex
	began, going int
	ctx          context.Context // of the last call
}

func (w *work) begin(ctx context.Context, _ *token.Key) func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.began++
	w.going++
	w.ctx = ctx
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.going--
	}
}

func (w *work) counts() (began, going int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.began, w.going
}

func (w *work) want(t *testing.T, when string, began, going int) {
	t.Helper()
	if b, g := w.counts(); b != began || g != going {
		t.Errorf("%s: %d times begun and %d going on, want %d and %d", when, b, g, began, going)
	}
}

type valueKey struct{}

// A token works from the request to sign until its answer. The token does not work while a
// person types the PIN. This holds for each kind of key.
func TestWorking(t *testing.T) {
	for _, tt := range []struct {
		name string
		id   byte
		pad  bool
		want int // of the works of one signature
	}{
		{"a key of a login", 1, false, 1},
		{"a key that wants its PIN each time", 2, false, 1},
		{"such a key, with the PIN typed on the reader", 2, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := new(work)
			wait := make(chan struct{})
			p := &tokentest.Person{Always: rightPIN, Wait: wait}
			b := newBench(t, p, func(b *bench, opts *token.Options) {
				opts.Working = w.begin
				b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Always = true })
				if tt.pad {
					b.card.Flags = wire.CKFProtectedAuthenticationPath
					b.card.Typed = []byte(rightPIN)
				}
			})
			b.fake.Intercept(func(_ context.Context, _ *tokentest.FakeProcess, r wire.Request) bool {
				if r.Type == wire.TypeOperate {
					w.want(t, "while it signs", tt.want, tt.want)
				}
				return false
			})
			k := b.key(tt.id)
			ctx := context.WithValue(t.Context(), valueKey{}, "of the request")
			done := make(chan error, 1)
			go func() { done <- tokentest.Sign(ctx, k) }()
			if !tt.pad {
				p.Until(t, func() bool { return p.Prompts() == 1 })
				w.want(t, "at the prompt", 0, 0)
				close(wait)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			w.want(t, "after it", tt.want, 0)
			if tt.want > 0 && w.ctx.Value(valueKey{}) != "of the request" {
				t.Error("the context has lost what the request has put into it")
			}
		})
	}
}

// The work also ends after an error, a retry and a wrong signature.
func TestWorkingEnds(t *testing.T) {
	for name, set := range map[string]func(k *tokentest.FakeKey){
		"an error":        func(k *tokentest.FakeKey) { k.Returns = wire.CKRFunctionFailed },
		"a retry":         func(k *tokentest.FakeKey) { k.Returns = wire.CKRDeviceError },
		"wrong signature": func(k *tokentest.FakeKey) { k.Wrong = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := new(work)
			b := newBench(t, &tokentest.Person{Always: rightPIN}, func(_ *bench, opts *token.Options) { opts.Working = w.begin })
			b.card.Change(1, set)
			if b.sign() == nil {
				t.Fatal("it signs")
			}
			if began, going := w.counts(); began == 0 || going != 0 {
				t.Errorf("%d times begun, %d going on", began, going)
			}
		})
	}
	t.Run("no request waits any more", func(t *testing.T) {
		w := new(work)
		b := newBench(t, &tokentest.Person{Always: rightPIN}, func(_ *bench, opts *token.Options) { opts.Working = w.begin })
		b.fake.Intercept(func(ctx context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
			if r.Type != wire.TypeOperate {
				return false
			}
			<-ctx.Done()
			p.Fail(r, &wire.Error{Function: "C_Sign", RV: wire.CKRFunctionCanceled})
			return true
		})
		k := b.key(1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- tokentest.Sign(ctx, k) }()
		tokentest.Until(t, "the token works", func() bool { _, going := w.counts(); return going == 1 })
		cancel()
		<-done
		w.want(t, "after that", 1, 0)
	})
}
