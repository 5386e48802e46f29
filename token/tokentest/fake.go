package tokentest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // hashes that the token may be asked for
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/proctest"
	"p11-agent/token/wire"
)

// fakeSocket is the variable that makes a test's program a fake's process.
const fakeSocket = "P11_TEST_FAKE"

// Main is for the TestMain of a test that uses a Fake: in a process that a Fake
// is to be, it is one and does not return. In any other it does nothing.
//
// Such a process knows nothing: it hands on what it hears to the Fake, which is
// in the test, and back. So the process can be killed as any module's, and the
// Fake goes on as a card does.
func Main() {
	path := os.Getenv(fakeSocket)
	if path == "" {
		return
	}
	test, err := net.Dial("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "the test is gone:", err)
		os.Exit(1)
	}
	f := os.NewFile(wire.FD, "agent")
	agent, err := net.FileConn(f)
	if err != nil {
		fmt.Fprintln(os.Stderr, "started by hand:", err)
		os.Exit(1)
	}
	_ = f.Close()
	if err := handOnLanes(test.(*net.UnixConn)); err != nil {
		fmt.Fprintln(os.Stderr, "hand on the lanes:", err)
		os.Exit(1)
	}
	go func() {
		_, _ = io.Copy(test, agent)
		exit() // the agent has gone
	}()
	_, _ = io.Copy(agent, test)
	exit()
}

// handOnLanes has the test get a lane for each that the agent opens, and hands on
// what is on them.
func handOnLanes(test *net.UnixConn) error {
	carrier, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if _, _, err := test.WriteMsgUnix([]byte{0}, unix.UnixRights(carrier[1]), nil); err != nil {
		return err
	}
	if err := unix.Close(carrier[1]); err != nil {
		return err
	}
	go func() {
		about, oob := make([]byte, wire.MaxLaneFrame), make([]byte, unix.CmsgSpace(4))
		for {
			n, oobn, _, _, err := unix.Recvmsg(wire.LanesFD, about, oob, unix.MSG_CMSG_CLOEXEC)
			if err == unix.EINTR {
				continue
			}
			lane, laneErr := onlyFile(oob[:oobn])
			if err != nil || laneErr != nil {
				return // the agent has gone
			}
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return
			}
			_ = unix.Sendmsg(carrier[0], about[:n], unix.UnixRights(pair[1]), nil, 0) // to a test that is there
			_ = unix.Close(pair[1])
			go pump(lane, pair[0])
			go pump(pair[0], lane)
		}
	}()
	return nil
}

// pump hands on packets until one end has gone.
func pump(from, to int) {
	b := make([]byte, 2*wire.MaxLaneFrame)
	for {
		n, err := unix.Read(from, b)
		if err == unix.EINTR {
			continue
		}
		if n > 0 && err == nil {
			_, err = unix.Write(to, b[:n])
		}
		if n <= 0 || err != nil {
			_ = unix.Shutdown(to, unix.SHUT_RDWR)
			return
		}
	}
}

// exit is os.Exit without what the race detector does for a second before.
func exit() {
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
}

// A Fake is a module and its tokens, all in the memory of the test. Each process
// that is started with its Env is one more process with the same module. It
// keeps to PKCS#11 and to what package token/module makes of it, unless it is
// told to misbehave. Methods may be called from any goroutine.
type Fake struct {
	t        testing.TB
	path     string
	listener *net.UnixListener
	wg       sync.WaitGroup

	mu        sync.Mutex
	ended     bool
	tokens    []*FakeToken
	processes []*FakeProcess // that run
	started   int
	intercept Intercept
	requests  map[wire.Type]int
	quiet     bool
	rsa       int // how many RSA keys there are
	stays     uint64
}

// An Intercept is shown each request before the Fake answers it, in a goroutine
// of the request's own, and answers it itself when it returns true. ctx ends
// when the agent takes the request back, or its process ends.
type Intercept func(ctx context.Context, p *FakeProcess, r wire.Request) bool

// NewFake makes a Fake without tokens, which ends with the test.
func NewFake(t testing.TB) *Fake {
	t.Helper()
	proctest.Mark(t)
	path := filepath.Join(TempDir(t), "fake")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	f := &Fake{t: t, path: path, listener: l, requests: make(map[wire.Type]int)}
	f.wg.Go(f.accept)
	t.Cleanup(func() {
		f.mu.Lock()
		f.ended = true
		running := slices.Clone(f.processes)
		f.mu.Unlock()
		_ = l.Close()
		for _, p := range running {
			p.Close()
		}
		f.wg.Wait()
	})
	return f
}

// Env returns the environment of a process that is to be this module.
func (f *Fake) Env() []string { return []string{fakeSocket + "=" + f.path} }

// Intercept replaces what is shown each request; nil takes it away.
func (f *Fake) Intercept(i Intercept) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.intercept = i
}

// Started returns how many processes were this module so far.
func (f *Fake) Started() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.started
}

// Processes returns those that run.
func (f *Fake) Processes() []*FakeProcess {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.processes)
}

