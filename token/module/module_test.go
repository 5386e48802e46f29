package module

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// A bad is a module process with the misbehaving module.
type bad struct {
	*process
	dir string
}

func startBad(t *testing.T, commands string) *bad {
	t.Helper()
	dir := tokentest.TempDir(t)
	env := tokentest.BadModuleEnv(commands, filepath.Join(dir, "commands"), filepath.Join(dir, "log"))
	return &bad{process: start(t, env...), dir: dir}
}

// command gives the module other commands.
func (b *bad) command(commands string) {
	b.t.Helper()
	// The file is replaced at once, because the module reads it at any time.
	temp := filepath.Join(b.dir, "new")
	if err := os.WriteFile(temp, []byte(commands), 0o600); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(b.dir, "commands")); err != nil {
		b.t.Fatal(err)
	}
}

// release makes the hanging functions go on, after the command release=dir/go.
func (b *bad) release() {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, "go"), nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// calls counts the calls of a function so far.
func (b *bad) calls(function string) int {
	b.t.Helper()
	log, err := os.ReadFile(filepath.Join(b.dir, "log"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.t.Fatal(err)
	}
	return bytes.Count(log, []byte(function+"\n"))
}

// waitForCall waits until a function has been called n times.
func (b *bad) waitForCall(function string, n int) {
	b.t.Helper()
	proctest.Until(b.t, function+" is called", func() bool { return b.calls(function) >= n })
}

// badToken is the identity of the token in a slot.
func badToken(slot int) wire.TokenID {
	return wire.TokenID{Label: "bad", Manufacturer: "Bad Company", Model: "worst", Serial: fmt.Sprintf("%04d", slot)}
}

func badSign() *wire.Operate {
	return &wire.Operate{
		Key:       wire.KeyID{Token: badToken(0), ID: []byte{1}, Label: "rsa key", KeyType: wire.CKKRSA, Modulus: bytes.Repeat([]byte{0xc3}, 256)},
		Mechanism: wire.CKMRSAPKCS,
		ResultLen: 256,
		Data:      []byte("digest"),
	}
}

// ready loads the module and logs in.
func (b *bad) ready(module string) {
	b.t.Helper()
	b.hello(module)
	if _, err := b.login(badToken(0), "1234"); err != nil {
		b.t.Fatalf("login: %v", err)
	}
}

func TestOneSignature(t *testing.T) {
	b := startBad(t, "")
	b.ready(tokentest.BuildBadModule(t))
	if _, err := b.sign(badSign()); err != nil {
		t.Fatal(err)
	}
	functions := []string{"C_SignInit", "C_Sign", "C_FindObjectsInit", "C_GetAttributeValue", "C_OpenSession", "C_GetTokenInfo", "C_GetSessionInfo", "C_CloseSession"}
	before := map[string]int{}
	for _, f := range functions {
		before[f] = b.calls(f)
	}
	const n = 5
	for range n {
		s, err := b.sign(badSign())
		if err != nil || !bytes.Equal(s, bytes.Repeat([]byte{0x5a}, 256)) {
			t.Fatalf("%x, %v", s, err)
		}
	}
	for _, f := range functions {
		want := 0
		if f == "C_SignInit" || f == "C_Sign" {
			want = n
		}
		if got := b.calls(f) - before[f]; got != want {
			t.Errorf("%d calls of %s for %d signatures, want %d", got, f, n, want)
		}
	}
}

// The process reports each misbehaviour of the module. Only the request fails.
func TestMisbehaviour(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	signs := func(b *bad) error { _, err := b.sign(badSign()); return err }
	lists := func(b *bad) error {
		return b.do(wire.TypeObjects, &wire.Objects{Token: badToken(0)}, new(wire.ObjectsReply))
	}
	slots := func(b *bad) error { return b.do(wire.TypeSlots, &wire.Slots{}, new(wire.SlotsReply)) }
	tests := []struct {
		commands string
		do       func(*bad) error
		function string
		rv       uint64
	}{
		{"slots=1000000000", slots, "C_GetSlotList", 0},
		{"rv=C_GetSlotList:0x5", slots, "C_GetSlotList", wire.CKRGeneralError},
		{"find=endless", lists, "C_FindObjects", 0},
		{"find=more", lists, "C_FindObjects", 0},
		{"rv=C_FindObjects:0x30", lists, "C_FindObjects", wire.CKRDeviceError},
		{"rv=C_FindObjectsFinal:0x6", lists, "C_FindObjectsFinal", wire.CKRFunctionFailed},
		{"signature=long", signs, "C_Sign", 0},
		{"signature=empty", signs, "C_Sign", 0},
		{"rv=C_Sign:0x30", signs, "C_Sign", wire.CKRDeviceError},
		{"rv=C_Sign:0x150", signs, "C_Sign", wire.CKRBufferTooSmall},
		{"rv=C_Sign:0x80001234", signs, "C_Sign", 0x80001234},
		{"rv=C_SignInit:0x90", signs, "C_SignInit", wire.CKROperationActive},
		{"rv=C_SignInit:0x70", signs, "C_SignInit", wire.CKRMechanismInvalid},
		{"rv=C_SignInit:0x60", signs, "C_SignInit", wire.CKRKeyHandleInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.commands, func(t *testing.T) {
			b := startBad(t, "")
			b.ready(module)
			if err := signs(b); err != nil {
				t.Fatal(err)
			}
			b.command(tt.commands)
			wantRV(t, tt.do(b), tt.function, tt.rv)
			b.command("")
			for range maxSessions + 1 { // a session that was not given back would be missing
				if err := signs(b); err != nil {
					t.Fatalf("a signature afterwards: %v", err)
				}
			}
			if err := lists(b); err != nil {
				t.Errorf("a list afterwards: %v", err)
			}
		})
	}
}

// A module may want more room than its answer takes. It gets the room, and its answer is
// the same as with enough room. If a module never has enough room, the call fails, and
// the module goes on.
func TestRoomAskedFor(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	for _, tt := range []struct {
		commands string
		calls    int // of C_Sign
		fails    bool
	}{
		{"sign-room=72", 1, false}, // there is room for 256 bytes
		{"sign-room=264", 2, false},
		{"sign-room=8192", 2, false},
		{"sign-room=mute", 2, false},
		{"sign-room=8193", 1, true},
		{"sign-room=1000000000000", 1, true},
		{"sign-room=more", 4, true},
	} {
		t.Run(tt.commands, func(t *testing.T) {
			b := startBad(t, "")
			b.ready(module)
			if _, err := b.sign(badSign()); err != nil {
				t.Fatal(err)
			}
			for _, alone := range []bool{false, true} { // with a PIN for each use, too
				b.command(tt.commands)
				inits, signs := b.calls("C_SignInit"), b.calls("C_Sign")
				m := badSign()
				if alone {
					b.command(tt.commands + " always")
					m.ContextLogin, m.PIN = true, secrettest.Of(t, "1234")
				}
				got, err := b.sign(m)
				switch {
				case tt.fails && err == nil:
					t.Errorf("there is a signature: %x", got)
				case !tt.fails && (err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0x5a}, 256))):
					t.Errorf("%x, %v", got, err)
				}
				if n := b.calls("C_Sign") - signs; n != tt.calls {
					t.Errorf("%d calls of C_Sign, want %d", n, tt.calls)
				}
				if n := b.calls("C_SignInit") - inits; n != 1 {
					t.Errorf("%d calls of C_SignInit", n)
				}
			}
			b.command("")
			for range maxSessions + 1 { // a session that was not given back would be missing
				if _, err := b.sign(badSign()); err != nil {
					t.Fatalf("a signature afterwards: %v", err)
				}
			}
		})
	}
	for _, tt := range []struct {
		commands string
		slots    int
		objects  int
	}{
		{"list-room=16", 1, 2},
		{"list-room=1000000000", -1, 2},
		{"attribute-room=8", 1, 2},
		{"attribute-room=5000", 1, 2},
		{"attribute-room=65537", 1, 0},
		{"attribute-room=1000000000000", 1, 0},
	} {
		t.Run(tt.commands, func(t *testing.T) {
			b := startBad(t, "")
			b.ready(module)
			whole := b.objects(badToken(0))
			b.command(tt.commands)
			r := new(wire.SlotsReply)
			if err := b.do(wire.TypeSlots, &wire.Slots{}, r); (err != nil) != (tt.slots < 0) || err == nil && len(r.Slots) != tt.slots {
				t.Errorf("%d slots, %v", len(r.Slots), err)
			} else if err == nil && len(r.Slots[0].Mechanisms) != 2 {
				t.Errorf("mechanisms: %+v", r.Slots[0].Mechanisms)
			}
			got := b.objects(badToken(0))
			if tt.objects == 0 && len(got) > 0 || tt.objects > 0 && !reflect.DeepEqual(got, whole) {
				t.Errorf("objects: %+v\nwant: %+v", got, whole)
			}
			b.command("")
			if got := b.objects(badToken(0)); !reflect.DeepEqual(got, whole) {
				t.Errorf("objects afterwards: %+v", got)
			}
		})
	}
}

