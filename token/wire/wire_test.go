package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/secret"
)

var (
	testToken = TokenID{Label: "Märtha's card", Manufacturer: "ACME", Model: "One", Serial: "0123"}
	testInfo  = TokenInfo{Flags: CKFTokenInitialized | CKFLoginRequired, MaxSessions: 3, MinPIN: 4, MaxPIN: 8, LoggedIn: true}
	testKey   = KeyID{Token: testToken, ID: []byte{1}, Label: "key", KeyType: CKKEC, ECPoint: []byte{4, 5, 6}}
)

// A sample is a message of one kind. pin is the text of its PIN.
type sample struct {
	t   Type
	msg Message
	pin string
}

func samples(t testing.TB) []sample {
	t.Helper()
	list := []sample{
		{t: TypeHello, msg: &Hello{Version: Version, Path: "/usr/lib/\xff.so", InitArgs: "configdir='/x'", Poll: true, Unconfined: true, Write: []string{"/srv/\xff", "/x"}}},
		{t: TypeSlots, msg: &Slots{Reinitialize: true}},
		{t: TypeObjects, msg: &Objects{Token: testToken, Named: []ObjectName{{ID: []byte{7}}, {Label: "door"}}}},
		{t: TypePart, msg: &ObjectsPart{First: true, Objects: []Object{{Class: CKOPublicKey, ID: []byte{2}, KeyType: CKKRSA}}}},
		{t: TypeToken, msg: &Token{Token: testToken}},
		{t: TypeLogin, msg: &Login{Token: testToken, LastTry: true}, pin: "482915"},
		{t: TypeLogin, msg: &Login{Token: testToken, Pad: true}},
		{t: TypeLogout, msg: &Token{Token: testToken}},
		{t: TypeOperate, msg: &Operate{Key: testKey, Mechanism: CKMECDSA, ResultLen: 64, Data: []byte("hash")}},
		{t: TypeOperate, msg: &Operate{
			Key: testKey, Mechanism: CKMRSAPKCSPSS, Params: Params{Hash: CKMSHA256, MGF: CKGMGF1SHA256, Salt: 32},
			ResultLen: 256, Data: []byte("hash"), ContextLogin: true,
		}, pin: "482915"},
		{t: TypeOperate, msg: &Operate{
			Key: testKey, Function: Decrypt, Mechanism: CKMRSAPKCSOAEP,
			Params: Params{Hash: CKMSHA256, MGF: CKGMGF1SHA1, Source: []byte("label")}, ResultLen: 256, Data: []byte("ciphertext"),
		}},
		{t: TypeOperate, msg: &Operate{Key: testKey, Function: Derive, Mechanism: CKMECDH1Derive, ResultLen: 32, Data: []byte("\x04point")}},
		{t: TypeCancel, msg: &Cancel{Request: 7}},
		{t: TypeGenerate, msg: &Generate{Token: testToken, Mechanism: CKMRSAPKCSKeyPairGen, Bits: 3072, ID: []byte{7}, Label: "new"}},
		{t: TypeGenerate, msg: &Generate{Token: testToken, Mechanism: CKMECEdwardsKeyPairGen, ECParams: []Value{{[]byte{19, 1, 'x'}}, {[]byte{6, 1, 9}}}}},
		{t: TypeNewToken, msg: &NewToken{Label: "new"}, pin: "482915"},
		{t: TypeReply, msg: &NewTokenReply{Token: testToken}},
		{t: TypeReply, msg: &HelloReply{Version: Version, Manufacturer: "ACME", Description: "cards", Library: 0x102, Cryptoki: 0x228, Waits: true, Sandbox: Sandbox{
			Files: 7, Scoped: true, CallsError: "refused (EPERM)", Missing: []string{"/srv"},
		}}},
		{t: TypeReply, msg: &SlotsReply{Slots: []Slot{
			{ID: 1, Description: "reader", Flags: CKFRemovableDevice},
			{ID: 2, HasToken: true, Token: testToken, Info: testInfo, Mechanisms: []Mechanism{{CKMECDSA, 256, 521, CKFSign}, {CKMEdDSA, 255, 255, CKFSign}}},
		}}},
		{t: TypeReply, msg: &ObjectsReply{Info: testInfo, Objects: []Object{
			{Class: CKOPublicKey, ID: []byte{1}, Label: "key", KeyType: CKKRSA, Modulus: []byte{0xc1}, Exponent: []byte{1, 0, 1}},
			{Class: CKOPrivateKey, KeyType: CKKEC, ECParams: []byte{6}, ECPoint: []byte{4}, Sign: True, Decrypt: False, Derive: True, Private: True, AlwaysAuth: False},
			{Class: CKOCertificate, Value: []byte{0x30}, Trusted: True, CertCategory: 1},
		}, Cut: true, Long: 2}},
		{t: TypeReply, msg: &TokenReply{Info: testInfo}},
		{t: TypeReply, msg: &OperateReply{Result: []byte{1, 2, 3}}},
		{t: TypeReply, msg: &GenerateReply{
			Public:          Object{Class: CKOPublicKey, ID: []byte{1}, KeyType: CKKEC, ECParams: []byte{6}, ECPoint: []byte{4}},
			Private:         Object{Class: CKOPrivateKey, ID: []byte{1}, KeyType: CKKEC, Sign: True},
			AlwaysSensitive: True, NeverExtractable: True, Local: False,
		}},
		{t: TypeError, msg: &Error{Function: "C_Login", RV: CKRPINIncorrect, Reason: ReasonModule, Text: "no", HasInfo: true, Info: testInfo}},
	}
	for i := range list {
		setPIN(t, list[i].msg, list[i].pin)
	}
	return list
}

