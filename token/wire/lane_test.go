package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// packets returns a socket pair that keeps packets apart.
func packets(t testing.TB) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var both [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		both[i] = c.(*net.UnixConn)
	}
	return both[0], both[1]
}

// lanePair opens a lane.
func lanePair(t testing.TB) (*Lane, *ModuleLane) {
	t.Helper()
	ours, theirs := packets(t)
	lane, err := NewLanes(ours).Open(testToken)
	if err != nil {
		t.Fatal(err)
	}
	module, about, err := NewModuleLanes(theirs).Accept()
	if err != nil || about != testToken {
		t.Fatalf("%+v, %v", about, err)
	}
	t.Cleanup(func() {
		_ = lane.Close()
		_ = module.Close()
	})
	return lane, module
}

func receive(l *Lane, reply *OperateReply) error {
	f, err := l.Receive()
	if err != nil {
		return err
	}
	return f.Decode(reply)
}

var testSign = Operate{Key: testKey, Mechanism: CKMECDSA, ResultLen: 64, Data: []byte("digest")}

func TestLane(t *testing.T) {
	lane, module := lanePair(t)
	var got Operate
	for i, data := range []string{"a digest", "another", "", "one that is longer than those before"} {
		want := testSign
		want.Data = []byte(data)
		want.Key.Label = strings.Repeat("x", i)
		if err := lane.Send(uint32(i+1), &want); err != nil {
			t.Fatal(err)
		}
		if lane.Ready(0) {
			t.Error("an answer is there before there is one")
		}
		id, err := module.ReadRequest(&got, 0)
		if err != nil || id != uint32(i+1) {
			t.Fatalf("request %d: %v", id, err)
		}
		same(t, &Operate{
			Key: got.Key, Mechanism: got.Mechanism, ResultLen: got.ResultLen, Data: got.Data,
		}, &want)
		if i == 1 {
			err = module.WriteError(id, &Error{Function: "C_Sign", RV: CKRDeviceError})
		} else {
			err = module.WriteReply(id, &OperateReply{Result: []byte(data + "!")})
		}
		if err != nil {
			t.Fatal(err)
		}
		if !lane.Ready(time.Hour) {
			t.Error("no answer is there")
		}
		var reply OperateReply
		switch err := receive(lane, &reply); {
		case i == 1:
			if e, ok := errors.AsType[*Error](err); !ok || e.RV != CKRDeviceError {
				t.Errorf("got %v", err)
			}
		case err != nil || string(reply.Result) != data+"!":
			t.Errorf("got %q, %v", reply.Result, err)
		}
	}
}

// A value that equals the value in the request before takes no new memory.
func TestLaneAllocations(t *testing.T) {
	lane, module := lanePair(t)
	var got Operate
	exchange := func() {
		if err := lane.Send(1, &testSign); err != nil {
			t.Error(err)
		}
		if _, err := module.ReadRequest(&got, 0); err != nil {
			t.Error(err)
		}
	}
	exchange()
	if n := testing.AllocsPerRun(100, exchange); n > 0 {
		t.Errorf("%v allocations for each request", n)
	}
}

