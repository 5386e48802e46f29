package token_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"p11-agent/token"
	"p11-agent/token/registry"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
	"p11-agent/token/wire"
)

// Cards come and go while no client sends a request. Each module reports it in its own way.
func TestPIVEvents(t *testing.T) {
	tokentest.Parallel(t)
	for _, tt := range []struct {
		name, module string
		waits        bool
	}{
		{"OpenSC", "opensc-pkcs11.so", true},
		{"Yubico", "libykcs11.so*", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			module := tokentest.Module(t, tt.module)
			p := tokentest.StartPCSCD(t, "Yubico Virtual")
			o := pivcard.Options{Name: "piv", PIN: pivPIN, YubiKey: true, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}}
			c := tokentest.NewCard(t, o)
			s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{realSpec("m", module, p.Env()...)}, Command: self})
			tokentest.Keys(t, s, 0)
			var last uint64
			for range 3 {
				p.Insert(0, c)
				tokentest.Until(t, "the card is seen", func() bool { return len(s.Keys()) > 0 })
				// A look that a busy machine disturbs may count an insertion twice.
				if n := s.Keys()[0].Insertions(); n <= last {
					t.Errorf("%d insertions after %d", n, last)
				} else {
					last = n
				}
				p.Remove(0)
				tokentest.Until(t, "the card is gone", func() bool { return len(s.Keys()) == 0 })
			}
			// The module still has its first process.
			st := s.Modules()[0]
			want(t, "waits", st.Waits, tt.waits)
			want(t, "restarts", st.Restarts, 0)
		})
	}
}

// One card replaces another, as fast as pcscd can distinguish them.
func TestPIVReplaced(t *testing.T) {
	tokentest.Parallel(t)
	p, c, _, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	idle(t, s)
	want(t, "waits", s.Modules()[0].Waits, true)
	other := tokentest.NewCard(t, pivcard.Options{Name: "other", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	for range 3 {
		for _, next := range []*pivcard.Card{other, c} {
			idle(t, s)
			p.Remove(0)
			p.Insert(0, next)
			label := map[*pivcard.Card]string{c: "piv", other: "other"}[next]
			tokentest.Until(t, "the other card is seen, and no more than that", func() bool {
				keys := s.Keys()
				return len(keys) == 1 && keys[0].Token().Label == label
			})
		}
	}
}

// switches counts the context switches of a process. The count grows while the process works.
func switches(t *testing.T, pid int) (n int) {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		status, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has just ended
		}
		if _, after, ok := bytes.Cut(status, []byte("\nvoluntary_ctxt_switches:")); ok {
			var one int
			if _, err := fmt.Sscan(string(after), &one); err != nil {
				t.Fatal(err)
			}
			n += one
		}
	}
	return n
}

// The reader service ends, and returns only after a long time. The agent replaces the process
// of the module at once, and only once. No client has to send a request for that.
func TestPIVWithoutPCSCD(t *testing.T) {
	tokentest.Parallel(t)
	p, c, person, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	k := tokentest.Key(t, s, "piv", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	idle(t, s)
	for n := range 2 {
		pid := s.Modules()[0].PID
		p.Stop()
		tokentest.Until(t, "the module has a new process, and no keys", func() bool {
			st := s.Modules()[0]
			return st.Running && st.PID != pid && len(s.Keys()) == 0
		})
		pid = s.Modules()[0].PID
		before := switches(t, pid)
		tokentest.Until(t, "the new process looks for readers", func() bool { return switches(t, pid) > before+30 })
		p.Start()
		tokentest.Until(t, "the key is back", func() bool { return len(s.Keys()) == 1 })
		st := s.Modules()[0]
		want(t, "process", st.PID, pid)
		want(t, "restarts", st.Restarts, n+1)
		noError(t, tokentest.Sign(t.Context(), k))
		want(t, "prompts", person.Prompts(), n+2)
		// The process waits for events again, so it notices at once if the service ends again.
		idle(t, s)
	}
	want(t, "wrong PINs", c.Counts().Wrong, 0)
}

// The reader service restarts. The agent repairs that before a request needs the card. If the
// service is back when OpenSC waits again, OpenSC itself repairs it. Otherwise the agent starts
// a new process.
func TestPIVPCSCDRestarted(t *testing.T) {
	tokentest.Parallel(t)
	p, c, person, s := pivStore(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	k := tokentest.Key(t, s, "piv", 1)
	noError(t, tokentest.Sign(t.Context(), k))
	idle(t, s)
	p.Restart()
	tokentest.Until(t, "the card is seen again, and that the login is gone", func() bool {
		st := s.Modules()[0]
		return st.Running && len(st.Tokens) == 1 && !st.Tokens[0].LoggedIn
	})
	pid := s.Modules()[0].PID
	noError(t, tokentest.Sign(t.Context(), k))
	want(t, "process", s.Modules()[0].PID, pid)
	want(t, "prompts", person.Prompts(), 2)
	want(t, "wrong PINs", c.Counts().Wrong, 0)
}

// A look that starts OpenSC again starts a new process, and does not call C_Finalize. A person
// can go on typing a PIN during the look.
func TestPIVRescan(t *testing.T) {
	tokentest.Parallel(t)
	p := tokentest.StartPCSCD(t)
	c := tokentest.NewCard(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	p.Insert(0, c)
	typing := make(chan struct{})
	person := &tokentest.Person{Always: pivPIN, Wait: typing}
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("opensc", tokentest.Module(t, "opensc-pkcs11.so"), p.Env()...)}, Command: self, PINs: person,
	}, pivPIN)
	k := tokentest.Key(t, s, "piv", 1)
	processes := make(map[int]bool)
	for range 10 {
		noError(t, s.Rescan(t.Context()))
		st := s.Modules()[0]
		processes[st.PID] = true
		want(t, "restarts", st.Restarts, 0)
		want(t, "insertions", k.Insertions(), uint64(1))
	}
	if len(processes) < 2 { // a thread may not wait at that moment
		t.Error("the process is ever the same")
	}
	signed := make(chan error)
	go func() { signed <- tokentest.Sign(t.Context(), k) }()
	person.Until(t, func() bool { return person.Open() == 1 })
	pid := s.Modules()[0].PID
	noError(t, s.Rescan(t.Context()))
	want(t, "process", s.Modules()[0].PID, pid)
	close(typing)
	noError(t, <-signed)
	noError(t, s.Rescan(t.Context())) // the process is logged in
	want(t, "process", s.Modules()[0].PID, pid)
	want(t, "prompts", person.Prompts(), 1)
}