// Requests returns how often a type of request was made.
func (f *Fake) Requests(t wire.Type) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests[t]
}

func (f *Fake) accept() {
	for {
		c, err := f.listener.AcceptUnix()
		if err != nil {
			return // the test ends
		}
		p, err := f.newProcess(c)
		if err != nil {
			f.t.Error(err)
			_ = c.Close()
			continue
		}
		if p != nil {
			f.wg.Go(p.serve)
		}
	}
}

// A FakeProcess is one process of a Fake.
type FakeProcess struct {
	fake  *Fake
	pid   int
	c     net.Conn
	conn  *wire.ModuleConn
	lanes *net.UnixConn // where they come from

	mu      sync.Mutex
	cancels map[uint32]context.CancelFunc
	over    bool                        // every request is cancelled
	placed  map[wire.TokenID]*FakeToken // guarded by Fake.mu
	asked   map[uint32]*wire.ModuleLane // by the request that came on it, until that is answered
}

func (f *Fake) newProcess(c *net.UnixConn) (*FakeProcess, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var perr error
	if err := raw.Control(func(fd uintptr) {
		peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || perr != nil {
		return nil, errors.Join(err, perr)
	}
	lanes, err := handedOn(c)
	if err != nil {
		return nil, err
	}
	conn := wire.NewModuleConn(c)
	p := &FakeProcess{
		fake: f, pid: int(peer.Pid), c: c, conn: conn, lanes: lanes,
		cancels: make(map[uint32]context.CancelFunc), asked: make(map[uint32]*wire.ModuleLane),
		placed: make(map[wire.TokenID]*FakeToken),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return nil, errors.Join(conn.Close(), lanes.Close())
	}
	f.processes = append(f.processes, p)
	f.started++
	return p, nil
}

// handedOn receives the socket that lanes come from.
func handedOn(c *net.UnixConn) (*net.UnixConn, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	fd, err := onlyFile(oob[:n])
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "lanes")
	defer file.Close()
	lanes, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return lanes.(*net.UnixConn), nil
}

// onlyFile returns the one file that came with a message.
func onlyFile(oob []byte) (int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return 0, fmt.Errorf("%d messages with files: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return 0, fmt.Errorf("%d files: %w", len(fds), err)
	}
	return fds[0], nil
}

// PID returns the process's id.
func (p *FakeProcess) PID() int { return p.pid }

// Kill kills the process, as a crash would.
func (p *FakeProcess) Kill() {
	_ = unix.Kill(p.pid, unix.SIGKILL) // it may have gone
}

// Close closes the connection, at which the process ends.
func (p *FakeProcess) Close() { _ = p.c.Close() }

// Raw sends bytes to the agent as they are.
func (p *FakeProcess) Raw(b []byte) { _, _ = p.c.Write(b) }

// Fail answers a request with an error.
func (p *FakeProcess) Fail(r wire.Request, e *wire.Error) {
	if p.onLane(r, func(l *wire.ModuleLane) { _ = l.WriteError(r.ID, e) }) {
		return
	}
	_ = p.conn.WriteError(r.ID, e)
}

// Gone reports that slots have lost their token.
func (p *FakeProcess) Gone(slots ...wire.SlotID) { _ = p.conn.WriteEvent(slots...) }

// Lose says that the process is of no use any more.
func (p *FakeProcess) Lose(e *wire.Error) { _ = p.conn.WriteLost(e) }

// Reply answers a request.
func (p *FakeProcess) Reply(r wire.Request, m wire.Message) {
	if p.onLane(r, func(l *wire.ModuleLane) { _ = l.WriteReply(r.ID, m) }) {
		return
	}
	if reply, ok := m.(*wire.ObjectsReply); ok {
		m = p.parts(r, reply)
	}
	_ = p.conn.WriteReply(r.ID, m)
}

// parts sends what a list has too many of for one frame, and returns the rest.
func (p *FakeProcess) parts(r wire.Request, reply *wire.ObjectsReply) *wire.ObjectsReply {
	rest := *reply
	for first := true; len(rest.Objects) > wire.MaxList; first = false {
		_ = p.conn.WritePart(r.ID, &wire.ObjectsPart{First: first, Objects: rest.Objects[:wire.MaxList]})
		rest.Objects = rest.Objects[wire.MaxList:]
	}
	return &rest
}

// onLane answers a request on the lane that it came on, if it did.
func (p *FakeProcess) onLane(r wire.Request, answer func(*wire.ModuleLane)) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	lane, ok := p.asked[r.ID]
	delete(p.asked, r.ID)
	if lane != nil {
		answer(lane)
	}
	return ok
}

// acceptLanes serves the lanes of the process.
func (p *FakeProcess) acceptLanes() {
	var all sync.WaitGroup
	defer all.Wait()
	from := wire.NewModuleLanes(p.lanes)
	for {
		lane, _, err := from.Accept()
		if err != nil {
			return
		}
		all.Go(func() {
			defer p.closeLane(lane)
			for {
				m := new(wire.Operate) // an interceptor may keep it
				id, err := lane.ReadRequest(m, 0)
				if err != nil {
					return
				}
				p.mu.Lock()
				p.asked[id] = lane
				p.mu.Unlock()
				all.Go(p.request(wire.Request{ID: id, Type: wire.TypeOperate, Message: m}))
			}
		})
	}
}

