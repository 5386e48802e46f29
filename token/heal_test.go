package token_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/procstat"
	"p11-agent/token"
	"p11-agent/token/process"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

func TestMechanisms(t *testing.T) {
	hashOnly := []uint64{
		wire.CKMSHA1RSAPKCS, wire.CKMSHA256RSAPKCS, wire.CKMSHA384RSAPKCS, wire.CKMSHA512RSAPKCS,
		wire.CKMSHA256RSAPSS, wire.CKMSHA384RSAPSS, wire.CKMSHA512RSAPSS,
		wire.CKMECDSASHA1, wire.CKMECDSASHA256, wire.CKMECDSASHA384, wire.CKMECDSASHA512,
	}
	refuse := func(rv uint64) func(c *tokentest.FakeToken) {
		return func(c *tokentest.FakeToken) {
			c.Refuse = make(map[uint64]uint64)
			for _, m := range tokentest.RawMechanisms {
				c.Refuse[m] = rv
			}
		}
	}
	tests := []struct {
		name  string
		set   func(c *tokentest.FakeToken)
		first int // requests for the first signature
	}{
		{"raw not listed", func(c *tokentest.FakeToken) { c.Mechanisms = hashOnly }, 1},
		{"raw listed and invalid", refuse(wire.CKRMechanismInvalid), 2},
		{"raw listed and not supported", refuse(wire.CKRFunctionNotSupported), 2},
		{"raw listed, its data refused", refuse(wire.CKRDataLenRange), 2},
		{"no list, raw refused", func(c *tokentest.FakeToken) {
			refuse(wire.CKRMechanismInvalid)(c)
			c.Mechanisms = nil
		}, 2},
	}
	for _, tt := range tests {
		for _, kind := range []string{tokentest.RSA2048, tokentest.P256} {
			t.Run(tt.name+", "+kind, func(t *testing.T) {
				p := &tokentest.Person{Always: rightPIN}
				b := newBench(t, p, func(b *bench, _ *token.Options) {
					tt.set(b.card)
					b.card.AddKey(kind, 2, "two", nil)
				})
				for i := range 3 {
					if err := tokentest.Sign(t.Context(), b.key(2)); err != nil {
						t.Fatal(err)
					}
					want(t, "requests", b.fake.Requests(wire.TypeOperate), tt.first+i) // the agent remembers the refused mechanism
				}
				digest := sha256.Sum256([]byte("sign me"))
				_, err := b.key(2).Sign(nil, digest[:], crypto.SHA256)
				if err == nil || !strings.Contains(err.Error(), "does not sign digests") {
					t.Errorf("only the digest is known: %v", err)
				}
				want(t, "prompts", p.Prompts(), 1)
			})
		}
	}
}

func TestTokenComesAndGoes(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	k := b.key(1)
	want(t, "insertions", k.Insertions(), uint64(1))
	b.mustSign()
	for n := range 3 {
		b.card.Remove()
		tokentest.Keys(t, b.store, 0)
		if err := tokentest.Sign(t.Context(), k); !errors.Is(err, token.ErrAbsent) || !strings.Contains(err.Error(), `"card"`) {
			t.Errorf("got %v", err)
		}
		b.card.Insert()
		tokentest.Keys(t, b.store, 1)
		if err := tokentest.Sign(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		want(t, "insertions", k.Insertions(), uint64(n+2))
		want(t, "prompts", p.Prompts(), n+2)
	}
}

// The agent does not know yet that the token is back.
func TestTokenIsFoundOnUse(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	k := b.key(1)
	b.card.Remove()
	tokentest.Keys(t, b.store, 0)
	// The module reports no event.
	b.fake.Quietly(b.card.Insert)
	if err := tokentest.Sign(t.Context(), k); err != nil {
		t.Error(err)
	}
}

func TestPulledDuringSignature(t *testing.T) {
	for _, back := range []bool{false, true} {
		t.Run(fmt.Sprintf("put in again: %v", back), func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, nil)
			b.mustSign()
			k := b.key(1)
			var once sync.Once
			b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) (pulled bool) {
				if r.Type == wire.TypeOperate {
					once.Do(func() {
						b.card.Remove()
						if back {
							b.card.Insert()
						}
						pulled = true
						proc.Fail(r, &wire.Error{Function: "C_Sign", RV: wire.CKRDeviceRemoved})
					})
				}
				return pulled
			})
			err := tokentest.Sign(t.Context(), k)
			if back {
				noError(t, err)
				want(t, "prompts", p.Prompts(), 2)
			} else {
				want(t, "absent", errors.Is(err, token.ErrAbsent), true)
				want(t, "prompts", p.Prompts(), 1)
			}
		})
	}
}

