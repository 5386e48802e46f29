package module

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"math/big"
	"path/filepath"
	"sync"
	"testing"

	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// lane opens a lane, which closes with the test.
func (p *process) lane(id wire.TokenID) *wire.Lane {
	p.t.Helper()
	l, err := p.lanes.Open(id)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = l.Close() })
	return l
}

// ask makes a signature on a lane.
func ask(l *wire.Lane, id uint32, m *wire.Operate) ([]byte, error) {
	if err := l.Send(id, m); err != nil {
		return nil, err
	}
	return answer(l)
}

func answer(l *wire.Lane) ([]byte, error) {
	var reply wire.OperateReply
	f, err := l.Receive()
	if err == nil {
		err = f.Decode(&reply)
	}
	return reply.Result, err
}

// Lanes make the same signatures as the process, side by side, and go on after a failure.
func TestLanes(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	hsm.AddToken("work", "")
	hsm.GenerateKey("work", tokentest.P256, "01", "one")
	hsm.GenerateKey("work", tokentest.P256, "02", "two")
	hsm.AddToken("other", "")
	p := start(t, hsm.Env()...)
	p.hello(hsm.Module())
	id := p.token("work")
	digest := sha256.Sum256([]byte("data"))
	var keys []*ecdsa.PublicKey
	var requests []*wire.Operate
	if _, err := p.login(id, tokentest.PIN); err != nil {
		t.Fatal(err)
	}
	for _, o := range p.objects(id) {
		if o.Class != wire.CKOPublicKey {
			continue
		}
		k := keyID(t, id, o)
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), k.ECPoint)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
		requests = append(requests, &wire.Operate{Key: k, Mechanism: wire.CKMECDSA, ResultLen: 64, Data: digest[:]})
	}
	check := func(key *ecdsa.PublicKey, sig []byte) {
		if len(sig) != 64 || !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
			t.Errorf("a wrong signature: %x", sig)
		}
	}
	var all sync.WaitGroup
	for n := range 8 {
		l := p.lane(id)
		all.Go(func() {
			for i := range uint32(50) {
				which := (n + int(i)) % len(keys)
				sig, err := ask(l, i+1, requests[which])
				if err != nil {
					t.Errorf("lane %d, signature %d: %v", n, i, err)
					return
				}
				check(keys[which], sig)
			}
		})
	}
	all.Wait()

	l := p.lane(id)
	unknown := *requests[0]
	unknown.Key.ID = []byte{9}
	_, err := ask(l, 1, &unknown)
	wantReason(t, err, wire.ReasonNoKey)
	elsewhere := *requests[0]
	elsewhere.Key.Token = p.token("other")
	_, err = ask(l, 2, &elsewhere)
	wantReason(t, err, wire.ReasonProtocol)
	sig, err := ask(l, 3, requests[0])
	if err != nil {
		t.Fatal(err)
	}
	check(keys[0], sig)

	// A logout does not wait for an idle lane. After it the lane makes no signature.
	if err := p.do(wire.TypeLogout, &wire.Token{Token: id}, new(wire.TokenReply)); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(l, 4, requests[0]); err == nil {
		t.Error("a signature without a login")
	}
}

// The agent can cancel a request that waits in the process. A request in the module goes
// on. In both cases the process sees the end of the agent.
func TestCancelOnLane(t *testing.T) {
	b := startBad(t, "")
	b.ready(tokentest.BuildBadModule(t))
	b.command("sessions=2 hang=C_Sign release=" + filepath.Join(b.dir, "go"))
	reached, waiting := b.lane(badToken(0)), b.lane(badToken(0))
	if err := reached.Send(1<<30, badSign()); err != nil {
		t.Fatal(err)
	}
	b.waitForCall("C_Sign", 1)
	// No other session for signatures exists.
	if err := waiting.Send(1<<30+1, badSign()); err != nil {
		t.Fatal(err)
	}
	// A request that the process has not read yet cannot be cancelled. So the test
	// repeats the Cancel.
	done := make(chan error, 1)
	go func() {
		_, err := answer(waiting)
		done <- err
	}()
	for cancelled := false; !cancelled; {
		for _, id := range []uint32{1 << 30, 1<<30 + 1} {
			if err := b.conn.WriteRequest(1<<31, wire.TypeCancel, &wire.Cancel{Request: id}); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-done:
			wantRV(t, err, "", wire.CKRFunctionCanceled)
			cancelled = true
		default:
		}
	}
	if reached.Ready(0) {
		t.Error("what the module has is answered for")
	}
	b.conn.Close()
	if status := b.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	var failed *wire.Error
	if _, err := answer(reached); err == nil || errors.As(err, &failed) {
		t.Errorf("the process has ended: %v", err)
	}
}