// closeLane closes a lane. What is answered from now on goes nowhere: its file may
// be another's already.
func (p *FakeProcess) closeLane(lane *wire.ModuleLane) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, on := range p.asked {
		if on == lane {
			p.asked[id] = nil
		}
	}
	_ = lane.Close()
}

func (p *FakeProcess) serve() {
	defer func() {
		f := p.fake
		f.mu.Lock()
		f.processes = slices.DeleteFunc(f.processes, func(o *FakeProcess) bool { return o == p })
		for _, t := range f.tokens {
			delete(t.in, p)
		}
		f.mu.Unlock()
		p.mu.Lock()
		for _, cancel := range p.cancels {
			cancel()
		}
		p.mu.Unlock()
		_ = p.conn.Close()
	}()
	var requests sync.WaitGroup
	requests.Go(p.acceptLanes)
	defer requests.Wait()
	defer func() { // before Wait
		_ = p.lanes.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.over = true
		for _, cancel := range p.cancels {
			cancel()
		}
	}()
	for {
		r, err := p.conn.ReadRequest()
		if err != nil {
			return
		}
		if c, ok := r.Message.(*wire.Cancel); ok {
			p.mu.Lock()
			if cancel, ok := p.cancels[c.Request]; ok {
				cancel()
			}
			p.mu.Unlock()
			continue
		}
		requests.Go(p.request(r))
	}
}

// request returns the function that answers a request. The request can be cancelled from
// now on, before that has begun.
func (p *FakeProcess) request(r wire.Request) func() {
	ctx, cancel := context.WithCancel(context.Background())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cancels[r.ID] = cancel
	if p.over {
		cancel()
	}
	return func() {
		defer cancel()
		p.handle(ctx, r)
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.cancels, r.ID)
	}
}

func (p *FakeProcess) handle(ctx context.Context, r wire.Request) {
	defer func() {
		switch m := r.Message.(type) {
		case *wire.Login:
			m.PIN.Wipe()
		case *wire.Operate:
			m.PIN.Wipe()
		}
	}()
	f := p.fake
	f.mu.Lock()
	f.requests[r.Type]++
	intercept := f.intercept
	f.mu.Unlock()
	if intercept != nil && intercept(ctx, p, r) {
		return
	}
	reply, e := f.answer(p, r)
	if e != nil {
		p.Fail(r, e)
		return
	}
	p.Reply(r, reply)
}

func (f *Fake) answer(p *FakeProcess, r wire.Request) (wire.Message, *wire.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch m := r.Message.(type) {
	case *wire.Hello:
		return &wire.HelloReply{
			Version: wire.Version, Manufacturer: "p11-agent", Description: "fake", Library: 0x0102, Cryptoki: 0x0228,
		}, nil
	case *wire.Slots:
		reply := new(wire.SlotsReply)
		for i, t := range f.tokens {
			s := wire.Slot{
				ID: uint64(i), Description: fmt.Sprintf("fake reader %d", i), Manufacturer: "p11-agent",
				Flags: wire.CKFRemovableDevice,
			}
			if !t.absent {
				s.Flags |= wire.CKFTokenPresent
				s.HasToken, s.Token, s.Info = true, t.id, t.info(p)
				for _, m := range t.Mechanisms {
					s.Mechanisms = append(s.Mechanisms, wire.Mechanism{Type: m, MinKey: 256, MaxKey: 4096, Flags: flagsOf(m)})
				}
			}
			reply.Slots = append(reply.Slots, s)
		}
		return reply, nil
	case *wire.Objects:
		t, e := f.look(p, m)
		if e != nil {
			return nil, e
		}
		return &wire.ObjectsReply{Info: t.info(p), Objects: t.objects(p)}, nil
	case *wire.Token:
		t, e := f.find(p, m.Token)
		if e != nil {
			return nil, e
		}
		if r.Type == wire.TypeLogout {
			delete(t.in, p)
			t.stale = false
		}
		return &wire.TokenReply{Info: t.info(p)}, nil
	case *wire.Login:
		t, e := f.find(p, m.Token)
		if e != nil {
			return nil, e
		}
		if t.in[p] {
			return &wire.TokenReply{Info: t.info(p)}, nil
		}
		if !t.stays(m.Stay) {
			return nil, &wire.Error{Reason: wire.ReasonOtherToken}
		}
		if e := t.check(p, m.LastTry, m.Pad, m.PIN.Bytes()); e != nil {
			return nil, e
		}
		t.in[p] = true
		return &wire.TokenReply{Info: t.info(p)}, nil
	case *wire.Generate:
		t, e := f.find(p, m.Token)
		if e != nil {
			return nil, e
		}
		return t.generate(p, m)
	case *wire.Operate:
		t, e := f.find(p, m.Key.Token)
		if e != nil {
			return nil, e
		}
		result, e := t.operate(p, m)
		if e != nil {
			return nil, e
		}
		return &wire.OperateReply{Result: result}, nil
	}
	return nil, &wire.Error{Reason: wire.ReasonProtocol}
}