// For each of these errors, the agent repairs the first failure of an operation.
func TestModuleFailsOnce(t *testing.T) {
	for _, rv := range []uint64{
		wire.CKRDeviceError, wire.CKRGeneralError, wire.CKRSessionHandleInvalid, wire.CKRSessionClosed,
		wire.CKRKeyHandleInvalid, wire.CKRCryptokiNotInitialized, wire.CKRTokenNotPresent,
	} {
		t.Run(wire.RVName(rv), func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			b := newBench(t, p, nil)
			b.mustSign()
			var fail sync.Mutex
			left := 1
			b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
				fail.Lock()
				defer fail.Unlock()
				if r.Type != wire.TypeOperate || left == 0 {
					return false
				}
				left--
				proc.Fail(r, &wire.Error{Function: "C_Sign", RV: rv})
				return true
			})
			b.mustSign()
			if n := p.Prompts(); n > 2 {
				t.Errorf("%d prompts", n)
			}
			fail.Lock()
			left = 2
			if rv == wire.CKRDeviceError {
				left = 3 // after the second failure, the agent starts the module again
			}
			fail.Unlock()
			err := b.sign()
			if e, ok := errors.AsType[*wire.Error](err); !ok || e.RV != rv {
				t.Errorf("failing twice: %v", err)
			}
			b.mustSign()
		})
	}
}

// The agent finds a wrong signature. It checks each RSA signature. Of other signatures, it checks
// the first of each module process, and each slow signature.
func TestWrongSignature(t *testing.T) {
	for _, tt := range []struct {
		name  string
		kind  string
		after bool          // right signatures came before
		takes time.Duration // at least
	}{
		{"RSA", tokentest.RSA2048, true, 0},
		{"the first one", tokentest.P256, false, 0},
		{"the first one of Ed25519", tokentest.Ed25519, false, 0},
		{"one of a card", tokentest.P256, true, 50 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, &tokentest.Person{Always: rightPIN}, func(b *bench, _ *token.Options) {
				b.card.AddKey(tt.kind, 2, "two", nil)
			})
			var wrong atomic.Bool
			b.fake.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
				if r.Type != wire.TypeOperate {
					return false
				}
				time.Sleep(tt.takes)
				if wrong.Load() {
					p.Reply(r, &wire.OperateReply{Result: slices.Repeat([]byte{0x5a}, int(r.Message.(*wire.Operate).ResultLen))})
				}
				return wrong.Load()
			})
			if tt.after {
				b.mustSignWith(2)
				b.mustSignWith(2)
			}
			wrong.Store(true)
			err := tokentest.Sign(t.Context(), b.key(2))
			if err == nil || !strings.Contains(err.Error(), "the token gave a wrong signature") || !strings.Contains(err.Error(), `"fake"`) {
				t.Errorf("got %v", err)
			}
			wrong.Store(false)
			b.mustSignWith(2)
		})
	}
}