func TestLyingLists(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	for _, tt := range []struct {
		name, commands string
		check          func(*testing.T, *bad)
	}{
		{"a token with a billion mechanisms costs its slot", "mechanisms=1000000000 slots=2", func(t *testing.T, b *bad) {
			if s := b.slots(false); len(s) != 0 {
				t.Errorf("slots: %+v", s)
			}
			proctest.Until(t, "it is told", func() bool { return strings.Contains(b.stderr.String(), "slot 1 is left out") })
		}},
		{"a failing slot costs itself", "rv=C_GetTokenInfo:0x30 slots=2 present=1", func(t *testing.T, b *bad) {
			if s := b.slots(false); len(s) != 1 || s[0].ID != 1 || s[0].HasToken {
				t.Errorf("slots: %+v", s)
			}
		}},
		{"an unknown card is none", "rv=C_GetTokenInfo:0xe1", func(t *testing.T, b *bad) {
			if s := b.slots(false); len(s) != 1 || s[0].HasToken {
				t.Errorf("slots: %+v", s)
			}
		}},
		{"garbage lengths make attributes missing", "attributes=garbage", func(t *testing.T, b *bad) {
			if l := b.objects(badToken(0)); len(l) != 0 {
				t.Errorf("objects: %+v", l)
			}
		}},
		{"a module that stops is asked again", "attributes=stop", func(t *testing.T, b *bad) {
			l := b.objects(badToken(0))
			if len(l) != 2 || l[0].Private != wire.Unknown || l[0].Sign != wire.True || l[0].Label != "rsa key" || len(l[0].Modulus) != 256 || len(l[1].ECPoint) != 67 {
				t.Errorf("objects: %+v", l)
			}
		}},
		{"wild values", "attributes=wild", func(t *testing.T, b *bad) {
			if l := b.objects(badToken(0)); len(l) != 0 { // the object has no type of key
				t.Errorf("objects: %+v", l)
			}
		}},
		{"noise", "noise", func(t *testing.T, b *bad) {
			if l := b.objects(badToken(0)); len(l) != 2 {
				t.Errorf("objects: %+v", l)
			}
			proctest.Until(t, "the noise goes to standard error", func() bool {
				out := b.stderr.String()
				return strings.Contains(out, "noise on standard output") && strings.Contains(out, "noise on standard error")
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := startBad(t, tt.commands)
			b.hello(module)
			tt.check(t, b)
		})
	}
}

func TestCrash(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	t.Run("while loading", func(t *testing.T) {
		b := startBad(t, "crash=C_Initialize")
		err := b.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: module}, new(wire.HelloReply))
		if !errors.Is(err, errEnded) {
			t.Errorf("got %v", err)
		}
		b.wait()
		if ws := b.cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGSEGV {
			t.Errorf("the process ended with %v", b.cmd.ProcessState)
		}
		for _, secret := range []string{"rax", "goroutine"} { // registers and stacks may hold a PIN
			if strings.Contains(b.stderr.String(), secret) {
				t.Errorf("standard error has %q", secret)
			}
		}
	})
	for _, commands := range []string{"crash=C_Sign", "exit=C_Sign"} {
		t.Run(commands, func(t *testing.T) {
			b := startBad(t, "")
			b.ready(module)
			b.command(commands)
			if _, err := b.sign(badSign()); !errors.Is(err, errEnded) {
				t.Errorf("got %v", err)
			}
			if status := b.wait(); status == 0 {
				t.Error("exit status 0")
			}
		})
	}
}