// look finds the token whose objects are asked for.
func (f *Fake) look(p *FakeProcess, m *wire.Objects) (*FakeToken, *wire.Error) {
	if !m.Peek && !m.Placed {
		return f.find(p, m.Token)
	}
	if m.Slot >= uint64(len(f.tokens)) || f.tokens[m.Slot].id != m.Token.Texts() || f.tokens[m.Slot].absent {
		return nil, &wire.Error{Reason: wire.ReasonNoToken}
	}
	if m.Placed {
		p.placed[m.Token] = f.tokens[m.Slot]
	}
	return f.tokens[m.Slot], nil
}

// find finds a token where the agent has said that it is.
func (f *Fake) find(p *FakeProcess, id wire.TokenID) (*FakeToken, *wire.Error) {
	for _, t := range f.tokens {
		if placed := p.placed[id]; t.id == id.Texts() && !t.absent && (placed == nil || placed == t) {
			return t, nil
		}
	}
	return nil, &wire.Error{Reason: wire.ReasonNoToken}
}

// stays tells whether the token is in its slot since the stay that a PIN is for.
func (t *FakeToken) stays(wanted uint64) bool { return wanted == 0 || wanted == t.stay }

// Quietly does something that the processes are not told of.
func (f *Fake) Quietly(do func()) {
	f.mu.Lock()
	f.quiet = true
	f.mu.Unlock()
	do()
	f.mu.Lock()
	f.quiet = false
	f.mu.Unlock()
}

// tell tells all processes that tokens have changed.
func (f *Fake) tell() {
	f.mu.Lock()
	quiet := f.quiet
	f.mu.Unlock()
	if quiet {
		return
	}
	for _, p := range f.Processes() {
		_ = p.conn.WriteEvent() // to one that has gone
	}
}

// A FakeToken is a token of a Fake. Its exported fields are set before the Store
// is opened.
type FakeToken struct {
	fake *Fake
	id   wire.TokenID

	Mechanisms []uint64          // listed; nil: no list
	Refuse     map[uint64]uint64 // what C_SignInit returns for a mechanism
	Flags      uint64            // more flags: a PIN pad
	NoLogin    bool              // CKF_LOGIN_REQUIRED is not set
	Mute       bool              // no flag tells of the tries left
	Typed      []byte            // what a person types on the reader

	Extractable bool // the keys that it makes could leave it
	Spoils      bool // the keys that it makes sign wrongly

	// Below is guarded by Fake.mu.
	pin    []byte
	tries  int
	most   int
	absent bool
	stay   uint64 // its number
	stale  bool   // logged out by another program, which this module does not notice
	in     map[*FakeProcess]bool
	keys   []*FakeKey
	wrong  int
	right  int
	signed int
}

// Mechanisms of the kinds of tokens there are.
var (
	AllMechanisms = []uint64{
		wire.CKMRSAPKCS, wire.CKMRSAPKCSPSS, wire.CKMECDSA, wire.CKMEdDSA,
		wire.CKMSHA1RSAPKCS, wire.CKMSHA256RSAPKCS, wire.CKMSHA384RSAPKCS, wire.CKMSHA512RSAPKCS,
		wire.CKMSHA256RSAPSS, wire.CKMSHA384RSAPSS, wire.CKMSHA512RSAPSS,
		wire.CKMSHA224RSAPKCS, wire.CKMSHA1RSAPSS, wire.CKMSHA224RSAPSS, wire.CKMECDSASHA224,
		wire.CKMECDSASHA1, wire.CKMECDSASHA256, wire.CKMECDSASHA384, wire.CKMECDSASHA512,
		wire.CKMRSAPKCSOAEP, wire.CKMECDH1Derive,
	}
	// RawMechanisms sign digests only.
	RawMechanisms = []uint64{
		wire.CKMRSAPKCS, wire.CKMRSAPKCSPSS, wire.CKMECDSA, wire.CKMEdDSA, wire.CKMRSAPKCSOAEP, wire.CKMECDH1Derive,
	}
)

// flagsOf returns what a mechanism is for (CKF).
func flagsOf(mechanism uint64) uint64 {
	switch mechanism {
	case wire.CKMRSAPKCS:
		return wire.CKFSign | wire.CKFDecrypt
	case wire.CKMRSAPKCSOAEP:
		return wire.CKFDecrypt
	case wire.CKMECDH1Derive:
		return wire.CKFDerive
	}
	return wire.CKFSign
}

// AddToken adds a token with a label of its own and three tries for its PIN.
func (f *Fake) AddToken(label, pin string) *FakeToken {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &FakeToken{
		fake: f,
		id: wire.TokenID{
			Label: label, Manufacturer: "p11-agent", Model: "fake", Serial: fmt.Sprintf("%04d", len(f.tokens)+1),
		},
		Mechanisms: AllMechanisms,
		pin:        []byte(pin), tries: 3, most: 3,
		in: make(map[*FakeProcess]bool),
	}
	f.stays++
	t.stay = f.stays
	f.tokens = append(f.tokens, t)
	return t
}