// A module that misbehaves does not disturb other modules.
func TestMisbehavingModule(t *testing.T) {
	huge := make([]byte, 9)
	binary.BigEndian.PutUint32(huge, 1<<31)
	tests := []struct {
		name   string
		at     wire.Type
		do     func(p *tokentest.FakeProcess, r wire.Request)
		heals  bool
		prompt int // more prompts for it
	}{
		{"crashes", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) { p.Kill() }, true, 1},
		{"closes its socket", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) { p.Close() }, true, 1},
		{"answers with garbage", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) { p.Raw([]byte("HTTP/1.1 400 Bad\r\n\r\n")) }, true, 1},
		{"answers at great length", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) { p.Raw(huge) }, true, 1},
		{"ends in the middle of an answer", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) {
			p.Raw([]byte{0, 0, 0, 100, byte(wire.TypeReply), 0, 0})
			p.Kill()
		}, true, 1},
		{"closes in the middle of an answer", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) {
			p.Raw([]byte{0, 0, 0, 100, byte(wire.TypeReply), 0, 0, 0, 1, 0, 0})
			p.Close()
		}, true, 1},
		{"says that it is lost", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) {
			p.Lose(&wire.Error{Function: "C_WaitForSlotEvent", RV: wire.CKRGeneralError})
		}, true, 1},
		{"says that it is lost, and makes no sense", wire.TypeOperate, func(p *tokentest.FakeProcess, _ wire.Request) {
			p.Raw([]byte{0, 0, 0, 6, byte(wire.TypeLost), 0, 0, 0, 0, 9})
		}, true, 1},
		{"answers another question", wire.TypeOperate, func(p *tokentest.FakeProcess, r wire.Request) {
			r.ID += 1000
			p.Reply(r, &wire.OperateReply{})
		}, true, 1},
		{"answers with another message", wire.TypeOperate, func(p *tokentest.FakeProcess, r wire.Request) { p.Reply(r, &wire.TokenReply{}) }, false, 0},
		{"signs with nothing", wire.TypeOperate, func(p *tokentest.FakeProcess, r wire.Request) { p.Reply(r, &wire.OperateReply{}) }, false, 0},
		{"signs with what is no signature", wire.TypeOperate, func(p *tokentest.FakeProcess, r wire.Request) {
			p.Reply(r, &wire.OperateReply{Result: make([]byte, 64)})
		}, false, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &tokentest.Person{Always: rightPIN}
			good := tokentest.NewFake(t)
			good.AddToken("good", rightPIN).AddKey(tokentest.P256, 1, "one", nil)
			b := newBench(t, p, func(_ *bench, opts *token.Options) {
				spec := fakeSpec(good)
				spec.Name = "good"
				opts.Modules = append(opts.Modules, spec)
			})
			b.mustSign()
			var once sync.Once
			b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) (bad bool) {
				if r.Type == tt.at {
					once.Do(func() {
						bad = true
						if err := tokentest.Sign(t.Context(), tokentest.Key(t, b.store, "good", 1)); err != nil {
							t.Errorf("the other module: %v", err)
						}
						tt.do(proc, r)
					})
				}
				return bad
			})
			err := b.sign()
			want(t, "success", err == nil, tt.heals)
			if err != nil && !strings.Contains(err.Error(), `"fake"`) {
				t.Errorf("the error does not name the module: %v", err)
			}
			want(t, "prompts", p.Prompts(), 2+tt.prompt)
			b.mustSign()
			want(t, "prompts", p.Prompts(), 2+tt.prompt)
			want(t, "processes of the other module", good.Started(), 1)
		})
	}
}

// A look for tokens replaces a process that does no work. A request that has just begun to use
// the process does not fail, not even after an earlier failure of the process.
func TestReplacedAfterACrash(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	b.mustSign()
	noError(t, b.store.LogoutAll(t.Context()))
	var crashed, replaced atomic.Int64
	b.fake.Intercept(func(_ context.Context, p *tokentest.FakeProcess, r wire.Request) bool {
		switch {
		case r.Type != wire.TypeToken:
			return false
		case crashed.Add(1) == 1:
			p.Kill()
		case replaced.Add(1) <= 3:
			p.Lose(&wire.Error{Reason: wire.ReasonRenew})
		default:
			return false
		}
		return true
	})
	b.mustSign()
	want(t, "prompts", p.Prompts(), 2)
}

// A module crashes, and has the same keys after its next start. This does not count as an
// insertion.
func TestCrashIsNoInsertion(t *testing.T) {
	b := newBench(t, nil, nil)
	k := b.key(1)
	for n := 1; n <= 3; n++ {
		b.fake.Processes()[0].Kill()
		if err := b.store.Rescan(t.Context()); err != nil {
			t.Fatal(err)
		}
		tokentest.Until(t, "the module is started again", func() bool { return b.fake.Started() == n+1 && b.store.Modules()[0].Running })
	}
	want(t, "insertions", k.Insertions(), uint64(1))
	if !slices.Contains(b.store.Keys(), k) {
		t.Error("it is another key")
	}
	want(t, "restarts", b.store.Modules()[0].Restarts, 3)
}