// The process ends with the socket, even if the module hangs.
func TestHang(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	for _, tt := range []struct {
		function string
		do       func(*bad)
	}{
		{"C_Initialize", func(b *bad) { b.send(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: module}) }},
		{"C_GetSlotList", func(b *bad) {
			b.hello(module)
			b.send(wire.TypeSlots, &wire.Slots{})
		}},
		{"C_Sign", func(b *bad) {
			b.ready(module)
			for range 100 { // more requests than sessions
				b.send(wire.TypeOperate, badSign())
			}
		}},
	} {
		t.Run(tt.function, func(t *testing.T) {
			b := startBad(t, "hang="+tt.function)
			tt.do(b)
			b.waitForCall(tt.function, 1)
			b.conn.Close()
			if status := b.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	b := startBad(t, "")
	b.ready(tokentest.BuildBadModule(t))
	b.command("hang=C_Sign release=" + filepath.Join(b.dir, "go"))
	var reached []call
	for range maxSessions {
		reached = append(reached, b.send(wire.TypeOperate, badSign()))
	}
	b.waitForCall("C_Sign", maxSessions)
	waiting := b.send(wire.TypeOperate, badSign())
	logout := b.send(wire.TypeLogout, &wire.Token{Token: badToken(0)})
	for _, c := range append([]call{waiting, logout}, reached...) {
		if err := b.conn.WriteRequest(1<<31, wire.TypeCancel, &wire.Cancel{Request: c.id}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []call{waiting, logout} {
		wantRV(t, c.result(new(wire.OperateReply)), "", wire.CKRFunctionCanceled)
	}
	b.release()
	for _, c := range reached {
		if err := c.result(new(wire.OperateReply)); err != nil {
			t.Errorf("a signature that had reached the module: %v", err)
		}
	}
	if n := b.calls("C_Logout"); n != 0 {
		t.Error("logged out, though cancelled")
	}
}

// A logout waits for signatures. A signature that comes later waits for the logout.
func TestLogoutWaits(t *testing.T) {
	b := startBad(t, "")
	b.ready(tokentest.BuildBadModule(t))
	b.command("hang=C_Sign release=" + filepath.Join(b.dir, "go"))
	signature := b.send(wire.TypeOperate, badSign())
	b.waitForCall("C_Sign", 1)
	logout := b.send(wire.TypeLogout, &wire.Token{Token: badToken(0)})
	b.slots(false) // the answer shows that the process has read the request to log out
	if n := b.calls("C_Logout"); n != 0 {
		t.Error("logged out during a signature")
	}
	b.release()
	if err := signature.result(new(wire.OperateReply)); err != nil {
		t.Error(err)
	}
	if err := logout.result(new(wire.TokenReply)); err != nil {
		t.Error(err)
	}
}

func TestSessions(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	for _, tt := range []struct {
		commands string
		most     int // open sessions, including the one that keeps the login
	}{
		{"", maxSessions + 1},
		{"sessions=1", 1},
		{"sessions=2", 2},
		{"sessions=5", 5},
		{"limit=1", 1},
		{"limit=3", 3},
	} {
		t.Run(tt.commands, func(t *testing.T) {
			b := startBad(t, tt.commands)
			b.command(tt.commands)
			b.ready(module)
			b.command(tt.commands + " hang=C_Sign release=" + filepath.Join(b.dir, "go"))
			var all []call
			for range maxSessions + 8 {
				all = append(all, b.send(wire.TypeOperate, badSign()))
			}
			b.waitForCall("C_Sign", max(1, tt.most-1))
			b.release()
			for _, c := range all {
				if err := c.result(new(wire.OperateReply)); err != nil {
					t.Error(err)
				}
			}
			if n := b.calls("C_CloseSession"); n != 0 {
				t.Errorf("%d sessions were closed", n)
			}
			b.command(tt.commands + " rv=C_Sign:0x30")
			_, err := b.sign(badSign())
			wantRV(t, err, "C_Sign", wire.CKRDeviceError)
			b.command(tt.commands)
			if tt.most == 1 { // the login has gone with the only session
				if _, err := b.login(badToken(0), "1234"); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := b.sign(badSign()); err != nil {
				t.Errorf("a signature afterwards: %v", err)
			}
		})
	}
}

// A signature that has not begun costs no session. On a token with one session, the login
// would go with it.
func TestRefusedMechanismKeepsLogin(t *testing.T) {
	b := startBad(t, "sessions=1")
	b.ready(tokentest.BuildBadModule(t))
	b.command("sessions=1 rv=C_SignInit:0x70")
	_, err := b.sign(badSign())
	wantRV(t, err, "C_SignInit", wire.CKRMechanismInvalid)
	b.command("sessions=1")
	if _, err := b.sign(badSign()); err != nil {
		t.Error(err)
	}
}

func TestPINTries(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	id := badToken(0)
	t.Run("last try and locked", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		for n := range 2 {
			_, err := b.login(id, "0000")
			wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
			e := failure(t, err)
			if final := e.Info.Flags&wire.CKFUserPINFinalTry != 0; !e.HasInfo || final != (n == 1) {
				t.Errorf("after %d wrong PINs: %+v", n+1, e)
			}
		}
		_, err := b.login(id, "1234")
		wantReason(t, err, wire.ReasonLastTry)
		if !failure(t, err).HasInfo {
			t.Error("the state of the token is not told")
		}
		if n := b.calls("C_Login"); n != 2 {
			t.Errorf("%d calls of C_Login, want 2", n)
		}
		err = b.do(wire.TypeLogin, &wire.Login{Token: id, LastTry: true, PIN: secrettest.Of(t, "0000")}, new(wire.TokenReply))
		wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
		err = b.do(wire.TypeLogin, &wire.Login{Token: id, LastTry: true, PIN: secrettest.Of(t, "1234")}, new(wire.TokenReply))
		wantReason(t, err, wire.ReasonPINLocked)
		if n := b.calls("C_Login"); n != 3 {
			t.Errorf("%d calls of C_Login, want 3", n)
		}
	})
	t.Run("another token in the slot", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		b.objects(id)
		b.command("label=other")
		_, err := b.login(id, "1234")
		wantReason(t, err, wire.ReasonOtherToken)
		_, err = b.login(id, "1234")
		wantReason(t, err, wire.ReasonNoToken)
		if n := b.calls("C_Login"); n != 0 {
			t.Error("the PIN was tried on another token")
		}
		b.command("")
		if _, err := b.login(id, "1234"); err != nil {
			t.Error(err)
		}
	})
	t.Run("no PIN", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		err := b.do(wire.TypeLogin, &wire.Login{Token: id}, new(wire.TokenReply))
		wantReason(t, err, wire.ReasonProtocol)
	})
	for _, flags := range []string{"flags=0x100", ""} { // also if the token denies it: some tokens are wrong
		t.Run("typed on the reader "+flags, func(t *testing.T) {
			b := startBad(t, flags)
			b.hello(module)
			var reply wire.TokenReply
			if err := b.do(wire.TypeLogin, &wire.Login{Token: id, Pad: true}, &reply); err != nil || !reply.Info.LoggedIn {
				t.Errorf("%+v, %v", reply, err)
			}
		})
	}
}

func TestContextLogin(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	b := startBad(t, "always")
	b.command("always")
	b.ready(module)
	always := wire.Unknown
	for _, o := range b.objects(badToken(0)) {
		if o.Class == wire.CKOPrivateKey {
			always = o.AlwaysAuth
		}
	}
	if always != wire.True {
		t.Error("the key does not say that it wants a PIN each time")
	}
	_, err := b.sign(badSign())
	wantRV(t, err, "C_Sign", wire.CKRUserNotLoggedIn)
	with := func(pin string) *wire.Operate {
		m := badSign()
		m.ContextLogin, m.PIN = true, secrettest.Of(t, pin)
		return m
	}
	if _, err := b.sign(with("1234")); err != nil {
		t.Fatal(err)
	}
	_, err = b.sign(with("0000"))
	wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
	if e := failure(t, err); !e.HasInfo || e.Info.Flags&wire.CKFUserPINCountLow == 0 || !e.Info.LoggedIn {
		t.Errorf("after a wrong PIN: %+v", e)
	}
	b.command("") // a key without a PIN for each use: nothing is left of the signature
	for range maxSessions + 1 {
		if _, err := b.sign(badSign()); err != nil {
			t.Fatalf("another key afterwards: %v", err)
		}
	}
	b.command("always")
	_, err = b.sign(with("0000"))
	wantRV(t, err, "C_Login", wire.CKRPINIncorrect)
	logins := b.calls("C_Login")
	_, err = b.sign(with("1234"))
	wantReason(t, err, wire.ReasonLastTry)
	if n := b.calls("C_Login"); n != logins {
		t.Error("the last try was used")
	}
	b.command("always hang=C_Sign release=" + filepath.Join(b.dir, "go"))
	last := with("1234")
	last.LastTry = true
	before := b.calls("C_SignInit")
	alone := b.send(wire.TypeOperate, last)
	signs := b.calls("C_Sign")
	proctest.Until(t, "C_Sign is called", func() bool { return b.calls("C_Sign") > signs || b.calls("C_SignInit") > before })
	other := b.send(wire.TypeOperate, badSign())
	b.slots(false)
	if n := b.calls("C_SignInit"); n > before+1 {
		t.Error("another signature came in between")
	}
	b.release()
	if err := alone.result(new(wire.OperateReply)); err != nil {
		t.Error(err)
	}
	wantRV(t, other.result(new(wire.OperateReply)), "C_Sign", wire.CKRUserNotLoggedIn)
}

// The process finds keys again after another program has made their handles useless.
func TestKeyHandleChanges(t *testing.T) {
	b := startBad(t, "")
	b.ready(tokentest.BuildBadModule(t))
	for i := range 3 {
		b.command("forget=" + strconv.Itoa(i))
		if _, err := b.sign(badSign()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEvents(t *testing.T) {
	b := startBad(t, "slots=2 present=2")
	b.hello(tokentest.BuildBadModule(t))
	if n := len(b.slots(false)); n != 2 {
		t.Fatalf("%d slots", n)
	}
	if _, err := b.login(badToken(1), "1234"); err != nil {
		t.Fatal(err)
	}
	infos := b.calls("C_GetTokenInfo")
	b.command("slots=2 present=1")
	<-b.events
	b.command("slots=2 present=2")
	<-b.events
	if n := b.calls("C_GetTokenInfo"); n != infos {
		t.Error("the poll disturbs the cards")
	}
	// The token was away, so the process forgets its sessions.
	opened := b.calls("C_OpenSession")
	var reply wire.TokenReply
	if err := b.do(wire.TypeToken, &wire.Token{Token: badToken(1)}, &reply); err != nil {
		t.Fatal(err)
	}
	if b.calls("C_OpenSession") == opened {
		t.Error("the session of the token that was away is in use")
	}
	b.command("slots=3 present=2")
	<-b.events
}

func TestProtocol(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	t.Run("request before hello", func(t *testing.T) {
		b := startBad(t, "")
		wantReason(t, b.do(wire.TypeSlots, &wire.Slots{}, new(wire.SlotsReply)), wire.ReasonProtocol)
	})
	t.Run("another version", func(t *testing.T) {
		b := startBad(t, "")
		err := b.do(wire.TypeHello, &wire.Hello{Version: wire.Version + 1, Path: module}, new(wire.HelloReply))
		wantReason(t, err, wire.ReasonProtocol)
		if !strings.Contains(err.Error(), "restart") {
			t.Errorf("%v: it does not say what to do", err)
		}
	})
	t.Run("hello twice", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		err := b.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: module}, new(wire.HelloReply))
		wantReason(t, err, wire.ReasonProtocol)
	})
	t.Run("a number twice", func(t *testing.T) {
		b := startBad(t, "")
		b.hello(module)
		b.command("hang=C_GetSlotList")
		c := b.send(wire.TypeSlots, &wire.Slots{})
		if err := b.conn.WriteRequest(c.id, wire.TypeSlots, &wire.Slots{}); err != nil {
			t.Fatal(err)
		}
		if status := b.wait(); status != 1 {
			t.Errorf("exit status %d", status)
		}
	})
}

func TestLoadErrors(t *testing.T) {
	dir := tokentest.TempDir(t)
	good := tokentest.BuildModule(t, "other", []byte("int other;\n"))
	foreign := func(machine uint16) string {
		b, err := os.ReadFile(good)
		if err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint16(b[18:], machine)
		path := filepath.Join(dir, "foreign.so")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	script := filepath.Join(dir, "script.so")
	if err := os.WriteFile(script, []byte("INPUT(libc.so)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	needed := tokentest.BuildModule(t, "gone", []byte("int gone;\n"))
	dependent := tokentest.BuildModule(t, "dependent", []byte("extern int gone; int *p = &gone;\n"), needed)
	if err := os.Remove(needed); err != nil {
		t.Fatal(err)
	}
	old := tokentest.BuildModule(t, "old", []byte("static char list[1000] = { 1, 0 };\nlong C_GetFunctionList(void **l) { *l = list; return 0; }\n"))
	failing := tokentest.BuildModule(t, "failing", []byte("long C_GetFunctionList(void **l) { return 5; }\n"))
	empty := tokentest.BuildModule(t, "empty", []byte("long C_GetFunctionList(void **l) { return 0; }\n"))
	for _, tt := range []struct{ name, path, want string }{
		{"relative path", "module.so", "absolute"},
		{"missing", filepath.Join(dir, "none.so"), "no such file"},
		{"directory", dir, "no regular file"},
		{"text", script, "not a shared library"},
		{"other processor", foreign(0xb7), "it is a 64-bit ARM library, this is amd64"},
		{"missing dependency", dependent, filepath.Base(needed)},
		{"no module", good, "no PKCS#11 module"},
		{"version 1", old, "version 1"},
		{"failing function list", failing, "its function C_GetFunctionList fails"},
		{"no function list", empty, "no PKCS#11 module"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t)
			err := p.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: tt.path}, new(wire.HelloReply))
			wantReason(t, err, wire.ReasonLoad)
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
				t.Errorf("got %q, want it to say %q", err, tt.want)
			}
		})
	}
}