// setPIN puts a PIN into a message, unless it is empty.
func setPIN(t testing.TB, msg Message, pin string) {
	t.Helper()
	if pin == "" {
		return
	}
	s, err := secret.From([]byte(pin))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Wipe)
	switch m := msg.(type) {
	case *Login:
		m.PIN = s
	case *Operate:
		m.PIN = s
	case *NewToken:
		m.PIN = s
	default:
		t.Fatalf("%T has no PIN", msg)
	}
}

// body returns the encoding of a message.
func body(msg Message) []byte {
	b, pin := marshal(nil, msg)
	return append(b, pin.Bytes()...)
}

// same compares two messages and their PINs.
func same(t *testing.T, got, want Message) {
	t.Helper()
	if !bytes.Equal(body(got), body(want)) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if p, ok := got.(interface{ pin() *secret.Secret }); ok {
		if !p.pin().Equal(want.(interface{ pin() *secret.Secret }).pin()) {
			t.Error("the PIN is another")
		}
		return
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func empty(msg Message) Message {
	return reflect.New(reflect.TypeOf(msg).Elem()).Interface().(Message)
}

func TestSamplesAreComplete(t *testing.T) {
	seen := map[reflect.Type]bool{}
	types := map[Type]bool{}
	for _, s := range samples(t) {
		seen[reflect.TypeOf(s.msg)], types[s.t] = true, true
	}
	for typ, make := range requests {
		if !types[typ] {
			t.Errorf("no sample of request type %d", typ)
		}
		delete(seen, reflect.TypeOf(make()))
	}
	for _, m := range []Message{new(HelloReply), new(SlotsReply), new(ObjectsPart), new(ObjectsReply), new(TokenReply), new(OperateReply), new(GenerateReply), new(Error)} {
		if !seen[reflect.TypeOf(m)] {
			t.Errorf("no sample of %T", m)
		}
	}
}

func TestUnmarshal(t *testing.T) {
	for _, s := range samples(t) {
		got := empty(s.msg)
		b := body(s.msg)
		if err := Unmarshal(b, got); err != nil {
			t.Errorf("%T: %v", s.msg, err)
			continue
		}
		same(t, got, s.msg)
		clear(b) // Unmarshal must not keep a part of it
		same(t, got, s.msg)
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	token := body(&Token{Token: testToken})
	tests := []struct {
		name string
		body []byte
		msg  Message
	}{
		{"nothing", nil, new(Hello)},
		{"cut off", token[:len(token)-1], new(Token)},
		{"trailing byte", append(slices.Clone(token), 0), new(Token)},
		{"string longer than the message", []byte{0, 0, 0, 5, 'a'}, new(OperateReply)},
		{"string of 4 GiB", []byte{0xff, 0xff, 0xff, 0xff, 'a'}, new(OperateReply)},
		{"boolean of 2", []byte{2}, new(Slots)},
		{"list longer than the message", []byte{0, 0, 0, 9}, new(SlotsReply)},
		{"list of 4 billion", []byte{0xff, 0xff, 0xff, 0xff}, new(SlotsReply)},
		{"list above the limit", body(&SlotsReply{Slots: make([]Slot, MaxList+1)}), new(SlotsReply)},
		{"text that is not UTF-8", body(&Token{Token: TokenID{Label: "\xff"}}), new(Token)},
		{"function of 3", body(&Operate{Function: 3}), new(Operate)},
		{"attribute of 3", body(&ObjectsReply{Objects: []Object{{Sign: 3}}}), new(ObjectsReply)},
		{"unknown reason", body(&Error{Reason: lastReason + 1}), new(Error)},
		{"long PIN", append(body(&Login{}), make([]byte, MaxPIN+1)...), new(Login)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := Unmarshal(tt.body, tt.msg); err == nil {
				t.Errorf("got %+v", tt.msg)
			}
		})
	}
}

func TestMessagesDoNotPrintThePIN(t *testing.T) {
	for _, s := range samples(t) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
			if out := fmt.Sprintf(verb, s.msg); s.pin != "" && (strings.Contains(out, s.pin) || strings.Contains(out, "343832393135")) {
				t.Errorf("%s of %T has the PIN: %s", verb, s.msg, out)
			}
		}
	}
}

