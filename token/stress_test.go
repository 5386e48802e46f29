package token_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// Clients sign at random times. Disturbances come at random times too: the card is pulled, its
// module is killed, its login is lost, its answers are wrong. Each signature is right. No
// request waits for ever. The agent tries no wrong PIN. At the end, all keys sign.
// tokentest.Store checks that nothing is left.
func TestStress(t *testing.T) {
	const disturbances, clients = 300, 8
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, func(b *bench, _ *token.Options) {
		b.card.AddKey(tokentest.Ed25519, 2, "two", nil)
		b.card.AddKey(tokentest.P256, 3, "three", func(k *tokentest.FakeKey) { k.Always = true })
	})
	keys := []*token.Key{b.key(1), b.key(2), b.key(3)}
	var faults atomic.Int32 // how many of the next requests to sign fail
	b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type != wire.TypeOperate || faults.Load() <= 0 || faults.Add(-1) < 0 {
			return false
		}
		proc.Fail(r, &wire.Error{Function: "C_Sign", RV: wire.CKRDeviceError})
		return true
	})
	stop := make(chan struct{})
	var signed, failed atomic.Int64
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				ctx, cancel := context.WithCancel(t.Context())
				if random.IntN(10) == 0 {
					time.AfterFunc(time.Duration(random.IntN(3))*time.Millisecond, cancel) // the client hangs up
				}
				// tokentest.Sign verifies the signature.
				err := tokentest.Sign(ctx, keys[random.IntN(len(keys))])
				cancel()
				if err == nil {
					signed.Add(1)
					continue
				}
				failed.Add(1)
				if e, ok := errors.AsType[*pin.Error](err); ok && e.Tried {
					t.Errorf("a PIN was refused: %v", err)
				}
			}
		})
	}
	random := rand.New(rand.NewPCG(seed, clients))
	kills := 4 // more kills would only lengthen the pause before the next start
	for range disturbances {
		// The clients do some work between two disturbances. The work may fail.
		before := signed.Load() + failed.Load()
		tokentest.Until(t, "the clients go on", func() bool { return signed.Load()+failed.Load() > before+int64(random.IntN(20)) })
		switch random.IntN(6) {
		case 0:
			b.card.Remove()
			b.card.Insert()
		case 1:
			b.fake.Quietly(func() {
				b.card.Remove()
				b.card.Insert()
			})
		case 2:
			for _, proc := range b.fake.Processes() {
				if kills > 0 {
					kills--
					proc.Kill()
				}
			}
		case 3:
			b.card.LogOut(random.IntN(2) == 0)
		case 4:
			faults.Add(int32(random.IntN(3)))
		case 5:
			if err := b.store.LogoutAll(t.Context()); err != nil {
				t.Logf("log out: %v", err)
			}
		}
	}
	close(stop)
	all.Wait()
	t.Logf("%d signatures, %d failures, %d prompts", signed.Load(), failed.Load(), p.Prompts())
	if signed.Load() < disturbances {
		t.Errorf("only %d signatures", signed.Load())
	}
	faults.Store(0)
	b.fake.Intercept(nil)
	tokentest.Until(t, "everything works again", func() bool {
		for _, k := range keys {
			if tokentest.Sign(t.Context(), k) != nil {
				return false
			}
		}
		return true
	})
	want(t, "wrong PINs", b.card.Wrong(), 0)
	want(t, "open dialogues", p.Open(), 0)
	want(t, "dialogues at once", p.Most(), 1)
}

// Another program logs the token out while clients sign without a pause. Each signature meets at
// most one logout, and no signature fails. A logout costs at most one prompt.
func TestLogoutUnderLoad(t *testing.T) {
	const clients, logouts = 8, 40
	for _, noticed := range []bool{false, true} {
		t.Run(fmt.Sprintf("noticed by the module: %v", noticed), func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, nil)
			k := b.key(1)
			var all sync.WaitGroup
			var stop atomic.Bool
			var signed [clients]atomic.Int64
			for i := range clients {
				all.Go(func() {
					for !stop.Load() {
						if err := tokentest.Sign(t.Context(), k); err != nil {
							t.Error(err)
						}
						signed[i].Add(1)
					}
				})
			}
			for range logouts {
				for i := range signed {
					before := signed[i].Load()
					tokentest.Until(t, "every client goes on", func() bool { return signed[i].Load() > before+1 })
				}
				b.card.LogOut(noticed)
			}
			stop.Store(true)
			all.Wait()
			if n := p.Prompts(); n > logouts+1 {
				t.Errorf("%d prompts for %d logouts", n, logouts)
			}
		})
	}
}