// The process ends with the agent, even if the agent is killed and a call hangs.
func TestAgentKilled(t *testing.T) {
	module := tokentest.BuildBadModule(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append([]string{"P11_TEST_PROCESS=agent", "P11_TEST_MODULE=" + module},
		tokentest.BadModuleEnv("hang=C_Initialize", "", "")...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, scan := fmt.Fscan(out, &pid)
	var fd int
	if scan == nil {
		fd, err = unix.PidfdOpen(pid, 0)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
	if scan != nil || err != nil {
		t.Fatal(scan, err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			t.Errorf("the module process lives on: %v", err)
		}
		break
	}
}

func TestHarden(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"P11_TEST_PROCESS=harden", "GORACE=atexit_sleep_ms=0"}
	out, err := cmd.CombinedOutput() // standard output is standard error here
	if err != nil || string(out) != "dumpable 0 core 0 0\n" {
		t.Errorf("%s, %v", out, err)
	}
}

// A person who runs the command by hand gets a message.
func TestNotForPeople(t *testing.T) {
	pipe, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer other.Close()
	ours, socket, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer socket.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		command []string
		files   []*os.File
	}{
		{"nothing", []string{exe}, nil},
		{"a pipe", []string{exe}, []*os.File{pipe}},
		{"a file", []string{exe}, []*os.File{os.Stdin}},
		{"no socket for lanes", []string{exe}, []*os.File{socket}},
		{"a socket that the parent did not make", []string{"sh", "-c", `"$0"; exit $?`, exe}, []*os.File{socket}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(tt.command[0], tt.command[1:]...)
			cmd.Env = []string{"P11_TEST_PROCESS=module", "GORACE=atexit_sleep_ms=0"}
			cmd.ExtraFiles = tt.files
			out, err := cmd.CombinedOutput()
			if err == nil || cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), errNotAgent.Error()) {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		ctx, cancel := context.WithCancel(t.Context())
		if err := errors.Join(g.enter(ctx, false), g.enter(ctx, false)); err != nil {
			t.Fatal(err)
		}
		alone := false
		var all sync.WaitGroup
		all.Go(func() {
			if err := g.enter(t.Context(), true); err != nil {
				t.Error(err)
				return
			}
			alone = true
			g.leave(true)
		})
		gaveUp := false
		all.Go(func() {
			if err := g.enter(ctx, true); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			gaveUp = true
		})
		g.leave(false)
		synctest.Wait()
		if alone || gaveUp {
			t.Error("a call is alone beside another")
		}
		cancel()
		synctest.Wait()
		if !gaveUp {
			t.Error("a waiter is not cancelled")
		}
		g.leave(false)
		all.Wait()
		if !alone {
			t.Error("no call was alone")
		}
		if err := g.enter(ctx, false); !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled caller is let in: %v", err)
		}
		for range width { // all places are free again
			if err := g.enter(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestIsPublic(t *testing.T) {
	raw := bytes.Repeat([]byte{4}, 65)
	long := bytes.Repeat([]byte{4}, 133)
	for _, tt := range []struct {
		name string
		id   wire.KeyID
		v    []byte
		want bool
	}{
		{"modulus", wire.KeyID{Modulus: []byte{0xc1, 2}}, []byte{0xc1, 2}, true},
		{"modulus with a zero in front", wire.KeyID{Modulus: []byte{0xc1, 2}}, []byte{0, 0xc1, 2}, true},
		{"another modulus", wire.KeyID{Modulus: []byte{0xc1, 2}}, []byte{0xc1, 3}, false},
		{"bare point", wire.KeyID{KeyType: wire.CKKEC, ECPoint: raw}, raw, true},
		{"point in an octet string", wire.KeyID{KeyType: wire.CKKEC, ECPoint: raw}, append([]byte{4, 65}, raw...), true},
		{"long point in an octet string", wire.KeyID{KeyType: wire.CKKEC, ECPoint: long}, append([]byte{4, 0x81, 133}, long...), true},
		{"another point", wire.KeyID{KeyType: wire.CKKEC, ECPoint: raw}, append([]byte{4, 65}, raw[1:]...), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := isPublic(tt.v, &tt.id); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// The module may return any bytes as an attribute.
func FuzzAttributes(f *testing.F) {
	seeds := [][]byte{nil, {0}, {1}, {2}, make([]byte, roomULong), bytes.Repeat([]byte{0xff}, roomULong), []byte("label \x00 "), {0xff, 0xfe}}
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if tri(b) > wire.True {
			t.Error("no such truth")
		}
		if _, ok := ulong(b); ok != (len(b) == roomULong) {
			t.Error("a number of another size")
		}
		s := text(string(b), roomText)
		if s != strings.ToValidUTF8(s, "") || strings.HasSuffix(s, " ") || strings.HasSuffix(s, "\x00") {
			t.Errorf("text %q", s)
		}
		isPublic(b, &wire.KeyID{KeyType: wire.CKKEC, ECPoint: b})
	})
}