// AddTwin adds a token that has everything by which tokens are told apart from
// another one.
func (f *Fake) AddTwin(of *FakeToken) *FakeToken {
	t := f.AddToken(of.id.Label, string(of.pin))
	f.mu.Lock()
	defer f.mu.Unlock()
	t.id = of.id
	return t
}

// ID returns the token's name.
func (t *FakeToken) ID() wire.TokenID { return t.id }

// Remove takes the token out. All processes are told.
func (t *FakeToken) Remove() {
	t.fake.mu.Lock()
	t.absent = true
	clear(t.in)
	t.fake.mu.Unlock()
	t.fake.tell()
}

// Insert puts the token in again. All processes are told.
func (t *FakeToken) Insert() {
	t.fake.mu.Lock()
	t.absent = false
	t.fake.stays++
	t.stay = t.fake.stays
	t.fake.mu.Unlock()
	t.fake.tell()
}

// LogOut does what another program does to a shared card. When stale is true the
// module goes on to believe that it is logged in.
func (t *FakeToken) LogOut(stale bool) {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	if stale {
		t.stale = true
	} else {
		clear(t.in)
	}
}

// SetPIN changes the PIN, and gives all tries back.
func (t *FakeToken) SetPIN(pin string) {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	t.pin, t.tries = []byte(pin), t.most
}

// SetTries sets how many tries are left, now and after a right PIN.
func (t *FakeToken) SetTries(left, most int) {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	t.tries, t.most = left, most
}

// Wrong returns how many wrong PINs have reached the token.
func (t *FakeToken) Wrong() int {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	return t.wrong
}

// Right returns how many right PINs have.
func (t *FakeToken) Right() int {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	return t.right
}

// Signed returns how many signatures the token has made.
func (t *FakeToken) Signed() int {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	return t.signed
}

// LoggedIn tells whether any process is logged in.
func (t *FakeToken) LoggedIn() bool {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	return len(t.in) > 0
}

func (t *FakeToken) info(p *FakeProcess) wire.TokenInfo {
	flags := t.Flags | wire.CKFTokenInitialized | wire.CKFUserPINInitialized
	if !t.NoLogin {
		flags |= wire.CKFLoginRequired
	}
	switch {
	case t.Mute:
	case t.tries == 0:
		flags |= wire.CKFUserPINLocked
	case t.tries == 1:
		flags |= wire.CKFUserPINFinalTry | wire.CKFUserPINCountLow
	case t.tries < t.most:
		flags |= wire.CKFUserPINCountLow
	}
	return wire.TokenInfo{Flags: flags, MinPIN: 4, MaxPIN: 32, LoggedIn: t.in[p], Stay: t.stay}
}

// check tries a PIN, after what package token/module checks before.
func (t *FakeToken) check(p *FakeProcess, lastTry, pad bool, pin []byte) *wire.Error {
	e := &wire.Error{HasInfo: true, Info: t.info(p)}
	switch {
	case e.Info.Flags&wire.CKFUserPINLocked != 0:
		e.Reason = wire.ReasonPINLocked
		return e
	case e.Info.Flags&wire.CKFUserPINFinalTry != 0 && !lastTry:
		e.Reason = wire.ReasonLastTry
		return e
	case pad != (len(pin) == 0):
		e.Reason = wire.ReasonProtocol
		return e
	}
	if pad {
		pin = t.Typed
	}
	e.Function = "C_Login"
	switch {
	case t.tries == 0:
		e.RV = wire.CKRPINLocked
	case slices.Equal(pin, t.pin):
		t.tries, t.stale = t.most, false
		t.right++
		return nil
	default:
		t.tries--
		t.wrong++
		e.RV = wire.CKRPINIncorrect
	}
	e.Info = t.info(p)
	return e
}

// A FakeKey is a key pair on a FakeToken. Its fields are set by the function
// given to AddKey, and later by Change.
type FakeKey struct {
	ID        []byte
	Label     string
	Always    bool     // CKA_ALWAYS_AUTHENTICATE
	Public    bool     // the private key shows without a login, but signs only after one
	Bare      bool     // the private key does not show its public half
	NoPublic  bool     // there is no public key object
	NoPrivate bool     // there is no private key object
	NoSign    bool     // CKA_SIGN is false
	NoDecrypt bool     // CKA_DECRYPT is false
	NoDerive  bool     // CKA_DERIVE is false
	Derives   bool     // the key wants its PIN for C_DeriveKey as well, if Always is set
	Wrong     bool     // signatures are wrong
	Returns   uint64   // what C_Sign returns instead
	Cert      [][]byte // certificates with its ID
	ECPoint   []byte   // instead of what the standard wants
	private   crypto.Signer
	kind      string
}