// p11-kit remote serves one call after the other, and waits for events when a caller asks. So a
// request may block behind the wait. If the configuration does not say so, the agent finds out
// before a request has to wait.
func TestRemoteOneAtATime(t *testing.T) {
	tokentest.Parallel(t)
	client := tokentest.Module(t, "p11-kit-client.so")
	opensc := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t)
	c := tokentest.NewCard(t, pivcard.Options{Name: "piv", PIN: pivPIN, Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}}})
	p.Insert(0, c)
	for _, poll := range []bool{false, true} {
		t.Run(fmt.Sprintf("told=%v", poll), func(t *testing.T) {
			b, err := registry.NewBridge(registry.BridgeOptions{
				Command: []string{"p11-kit", "remote", opensc}, Env: append(os.Environ(), p.Env()...), Dir: tokentest.TempDir(t),
			})
			noError(t, err)
			ctx, cancel := context.WithCancel(context.Background())
			served := make(chan error, 1)
			go func() { served <- b.Serve(ctx) }()
			defer func() {
				cancel()
				noError(t, <-served)
			}()
			spec := realSpec("kit", client, "P11_KIT_SERVER_ADDRESS="+b.Address())
			spec.Poll = poll
			person := &tokentest.Person{Always: pivPIN}
			s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self, PINs: person}, pivPIN)
			defer s.Close()
			noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
			st := s.Modules()[0]
			want(t, "waits", st.Waits, false)
			want(t, "restarts", st.Restarts, 0)
			idle(t, s)
			p.Remove(0)
			tokentest.Until(t, "the card is gone", func() bool { return len(s.Keys()) == 0 })
			p.Insert(0, c)
			tokentest.Until(t, "the card is back", func() bool { return len(s.Keys()) == 1 })
		})
	}
}

// badStore returns a Store with a module that misbehaves on command, and a function that gives
// the module another command.
func badStore(t *testing.T, commands string, env ...string) (*token.Store, func(string)) {
	t.Helper()
	dir := tokentest.TempDir(t)
	file := filepath.Join(dir, "commands")
	command := func(commands string) {
		t.Helper()
		noError(t, os.WriteFile(file+".new", []byte(commands), 0o600))
		noError(t, os.Rename(file+".new", file))
	}
	command(commands)
	spec := realSpec("bad", tokentest.BuildBadModule(t), append(env, tokentest.BadModuleEnv("", file, filepath.Join(dir, "log"))...)...)
	return tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self}), command
}

// A module answers no request while it waits for events. The agent starts its process a second
// time, and reports no failure.
func TestOneAtATime(t *testing.T) {
	tokentest.Parallel(t)
	s, command := badStore(t, "wait serial")
	tokentest.Until(t, "the module runs", func() bool { return s.Modules()[0].Running })
	st := s.Modules()[0]
	if st.Err != nil || st.Restarts != 0 || st.Waits {
		t.Errorf("%+v", st)
	}
	want(t, "tokens", len(st.Tokens), 1)
	command("wait serial present=0")
	tokentest.Until(t, "the token is gone", func() bool { return len(s.Modules()[0].Tokens) == 0 })
}

// The agent may find out only later, when the module has something to wait for.
func TestOneAtATimeLater(t *testing.T) {
	tokentest.Parallel(t)
	s, command := badStore(t, "serial wait rv=C_WaitForSlotEvent:0x5 slots=0")
	tokentest.Until(t, "the module runs", func() bool { return s.Modules()[0].Running })
	pid := s.Modules()[0].PID
	command("serial wait slots=1")
	tokentest.Until(t, "another process has the token", func() bool {
		st := s.Modules()[0]
		return st.Running && st.PID != pid && len(st.Tokens) == 1
	})
	want(t, "restarts", s.Modules()[0].Restarts, 0)
	command("serial wait slots=1 present=0")
	tokentest.Until(t, "the token is gone", func() bool { return len(s.Modules()[0].Tokens) == 0 })
}