// If a module process crashes before it has read a request, the kernel resets the connection. The
// agent takes that for an end of the process, not for a broken answer.
func TestCrashBeforeReading(t *testing.T) {
	wait := make(chan struct{})
	p := &tokentest.Person{Always: rightPIN, Wait: wait}
	b := newBench(t, p, nil)
	k := b.key(1)
	failed := make(chan error, 1)
	go func() { failed <- tokentest.Sign(t.Context(), k) }()
	p.Until(t, func() bool { return p.Prompts() == 1 })
	proc := b.fake.Processes()[0]
	noError(t, unix.Kill(proc.PID(), unix.SIGSTOP))
	tokentest.Until(t, "the module process has stopped", func() bool {
		s, ok := procstat.Of(proc.PID())
		return ok && s.State == 'T'
	})
	close(wait)
	tokentest.Until(t, "the PIN was sent", func() bool {
		return proctest.Count(func(g proctest.Goroutine) bool {
			return g.State == "select" && g.Runs((*process.Process).Call) && g.Runs(token.TryStay)
		}) > 0
	})
	proc.Kill()
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "crashed (killed)") {
		t.Errorf("got %v", err)
	}
}

// A look that finds no change does not change the generation.
func TestGeneration(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, nil)
	before, changed := b.store.Generation(), b.store.Changed()
	if err := b.store.Rescan(t.Context()); err != nil {
		t.Fatal(err)
	}
	want(t, "generation", b.store.Generation(), before)
	b.card.Remove()
	tokentest.Wait(t, changed)
	if b.store.Generation() == before {
		t.Error("the generation is the same")
	}
}

// The agent distinguishes tokens of the same name by their keys.
func TestTwins(t *testing.T) {
	var twin *tokentest.FakeToken
	person := &tokentest.Person{ByReader: map[string]string{"fake reader 0": rightPIN, "fake reader 1": "7-pears"}, Always: rightPIN}
	b := newBench(t, person, func(b *bench, _ *token.Options) {
		twin = b.fake.AddTwin(b.card)
		twin.SetPIN("7-pears")
		twin.AddKey(tokentest.P256, 7, "seven", nil)
	})
	want(t, "keys", len(b.store.Keys()), 2)
	st := b.store.Modules()[0]
	want(t, "tokens", len(st.Tokens), 2)
	for i, reader := range []string{"fake reader 0", "fake reader 1"} {
		want(t, "reader", st.Tokens[i].Reader, reader)
		want(t, "shadowed by", st.Tokens[i].Shadowed, "")
	}
	seven := tokentest.Key(t, b.store, b.card.ID().Label, 7)
	b.mustSign()
	noError(t, tokentest.Sign(t.Context(), seven))
	want(t, "dialogues", len(person.Asked()), 2)

	// The tokens change places. The agent finds each token by its keys.
	b.card.Remove()
	tokentest.Keys(t, b.store, 1)
	want(t, "reader of the only one", b.store.Modules()[0].Tokens[0].Reader, "")
	noError(t, tokentest.Sign(t.Context(), seven))
	b.card.Insert()
	tokentest.Keys(t, b.store, 2)
	noError(t, tokentest.Sign(t.Context(), seven))
	want(t, "dialogues", len(person.Asked()), 2)
	b.mustSign()
	want(t, "dialogues", len(person.Asked()), 3)
	want(t, "wrong PINs", b.card.Wrong()+twin.Wrong(), 0)
}

// Two modules show the same token. The agent uses the token through the first module.
func TestShadow(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, func(b *bench, opts *token.Options) {
		spec := opts.Modules[0]
		spec.Name = "second"
		opts.Modules = append(opts.Modules, spec)
	})
	keys := b.store.Keys()
	want(t, "keys", len(keys), 1)
	want(t, "module", keys[0].Module(), "fake")
	mods := b.store.Modules()
	want(t, "shadow of the first", mods[0].Tokens[0].Shadowed, "")
	want(t, "shadow of the second", mods[1].Tokens[0].Shadowed, "fake")
	b.mustSign()
}

// A list of the keys does not make the agent load a missing module again.
func TestMissingModule(t *testing.T) {
	path := filepath.Join(tokentest.TempDir(t), "missing.so")
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{realSpec("missing", path)}, Command: self})
	for range 100 {
		s.Poke()
		if err := s.Modules()[0].Err; err == nil || !strings.Contains(err.Error(), path) {
			t.Fatalf("got %v", err)
		}
	}
	want(t, "starts", s.Modules()[0].Restarts, 0)
}