// AddKey adds a key of a kind, such as P256, and returns its public half. set
// may be nil.
func (t *FakeToken) AddKey(kind string, id byte, label string, set func(k *FakeKey)) crypto.PublicKey {
	t.fake.t.Helper()
	k := &FakeKey{ID: []byte{id}, Label: label, kind: kind}
	if err := t.fake.make(k); err != nil {
		t.fake.t.Fatal(err)
	}
	if set != nil {
		set(k)
	}
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	t.keys = append(t.keys, k)
	return k.private.Public()
}

// make makes the pair of a key.
func (f *Fake) make(k *FakeKey) (err error) {
	switch k.kind {
	case RSA2048:
		k.private, err = f.rsaKey()
	case P256:
		k.private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		k.private, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case P521:
		k.private, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case Ed25519:
		_, k.private, err = ed25519.GenerateKey(rand.Reader)
	default:
		err = fmt.Errorf("a fake has no keys of kind %s", k.kind)
	}
	return err
}

// generate makes a new key, as far as package token/module has it made. Fake.mu is
// held, and let go of meanwhile.
func (t *FakeToken) generate(p *FakeProcess, m *wire.Generate) (*wire.GenerateReply, *wire.Error) {
	if !t.NoLogin && !t.in[p] && !m.Check {
		return nil, &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRUserNotLoggedIn}
	}
	k := &FakeKey{ID: m.ID, Label: m.Label, Wrong: t.Spoils, kind: RSA2048}
	for name, oid := range curves {
		der, err := asn1.Marshal(oid)
		if err == nil && slices.ContainsFunc(m.ECParams, func(v wire.Value) bool { return slices.Equal(v.Bytes, der) }) {
			k.kind = name
		}
	}
	if len(m.ECParams) == 0 && m.Bits != 2048 {
		return nil, &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRKeySizeRange}
	}
	for n := byte(1); len(k.ID) == 0; n++ {
		if !slices.ContainsFunc(t.keys, func(o *FakeKey) bool { return slices.Equal(o.ID, []byte{n}) }) {
			k.ID = []byte{n}
		}
	}
	for _, o := range t.keys {
		if slices.Equal(o.ID, k.ID) || o.Label == k.Label && k.Label != "" {
			return nil, &wire.Error{Reason: wire.ReasonExists, Text: fmt.Sprintf("key %x, %q, is there", o.ID, o.Label)}
		}
	}
	if m.Check {
		return new(wire.GenerateReply), nil
	}
	if t.Extractable {
		return nil, &wire.Error{Reason: wire.ReasonExtractable}
	}
	t.fake.mu.Unlock()
	err := t.fake.make(k)
	t.fake.mu.Lock()
	if err != nil {
		return nil, &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRFunctionFailed}
	}
	t.keys = append(t.keys, k)
	r := &wire.GenerateReply{
		Public:          wire.Object{Class: wire.CKOPublicKey, ID: k.ID, Label: k.Label, KeyType: k.keyType()},
		Private:         wire.Object{Class: wire.CKOPrivateKey, ID: k.ID, Label: k.Label, KeyType: k.keyType()},
		AlwaysSensitive: wire.True, NeverExtractable: wire.True, Local: wire.True,
	}
	k.public(&r.Public)
	return r, nil
}

// Change changes the first key with an ID while the token is in use.
func (t *FakeToken) Change(id byte, set func(k *FakeKey)) {
	t.fake.mu.Lock()
	defer t.fake.mu.Unlock()
	for _, k := range t.keys {
		if slices.Equal(k.ID, []byte{id}) {
			set(k)
			return
		}
	}
	t.fake.t.Errorf("no key %d", id)
}

// rsaKeys are the RSA keys made so far: they take long, so each Fake has the
// same ones.
var rsaKeys struct {
	mu  sync.Mutex
	all []*rsa.PrivateKey
}

// rsaKey returns a key that this Fake does not have yet.
func (f *Fake) rsaKey() (*rsa.PrivateKey, error) {
	f.mu.Lock()
	n := f.rsa
	f.rsa++
	f.mu.Unlock()
	rsaKeys.mu.Lock()
	defer rsaKeys.mu.Unlock()
	if n == len(rsaKeys.all) {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return nil, err
		}
		rsaKeys.all = append(rsaKeys.all, k)
	}
	return rsaKeys.all[n], nil
}

var curves = map[string]asn1.ObjectIdentifier{
	P256: {1, 2, 840, 10045, 3, 1, 7}, P384: {1, 3, 132, 0, 34}, P521: {1, 3, 132, 0, 35}, Ed25519: {1, 3, 101, 112},
}

// public sets the attributes of the public half.
func (k *FakeKey) public(o *wire.Object) {
	switch pub := k.private.Public().(type) {
	case *rsa.PublicKey:
		o.Modulus, o.Exponent = pub.N.Bytes(), []byte{1, 0, 1}
		return
	case *ecdsa.PublicKey:
		o.ECPoint, _ = pub.Bytes() // a key that was just made
	case ed25519.PublicKey:
		o.ECPoint = pub
	}
	o.ECPoint, _ = asn1.Marshal(o.ECPoint)
	if k.ECPoint != nil {
		o.ECPoint = k.ECPoint
	}
	o.ECParams, _ = asn1.Marshal(curves[k.kind])
}