// A module loses its readers again and again. The agent starts the module at longer and longer
// intervals, and the status has the reason.
func TestLostReaders(t *testing.T) {
	tokentest.Parallel(t)
	s, command := badStore(t, "wait")
	for n := 1; n <= 3; n++ {
		command("wait rv=C_WaitForSlotEvent:0x5")
		tokentest.Until(t, "the process is replaced", func() bool { st := s.Modules()[0]; return st.Err != nil || st.Restarts == n })
		if err := s.Modules()[0].Err; err != nil && !strings.Contains(err.Error(), "it lost its readers") {
			t.Errorf("got %v", err)
		}
		command("wait")
		tokentest.Until(t, "the next one waits", func() bool { st := s.Modules()[0]; return st.Restarts == n && st.Waits })
	}
}

// The agent kills a process while a login is under way. The card may have tried the PIN, so the
// agent does not try the PIN again.
func TestKilledDuringLogin(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	k := b.key(1)
	b.fake.Intercept(func(ctx context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		switch r.Type {
		case wire.TypeLogin:
			b.card.Remove() // makes the agent list the slots
			<-ctx.Done()
			return true
		case wire.TypeSlots:
			if b.fake.Requests(wire.TypeLogin) == 1 {
				proc.Fail(r, &wire.Error{Function: "C_GetSlotList", RV: wire.CKRGeneralError})
				return true
			}
		}
		return false
	})
	err := tokentest.Sign(t.Context(), k)
	if err == nil || !strings.Contains(err.Error(), "its tokens cannot be listed") {
		t.Errorf("got %v", err)
	}
	want(t, "prompts", p.Prompts(), 1)
	want(t, "logins", b.fake.Requests(wire.TypeLogin), 1)
}

// As above, but the agent kills the process because another signature failed.
func TestKilledDuringLoginForAnother(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, func(b *bench, _ *token.Options) {
		b.card.AddKey(tokentest.P256, 2, "two", func(k *tokentest.FakeKey) { k.Public = true }) // so the agent expects no login
	})
	one, two := b.key(1), b.key(2)
	reached := make(chan struct{})
	b.fake.Intercept(func(ctx context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		switch r.Type {
		case wire.TypeLogin:
			close(reached) // a second try would close it twice, and panic
			<-ctx.Done()
			return true
		case wire.TypeOperate:
			proc.Fail(r, &wire.Error{Function: "C_Sign", RV: wire.CKRDeviceError})
			return true
		}
		return false
	})
	end := make(chan error, 1)
	go func() { end <- tokentest.Sign(t.Context(), one) }()
	tokentest.Wait(t, reached)
	if err := tokentest.Sign(t.Context(), two); err == nil {
		t.Error("the other key has signed")
	}
	if err := <-end; err == nil || !strings.Contains(err.Error(), "it failed; the agent starts a new process") {
		t.Errorf("got %v", err)
	}
	want(t, "prompts", p.Prompts(), 1)
	want(t, "logins", b.fake.Requests(wire.TypeLogin), 1)
}

// A token leaves after the module has listed its slots, and before the agent reads the token. The
// look counts the token as gone: the module need not report the removal again.
func TestLeftDuringLook(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, nil)
	b.mustSign()
	var leaves atomic.Bool
	b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		if r.Type != wire.TypeObjects || !leaves.Load() {
			return false
		}
		proc.Fail(r, &wire.Error{Reason: wire.ReasonNoToken})
		return true
	})
	leaves.Store(true)
	noError(t, b.store.Rescan(t.Context()))
	if has(b.store, "card") {
		t.Error("the key of the token that left is listed")
	}
	leaves.Store(false)
	noError(t, b.store.Rescan(t.Context()))
	want(t, "insertions", b.key(1).Insertions(), uint64(2))
}

// A token leaves while the agent reads it, and the module reports so. The look does not count the
// token as inserted again.
func TestReportedDuringLook(t *testing.T) {
	b := newBench(t, &tokentest.Person{Always: rightPIN}, nil)
	b.mustSign()
	var leaves, reported atomic.Bool
	b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		o, ok := r.Message.(*wire.Objects)
		if !ok || !leaves.Load() {
			return false
		}
		reason := &wire.Error{Reason: wire.ReasonNoToken}
		if !reported.Swap(true) {
			proc.Gone(wire.SlotID{ID: o.Slot})
			reason = &wire.Error{Reason: wire.ReasonModule, Function: "C_GetTokenInfo", RV: wire.CKRTokenNotPresent}
		}
		proc.Fail(r, reason)
		return true
	})
	leaves.Store(true)
	for range 2 {
		noError(t, b.store.Rescan(t.Context()))
		if has(b.store, "card") {
			t.Error("the key of the token that left is listed")
		}
	}
	leaves.Store(false)
	noError(t, b.store.Rescan(t.Context()))
	want(t, "insertions", b.key(1).Insertions(), uint64(2))
}