// The result of a decryption is a secret: no frame keeps it.
func TestResultIsWiped(t *testing.T) {
	secret := []byte("a secret that a token has decrypted")
	var reply OperateReply
	check := func(where string, buf []byte) {
		t.Helper()
		if bytes.Contains(buf[:cap(buf)], secret) {
			t.Errorf("%s keeps the result", where)
		}
	}

	lane, module := lanePair(t)
	if err := lane.Send(1, &testSign); err != nil {
		t.Fatal(err)
	}
	if _, err := module.ReadRequest(new(Operate), 0); err != nil {
		t.Fatal(err)
	}
	if err := module.WriteReply(1, &OperateReply{Result: secret}); err != nil {
		t.Fatal(err)
	}
	if err := receive(lane, &reply); err != nil || !bytes.Equal(reply.Result, secret) {
		t.Fatalf("got %q, %v", reply.Result, err)
	}
	check("the lane", lane.buf)
	check("the module's lane", module.out)

	ours, theirs := net.Pipe()
	conn, other := NewConn(ours), NewModuleConn(theirs)
	defer conn.Close()
	defer other.Close()
	sent := make(chan error, 1)
	go func() {
		sent <- errors.Join(other.WriteReply(1, &OperateReply{Result: secret}), other.WriteReply(2, &OperateReply{Result: secret}))
	}()
	for range 2 {
		f, err := conn.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Decode(&reply); err != nil || !bytes.Equal(reply.Result, secret) {
			t.Fatalf("got %q, %v", reply.Result, err)
		}
		check("the frame", f.Body)
		check("the connection", conn.r.buf)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	check("the module's connection", other.w.buf)
}

func TestLaneRefusesToSend(t *testing.T) {
	lane, module := lanePair(t)
	long := testSign
	long.Data = make([]byte, MaxLaneFrame)
	if err := lane.Send(1, &long); err != ErrTooLong {
		t.Errorf("a long one: %v", err)
	}
	pin := testSign
	setPIN(t, &pin, "482915")
	if err := lane.Send(1, &pin); err == nil {
		t.Error("a PIN is sent")
	}
	if err := module.WriteReply(1, &OperateReply{Result: make([]byte, MaxLaneFrame)}); err == nil {
		t.Error("a long answer is sent")
	}
	if err := lane.Send(1, &testSign); err != nil { // nothing of them was sent
		t.Fatal(err)
	}
	if id, err := module.ReadRequest(new(Operate), 0); id != 1 || err != nil {
		t.Errorf("request %d: %v", id, err)
	}
}

// A reader can stop waiting for an answer, and wait for it later.
func TestLaneInterrupt(t *testing.T) {
	lane, module := lanePair(t)
	if err := lane.Send(1, &testSign); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	context.AfterFunc(ctx, lane.Interrupt)
	time.AfterFunc(time.Millisecond, cancel)
	if _, err := lane.Receive(); err != os.ErrDeadlineExceeded {
		t.Fatalf("got %v", err)
	}
	lane.Resume()
	if err := module.WriteReply(1, &OperateReply{Result: []byte("late")}); err != nil {
		t.Fatal(err)
	}
	var reply OperateReply
	if err := receive(lane, &reply); err != nil || string(reply.Result) != "late" {
		t.Errorf("got %q, %v", reply.Result, err)
	}
}

func TestLaneEnds(t *testing.T) {
	lane, module := lanePair(t)
	if err := module.Close(); err != nil {
		t.Fatal(err)
	}
	if !lane.Ready(time.Hour) {
		t.Error("the end is waited for")
	}
	if _, err := lane.Receive(); err != io.EOF {
		t.Errorf("the module process has gone: %v", err)
	}
	lane, module = lanePair(t)
	if err := lane.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := module.ReadRequest(new(Operate), 0); err != io.EOF {
		t.Errorf("the agent has closed it: %v", err)
	}
	if err := lane.Send(1, &testSign); err == nil {
		t.Error("a closed lane takes a request")
	}
	if !lane.Ready(time.Hour) {
		t.Error("a closed lane is waited for")
	}
}

func packet(t Type, id uint32, body []byte) []byte {
	b := append(appendHeader(nil, t, id), body...)
	b[3], b[2] = byte(len(b)-lengthSize), byte((len(b)-lengthSize)>>8)
	return b
}

// The agent does not trust a module process.
func TestLaneRefusesAnswers(t *testing.T) {
	reply := body(&OperateReply{Result: []byte("sig")})
	for name, b := range map[string][]byte{
		"short":          {0, 0},
		"cut":            packet(TypeReply, 1, reply)[:12],
		"longer":         append(packet(TypeReply, 1, reply), 0),
		"another number": packet(TypeReply, 2, reply),
		"an event":       packet(TypeEvent, 1, nil),
		"more than room": packet(TypeReply, 1, make([]byte, MaxLaneFrame)),
	} {
		lane, module := lanePair(t)
		if err := lane.Send(1, &testSign); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(module.fd, b); err != nil {
			t.Fatal(err)
		}
		_, err := lane.Receive()
		if _, ok := errors.AsType[*Error](err); err == nil || ok || err == io.EOF {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A module process does not trust the agent.
func TestLaneRefusesRequests(t *testing.T) {
	sign := body(&testSign)
	for name, b := range map[string][]byte{
		"short":          {0, 0},
		"cut":            packet(TypeOperate, 1, sign)[:20],
		"no number":      packet(TypeOperate, 0, sign),
		"another type":   packet(TypeLogin, 1, sign),
		"a PIN":          packet(TypeOperate, 1, append(bytes.Clone(sign), "482915"...)),
		"more than room": packet(TypeOperate, 1, make([]byte, MaxLaneFrame)),
	} {
		lane, module := lanePair(t)
		if _, err := lane.c.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := module.ReadRequest(new(Operate), 0); err == nil || err == io.EOF {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A message that opens a lane has one file and the lane's token.
func TestAcceptRefuses(t *testing.T) {
	token, _ := marshal(nil, &Token{Token: testToken})
	for _, tt := range []struct {
		name  string
		body  []byte
		files int
	}{
		{"no file", token, 0},
		{"two files", token, 2},
		{"more files than there is room for", token, maxPassed + 1},
		{"no token", []byte("token"), 1},
	} {
		ours, theirs := packets(t)
		var fds []int
		for range tt.files {
			fds = append(fds, 0)
		}
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := ours.WriteMsgUnix(tt.body, oob, nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := NewModuleLanes(theirs).Accept(); err == nil || err == io.EOF {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	ours, theirs := packets(t)
	if err := ours.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := NewModuleLanes(theirs).Accept(); err != io.EOF {
		t.Errorf("the agent has gone: %v", err)
	}
}

// A request reads back as it was sent, into new memory or into used memory.
func FuzzLaneRequest(f *testing.F) {
	f.Add(packet(TypeOperate, 1, body(&testSign)))
	f.Add(packet(TypeOperate, 7, append(body(&testSign), 'x')))
	f.Add(packet(TypeOperate, 2, body(&Operate{
		Key: testKey, Function: Decrypt, Mechanism: CKMRSAPKCSOAEP, Params: Params{Hash: CKMSHA1, MGF: CKGMGF1SHA1, Source: []byte("label")},
	})))
	f.Add(packet(TypeOperate, 3, body(&Operate{Key: testKey, Function: Derive, Mechanism: CKMECDH1Derive, ResultLen: 32, Data: []byte("\x04")})))
	f.Fuzz(func(t *testing.T, b []byte) {
		var fresh Operate
		used := testSign
		used.Data = []byte("that of the one before")
		id, err := parseLaneRequest(b, &fresh)
		again, againErr := parseLaneRequest(b, &used)
		if id != again || (err == nil) != (againErr == nil) {
			t.Fatalf("%d %v, %d %v", id, err, again, againErr)
		}
		if err != nil {
			return
		}
		for _, m := range []*Operate{&fresh, &used} {
			if got := packet(TypeOperate, id, body(m)); len(b) < 1<<16 && !bytes.Equal(got[lengthSize:], b[lengthSize:]) {
				t.Errorf("%x became %x", b, got)
			}
		}
	})
}

// The agent reads any bytes without harm.
func FuzzLaneAnswer(f *testing.F) {
	f.Add(packet(TypeReply, 1, body(&OperateReply{Result: []byte("sig")})))
	f.Add(packet(TypeError, 1, body(&Error{Function: "C_Sign", RV: CKRDeviceError})))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, id, body, err := parsePacket(b)
		if err != nil {
			return
		}
		_ = Frame{Type: kind, ID: id, Body: body}.Decode(new(OperateReply)) // any outcome is fine
	})
}