func (k *FakeKey) keyType() uint64 {
	switch k.private.(type) {
	case *rsa.PrivateKey:
		return wire.CKKRSA
	case *ecdsa.PrivateKey:
		return wire.CKKEC
	default:
		return wire.CKKECEdwards
	}
}

func tri(b bool) wire.Tri {
	if b {
		return wire.True
	}
	return wire.False
}

func (t *FakeToken) sees(p *FakeProcess, k *FakeKey) bool {
	return !k.NoPrivate && (k.Public || t.NoLogin || t.in[p])
}

func (t *FakeToken) objects(p *FakeProcess) []wire.Object {
	var all []wire.Object
	for _, k := range t.keys {
		if !k.NoPublic {
			o := wire.Object{Class: wire.CKOPublicKey, ID: k.ID, Label: k.Label, KeyType: k.keyType(), Sign: wire.True, Private: wire.False}
			k.public(&o)
			all = append(all, o)
		}
		if t.sees(p, k) {
			o := wire.Object{
				Class: wire.CKOPrivateKey, ID: k.ID, Label: k.Label, KeyType: k.keyType(),
				Sign: tri(!k.NoSign), Decrypt: tri(!k.NoDecrypt), Derive: tri(!k.NoDerive), Private: tri(!k.Public), AlwaysAuth: tri(k.Always),
			}
			if !k.Bare {
				k.public(&o)
			}
			all = append(all, o)
		}
		for _, der := range k.Cert {
			all = append(all, wire.Object{Class: wire.CKOCertificate, ID: k.ID, Label: k.Label, Value: der, Private: wire.False})
		}
	}
	return all
}

// is tells whether the key is the one that the agent names.
func (k *FakeKey) is(id *wire.KeyID) bool {
	var o wire.Object
	k.public(&o)
	var point []byte
	switch pub := k.private.Public().(type) {
	case *ecdsa.PublicKey:
		point, _ = pub.Bytes()
	case ed25519.PublicKey:
		point = pub
	}
	return k.keyType() == id.KeyType && slices.Equal(k.ID, id.ID) &&
		slices.Equal(o.Modulus, id.Modulus) && slices.Equal(point, id.ECPoint)
}

// calls are the functions of PKCS#11 with which an operation begins and ends.
var calls = map[wire.Function][2]string{
	wire.Sign:    {"C_SignInit", "C_Sign"},
	wire.Decrypt: {"C_DecryptInit", "C_Decrypt"},
	wire.Derive:  {"C_DeriveKey", "C_DeriveKey"},
}

func (t *FakeToken) operate(p *FakeProcess, m *wire.Operate) ([]byte, *wire.Error) {
	i := slices.IndexFunc(t.keys, func(k *FakeKey) bool { return k.is(&m.Key) && t.sees(p, k) })
	if i < 0 {
		return nil, &wire.Error{Reason: wire.ReasonNoKey, HasInfo: true, Info: t.info(p)}
	}
	k := t.keys[i]
	if m.ContextLogin && t.info(p).Flags&wire.CKFUserPINLocked != 0 {
		return nil, &wire.Error{Reason: wire.ReasonPINLocked, HasInfo: true, Info: t.info(p)}
	}
	begin, end := calls[m.Function][0], calls[m.Function][1]
	if rv, ok := t.Refuse[m.Mechanism]; ok {
		return nil, &wire.Error{Function: begin, RV: rv}
	}
	if t.Mechanisms != nil && !slices.Contains(t.Mechanisms, m.Mechanism) {
		return nil, &wire.Error{Function: begin, RV: wire.CKRMechanismInvalid}
	}
	if !t.NoLogin && (!t.in[p] || t.stale) {
		return nil, &wire.Error{Function: begin, RV: wire.CKRUserNotLoggedIn}
	}
	always := k.Always && (m.Function != wire.Derive || k.Derives)
	switch {
	case always && !m.ContextLogin:
		return nil, &wire.Error{Function: end, RV: wire.CKRUserNotLoggedIn}
	case m.ContextLogin && !t.stays(m.Stay):
		return nil, &wire.Error{Reason: wire.ReasonOtherToken}
	case m.ContextLogin:
		if e := t.check(p, m.LastTry, m.Pad, m.PIN.Bytes()); e != nil {
			return nil, e
		}
	}
	if k.Returns != 0 {
		return nil, &wire.Error{Function: end, RV: k.Returns}
	}
	var result []byte
	var err error
	switch m.Function {
	case wire.Sign:
		result, err = k.sign(m)
	case wire.Decrypt:
		if result, err = k.decrypt(m); err != nil {
			return nil, &wire.Error{Function: end, Reason: wire.ReasonCiphertext}
		}
	case wire.Derive:
		result, err = k.derive(m)
	}
	if err != nil {
		return nil, &wire.Error{Function: end, RV: wire.CKRDataInvalid}
	}
	if len(result) > int(m.ResultLen) {
		return nil, &wire.Error{Function: end, RV: wire.CKRBufferTooSmall}
	}
	if k.Wrong {
		result[len(result)-1] ^= 1
	}
	if m.Function == wire.Sign {
		t.signed++
	}
	return result, nil
}