// pair returns both ends of a socket pair, in the form that the agent uses.
func pair(t testing.TB) (*Conn, *ModuleConn, [2]net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	module := NewModuleConn(ends[1])
	agent := NewConn(ends[0])
	t.Cleanup(func() {
		agent.Close()
		module.Close()
	})
	return agent, module, ends
}

func TestConn(t *testing.T) {
	agent, module, _ := pair(t)
	big := &Operate{Key: testKey, Data: bytes.Repeat([]byte("d"), 400<<10), ContextLogin: true}
	setPIN(t, big, "739105")
	list := append(samples(t), sample{t: TypeOperate, msg: big},
		sample{t: TypeReply, msg: &ObjectsReply{Objects: []Object{{Value: bytes.Repeat([]byte("v"), 3<<20)}}}})
	var writers sync.WaitGroup
	defer writers.Wait()
	writers.Go(func() {
		for i, s := range list {
			if s.t < TypeReply {
				if err := agent.WriteRequest(uint32(i+1), s.t, s.msg); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for i, s := range list {
		if s.t >= TypeReply {
			continue
		}
		r, err := module.ReadRequest()
		if err != nil {
			t.Fatal(err)
		}
		if r.ID != uint32(i+1) || r.Type != s.t {
			t.Errorf("request %d of type %d, want %d and %d", r.ID, r.Type, i+1, s.t)
		}
		same(t, r.Message, s.msg)
	}
	if module.buf != nil {
		t.Error("a buffer is kept that nothing is left in: the machine cannot hibernate")
	}
	writers.Go(func() {
		for i, s := range list {
			var err error
			switch s.t {
			case TypeReply:
				err = module.WriteReply(uint32(i+1), s.msg)
			case TypeError:
				err = module.WriteError(uint32(i+1), s.msg.(*Error))
			case TypePart:
				err = module.WritePart(uint32(i+1), s.msg.(*ObjectsPart))
			}
			if err != nil {
				t.Error(err)
			}
		}
		if err := module.WriteEvent(); err != nil {
			t.Error(err)
		}
		if err := module.WriteLost(&Error{Text: "gone"}); err != nil {
			t.Error(err)
		}
	})
	for i, s := range list {
		if s.t < TypeReply {
			continue
		}
		f, err := agent.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		got := empty(s.msg)
		err = f.Decode(got)
		if s.t == TypeError {
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("error came as %v", err)
			}
			got, err = e, nil
		}
		if err != nil || f.ID != uint32(i+1) {
			t.Fatalf("answer %d: %v", f.ID, err)
		}
		same(t, got, s.msg)
	}
	if f, err := agent.ReadFrame(); err != nil || f.Type != TypeEvent || f.ID != 0 {
		t.Errorf("got %+v, %v; want an event", f, err)
	}
	f, err := agent.ReadFrame()
	if err != nil || f.Type != TypeLost || f.ID != 0 {
		t.Fatalf("got %+v, %v; want that the module is lost", f, err)
	}
	if e, ok := errors.AsType[*Error](f.Decode(nil)); !ok || e.Text != "gone" {
		t.Errorf("got %v", e)
	}
}

// slow is a connection that reads and writes a few bytes at a time.
type slow struct {
	net.Conn
	r    io.Reader
	step int
	out  bytes.Buffer
}

func (s *slow) Read(b []byte) (int, error)  { return s.r.Read(b[:min(len(b), s.step)]) }
func (s *slow) Write(b []byte) (int, error) { return s.out.Write(b) }
func (s *slow) Close() error                { return nil }

// stream returns all samples of requests, or of answers, as frames.
func stream(t testing.TB, answers bool) []byte {
	t.Helper()
	c := &slow{}
	w := writer{c: c}
	for i, s := range samples(t) {
		if s.t >= TypeReply == answers {
			if err := w.write(uint32(i+1), s.t, s.msg, MaxReply); err != nil {
				t.Fatal(err)
			}
		}
	}
	if answers {
		if err := w.write(0, TypeEvent, nil, 0); err != nil {
			t.Fatal(err)
		}
		if err := w.write(0, TypeLost, &Error{Text: "gone"}, MaxReply); err != nil {
			t.Fatal(err)
		}
	}
	return c.out.Bytes()
}

func TestReadRequestInPieces(t *testing.T) {
	// The buffer is filled and emptied many times, with a frame across its end.
	data := bytes.Repeat(stream(t, false), 200)
	for _, step := range []int{1, 7, 1000, readBuffer} {
		m := NewModuleConn(&slow{r: bytes.NewReader(data), step: step})
		var want []sample
		for _, s := range samples(t) {
			if s.t < TypeReply {
				want = append(want, s)
			}
		}
		n := 0
		for ; ; n++ {
			r, err := m.ReadRequest()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			same(t, r.Message, want[n%len(want)].msg)
			b := m.buf.Buffer()
			if len(bytes.Trim(b[:m.from], "\x00")) > 0 || len(bytes.Trim(b[m.to:], "\x00")) > 0 {
				t.Fatalf("step %d: what was decoded is still there", step)
			}
		}
		if n != 200*len(want) {
			t.Errorf("step %d: read %d requests, want %d", step, n, 200*len(want))
		}
		m.Close()
	}
}

func TestConnRefuses(t *testing.T) {
	huge := &Operate{Data: make([]byte, MaxRequest)}
	long := &Login{}
	setPIN(t, long, strings.Repeat("9", MaxPIN+1))
	tests := []struct {
		name string
		id   uint32
		typ  Type
		msg  Message
	}{
		{"number 0", 0, TypeToken, &Token{}},
		{"another type", 1, TypeLogin, &Token{}},
		{"an answer", 1, TypeReply, &TokenReply{}},
		{"too large", 1, TypeOperate, huge},
		{"long PIN", 1, TypeLogin, long},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := &slow{}
			agent := NewConn(c)
			if err := agent.WriteRequest(tt.id, tt.typ, tt.msg); err == nil {
				t.Error("no error")
			}
			if c.out.Len() > 0 {
				t.Error("something was sent")
			}
			if err := agent.WriteRequest(1, TypeToken, &Token{}); err != nil {
				t.Errorf("the next request: %v", err)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	frame := func(length uint32, typ Type, id uint32, body ...byte) []byte {
		return append([]byte{byte(length >> 24), byte(length >> 16), byte(length >> 8), byte(length), byte(typ), 0, 0, 0, byte(id)}, body...)
	}
	requests := map[string][]byte{
		"shorter than a header": frame(4, TypeSlots, 1),
		"above the limit":       frame(MaxRequest+6, TypeOperate, 1),
		"4 GiB":                 frame(0xffffffff, TypeOperate, 1),
		"unknown type":          frame(5, 99, 1),
		"an answer":             frame(6, TypeReply, 1, 0),
		"number 0":              frame(6, TypeSlots, 0, 0),
		"does not parse":        frame(6, TypeSlots, 1, 9),
	}
	for name, data := range requests {
		t.Run("request "+name, func(t *testing.T) {
			m := NewModuleConn(&slow{r: bytes.NewReader(data), step: 100})
			defer m.Close()
			if r, err := m.ReadRequest(); err == nil || err == io.EOF {
				t.Errorf("got %+v, %v", r, err)
			}
		})
	}
	answers := map[string][]byte{
		"shorter than a header": frame(4, TypeReply, 1),
		"above the limit":       frame(MaxReply+6, TypeReply, 1),
		"a request":             frame(6, TypeSlots, 1, 0),
		"number 0":              frame(5, TypeReply, 0),
		"event with a number":   frame(5, TypeEvent, 1),
		"event with a body":     frame(6, TypeEvent, 0, 1),
		"lost with a number":    frame(5, TypeLost, 1),
	}
	for name, data := range answers {
		t.Run("answer "+name, func(t *testing.T) {
			if f, err := NewConn(&slow{r: bytes.NewReader(data), step: 100}).ReadFrame(); err == nil || err == io.EOF {
				t.Errorf("got %+v, %v", f, err)
			}
		})
	}
}

func TestEnd(t *testing.T) {
	whole := stream(t, false)
	for _, n := range []int{0, 3, headerSize, headerSize + 3} {
		m := NewModuleConn(&slow{r: bytes.NewReader(whole[:n]), step: 100})
		if _, err := m.ReadRequest(); err != io.EOF {
			t.Errorf("after %d bytes: %v, want end of file", n, err)
		}
		m.Close()
	}
}

// The kernel takes a PIN from its own memory, in one system call with the rest.
func TestPINIsNotCopied(t *testing.T) {
	agent, module, _ := pair(t)
	login := &Login{Token: testToken}
	setPIN(t, login, "6215804437")
	var reader sync.WaitGroup
	reader.Go(func() {
		r, err := module.ReadRequest()
		if err != nil {
			t.Error(err)
			return
		}
		same(t, r.Message, login)
		r.Message.(*Login).PIN.Wipe()
	})
	if err := agent.WriteRequest(1, TypeLogin, login); err != nil {
		t.Fatal(err)
	}
	reader.Wait()
	for name, b := range map[string][]byte{
		"writer": agent.w.buf[:cap(agent.w.buf)],
		"reader": module.buf.Buffer(),
	} {
		if bytes.Contains(b, []byte("6215804437")) {
			t.Errorf("the %s's buffer has the PIN", name)
		}
	}
}

func TestError(t *testing.T) {
	tests := []struct {
		name string
		err  *Error
		want string
	}{
		{"known value", &Error{Function: "C_Login", RV: CKRPINIncorrect}, "the PIN is wrong (C_Login: CKR_PIN_INCORRECT)"},
		{"value without words", &Error{Function: "C_SignInit", RV: CKROperationActive}, "the module refused (C_SignInit: CKR_OPERATION_ACTIVE)"},
		{"vendor's value", &Error{Function: "C_Sign", RV: 0x80000012}, "the module refused (C_Sign: CKR_VENDOR_DEFINED|0x12)"},
		{"unknown value", &Error{Function: "C_Sign", RV: 0x999}, "the module refused (C_Sign: CKR 0x999)"},
		{"reason", &Error{Reason: ReasonNoToken}, "no such token is present"},
		{"text", &Error{Function: "C_Sign", Text: "it lies"}, "it lies (C_Sign)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.err.Error(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	for r := ReasonModule; r <= ReasonUnsupported; r++ {
		if strings.HasPrefix(r.String(), "reason ") {
			t.Errorf("reason %d has no words", r)
		}
	}
}

// A message that parses has one encoding: writing it again gives the same bytes.
func FuzzUnmarshal(f *testing.F) {
	list := samples(f)
	if len(list) == 0 {
		f.Fatal("no seeds")
	}
	for i, s := range list {
		f.Add(i, body(s.msg))
	}
	f.Fuzz(func(t *testing.T, kind int, b []byte) {
		if kind < 0 || kind >= len(list) {
			return
		}
		msg := empty(list[kind].msg)
		if Unmarshal(b, msg) != nil {
			return
		}
		if p, ok := msg.(interface{ pin() *secret.Secret }); ok {
			defer p.pin().Wipe()
		}
		if got := body(msg); !bytes.Equal(got, b) {
			t.Errorf("%T: %x became %x", msg, b, got)
		}
	})
}

// The module process reads any bytes without harm.
func FuzzReadRequest(f *testing.F) {
	seed := stream(f, false)
	if len(seed) == 0 {
		f.Fatal("no seeds")
	}
	f.Add(seed, 1)
	f.Add(seed, 4096)
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		m := NewModuleConn(&slow{r: bytes.NewReader(data), step: max(1, step)})
		defer m.Close()
		var again bytes.Buffer
		out := &slow{}
		w := writer{c: out}
		for {
			r, err := m.ReadRequest()
			if err != nil {
				break
			}
			if err := w.write(r.ID, r.Type, r.Message, MaxRequest); err != nil {
				t.Fatal(err)
			}
			if p, ok := r.Message.(interface{ pin() *secret.Secret }); ok {
				p.pin().Wipe()
			}
		}
		again.Write(out.out.Bytes())
		if !bytes.HasPrefix(data, again.Bytes()) {
			t.Error("what was read is not what was sent")
		}
	})
}

// The agent reads any bytes without harm.
func FuzzReadFrame(f *testing.F) {
	seed := stream(f, true)
	if len(seed) == 0 {
		f.Fatal("no seeds")
	}
	f.Add(seed, 1)
	f.Add(seed, 4096)
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		c := NewConn(&slow{r: bytes.NewReader(data), step: max(1, step)})
		for {
			fr, err := c.ReadFrame()
			if err != nil {
				return
			}
			for _, msg := range []Message{new(HelloReply), new(SlotsReply), new(ObjectsPart), new(ObjectsReply), new(TokenReply), new(OperateReply), new(GenerateReply)} {
				_ = fr.Decode(msg) // any outcome is fine
			}
		}
	})
}

// A process that is killed with an unread request resets the connection. The reader takes
// this for the end of the process, not for a malformed message.
func TestReset(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "agent")
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	conn := NewConn(c)
	defer conn.Close()
	if err := errors.Join(conn.WriteRequest(1, TypeSlots, &Slots{}), unix.Close(fds[1])); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ReadFrame(); err != io.EOF {
		t.Errorf("got %v", err)
	}
}