// decrypt decrypts as C_Decrypt does.
func (k *FakeKey) decrypt(m *wire.Operate) ([]byte, error) {
	key, ok := k.private.(*rsa.PrivateKey)
	if !ok {
		return nil, errors.New("no such mechanism")
	}
	if m.Mechanism == wire.CKMRSAPKCSOAEP {
		return key.Decrypt(nil, m.Data, &rsa.OAEPOptions{
			Hash: paramHashes[m.Params.Hash], MGFHash: mgfHashes[m.Params.MGF], Label: m.Params.Source,
		})
	}
	return key.Decrypt(nil, m.Data, nil) // PKCS #1 v1.5
}

// derive returns the secret that C_DeriveKey makes.
func (k *FakeKey) derive(m *wire.Operate) ([]byte, error) {
	key, ok := k.private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("no such mechanism")
	}
	own, err := key.ECDH()
	if err != nil {
		return nil, err
	}
	peer, err := own.Curve().NewPublicKey(m.Data)
	if err != nil {
		return nil, err
	}
	return own.ECDH(peer)
}

// hashed are the mechanisms that hash what they sign.
var hashed = map[uint64]crypto.Hash{
	wire.CKMSHA1RSAPKCS: crypto.SHA1, wire.CKMSHA256RSAPKCS: crypto.SHA256, wire.CKMSHA384RSAPKCS: crypto.SHA384,
	wire.CKMSHA512RSAPKCS: crypto.SHA512, wire.CKMSHA256RSAPSS: crypto.SHA256, wire.CKMSHA384RSAPSS: crypto.SHA384,
	wire.CKMSHA512RSAPSS: crypto.SHA512, wire.CKMECDSASHA1: crypto.SHA1, wire.CKMECDSASHA256: crypto.SHA256,
	wire.CKMECDSASHA384: crypto.SHA384, wire.CKMECDSASHA512: crypto.SHA512,
	wire.CKMSHA224RSAPKCS: crypto.SHA224, wire.CKMSHA1RSAPSS: crypto.SHA1, wire.CKMSHA224RSAPSS: crypto.SHA224,
	wire.CKMECDSASHA224: crypto.SHA224,
}

var paramHashes = map[uint64]crypto.Hash{
	wire.CKMSHA1: crypto.SHA1, wire.CKMSHA224: crypto.SHA224, wire.CKMSHA256: crypto.SHA256, wire.CKMSHA384: crypto.SHA384,
	wire.CKMSHA512: crypto.SHA512,
}

var mgfHashes = map[uint64]crypto.Hash{
	wire.CKGMGF1SHA1: crypto.SHA1, wire.CKGMGF1SHA224: crypto.SHA224, wire.CKGMGF1SHA256: crypto.SHA256,
	wire.CKGMGF1SHA384: crypto.SHA384, wire.CKGMGF1SHA512: crypto.SHA512,
}

func (k *FakeKey) sign(m *wire.Operate) ([]byte, error) {
	data := m.Data
	hash := hashed[m.Mechanism]
	if hash != 0 {
		h := hash.New()
		_, _ = h.Write(data)
		data = h.Sum(nil)
	}
	switch key := k.private.(type) {
	case *rsa.PrivateKey:
		switch m.Mechanism {
		case wire.CKMRSAPKCS, wire.CKMSHA1RSAPKCS, wire.CKMSHA224RSAPKCS, wire.CKMSHA256RSAPKCS, wire.CKMSHA384RSAPKCS, wire.CKMSHA512RSAPKCS:
			return rsa.SignPKCS1v15(nil, key, hash, data) // without a hash: as it is
		case wire.CKMRSAPKCSPSS, wire.CKMSHA1RSAPSS, wire.CKMSHA224RSAPSS, wire.CKMSHA256RSAPSS, wire.CKMSHA384RSAPSS, wire.CKMSHA512RSAPSS:
			of, ok := paramHashes[m.Params.Hash]
			if !ok {
				return nil, errors.New("no such hash")
			}
			return rsa.SignPSS(rand.Reader, key, of, data, &rsa.PSSOptions{SaltLength: int(m.Params.Salt)})
		}
	case *ecdsa.PrivateKey:
		if m.Mechanism != wire.CKMECDSA && hash == 0 {
			break
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, data)
		if err != nil {
			return nil, err
		}
		n := (key.Params().BitSize + 7) / 8
		return append(r.FillBytes(make([]byte, n)), s.FillBytes(make([]byte, n))...), nil
	case ed25519.PrivateKey:
		if m.Mechanism == wire.CKMEdDSA {
			return ed25519.Sign(key, data), nil
		}
	}
	return nil, errors.New("no such mechanism")
}
