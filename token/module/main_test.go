package module

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/wire"
)

// TestMain makes the test program a module process, or another process that a test needs.
func TestMain(m *testing.M) {
	switch os.Getenv("P11_TEST_PROCESS") {
	case "module":
		os.Exit(Main())
	case "agent": // starts a module process, and never ends
		os.Exit(agentProcess())
	case "harden":
		os.Exit(hardenProcess())
	}
	os.Exit(terminaltest.Without(m).Run())
}

// patience is how long a test waits for a required event. No test passes or fails by the
// time that the event took.
const patience = 3 * time.Minute

// A process is a module process and the agent's end of its socket.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	conn   *wire.Conn
	lanes  *wire.Lanes
	stderr *logtest.Buffer
	events chan struct{}
	lost   chan error    // its error when it was of no further use
	exited chan struct{} // closed after the process has ended

	ids atomic.Uint32

	mu      sync.Mutex
	waiting map[uint32]chan wire.Frame
}

// socketPair returns the agent's end, and the other end as a file for the child.
func socketPair(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(fds[0]), "agent")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, err
	}
	return c.(*net.UnixConn), os.NewFile(uintptr(fds[1]), "module"), nil
}

// command returns a module process that is not started yet.
func command(env []string, stderr io.Writer, sockets ...*os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append([]string{
		"P11_TEST_PROCESS=module",
		"GLIBC_TUNABLES=glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
		"GORACE=halt_on_error=1 atexit_sleep_ms=0", // a race in the child ends it
	}, env...)
	cmd.Stderr = stderr
	cmd.ExtraFiles = sockets // become wire.FD and wire.LanesFD
	return cmd
}

// start starts a module process. It ends with the test.
func start(t testing.TB, env ...string) *process {
	t.Helper()
	c, socket, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	lanes, laneSocket, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		t.Fatal(err)
	}
	defer laneSocket.Close()
	p := &process{
		t: t, conn: wire.NewConn(c), lanes: wire.NewLanes(lanes), stderr: new(logtest.Buffer),
		events: make(chan struct{}, 100), lost: make(chan error, 10), exited: make(chan struct{}),
		waiting: make(map[uint32]chan wire.Frame),
	}
	p.cmd = command(env, p.stderr, socket, laneSocket)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // the process state has the error, too
		close(p.exited)
	}()
	read := make(chan struct{})
	go func() {
		defer close(read)
		p.read()
	}()
	t.Cleanup(func() {
		p.conn.Close()
		p.lanes.Close()
		p.wait()
		<-read
		if t.Failed() {
			t.Logf("standard error of the module process:\n%s", p.stderr)
		}
	})
	return p
}

// read passes each answer to the call that waits for it.
func (p *process) read() {
	for {
		f, err := p.conn.ReadFrame()
		p.mu.Lock()
		if err != nil {
			for _, c := range p.waiting {
				close(c)
			}
			p.waiting = nil
			p.mu.Unlock()
			return
		}
		if f.Type == wire.TypeEvent {
			p.mu.Unlock()
			p.events <- struct{}{}
			continue
		}
		if f.Type == wire.TypeLost {
			p.mu.Unlock()
			p.lost <- f.Decode(nil)
			continue
		}
		c := p.waiting[f.ID]
		delete(p.waiting, f.ID)
		p.mu.Unlock()
		c <- f
	}
}

// wait waits for the process to end and returns its exit status, or -1.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.t.Error("the module process does not end")
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	return p.cmd.ProcessState.ExitCode()
}

var errEnded = errors.New("the module process has ended")

// A call is a request under way.
type call struct {
	p     *process
	id    uint32
	frame chan wire.Frame
}

func (p *process) send(typ wire.Type, msg wire.Message) call {
	p.t.Helper()
	c := call{p: p, id: p.ids.Add(1), frame: make(chan wire.Frame, 1)}
	p.mu.Lock()
	if p.waiting == nil {
		close(c.frame)
	} else {
		p.waiting[c.id] = c.frame
	}
	p.mu.Unlock()
	// A failure shows at the reading end.
	_ = p.conn.WriteRequest(c.id, typ, msg)
	return c
}

// result waits for the answer.
func (c call) result(reply wire.Message) error {
	c.p.t.Helper()
	select {
	case f, ok := <-c.frame:
		if !ok {
			return errEnded
		}
		return f.Decode(reply)
	case <-time.After(patience):
		c.p.t.Error("no answer")
		_ = c.p.cmd.Process.Kill()
		return errEnded
	}
}

func (p *process) do(typ wire.Type, msg, reply wire.Message) error {
	p.t.Helper()
	return p.send(typ, msg).result(reply)
}

// hello loads a module, or fails the test.
func (p *process) hello(path string) *wire.HelloReply {
	p.t.Helper()
	reply := new(wire.HelloReply)
	if err := p.do(wire.TypeHello, &wire.Hello{Version: wire.Version, Path: path}, reply); err != nil {
		p.t.Fatalf("hello: %v", err)
	}
	return reply
}

// event waits until the process tells of a change.
func (p *process) event() {
	p.t.Helper()
	select {
	case <-p.events:
	case <-time.After(patience):
		p.t.Fatal("nothing is told of the change")
	}
}

// end waits until the process says that it is of no further use.
func (p *process) end() *wire.Error {
	p.t.Helper()
	select {
	case err := <-p.lost:
		return failure(p.t, err)
	case <-time.After(patience):
		p.t.Fatal("it goes on as if nothing was wrong")
		return nil
	}
}

// slots lists the slots, or fails the test.
func (p *process) slots(again bool) []wire.Slot {
	p.t.Helper()
	reply := new(wire.SlotsReply)
	if err := p.do(wire.TypeSlots, &wire.Slots{Reinitialize: again}, reply); err != nil {
		p.t.Fatalf("slots: %v", err)
	}
	return reply.Slots
}

// token returns the token with a label, or fails the test.
func (p *process) token(label string) wire.TokenID {
	p.t.Helper()
	for _, s := range p.slots(false) {
		if s.HasToken && s.Token.Label == label {
			return s.Token
		}
	}
	p.t.Fatalf("no token %q", label)
	return wire.TokenID{}
}

func (p *process) login(id wire.TokenID, pin string) (wire.TokenInfo, error) {
	p.t.Helper()
	var reply wire.TokenReply
	err := p.do(wire.TypeLogin, &wire.Login{Token: id, PIN: secrettest.Of(p.t, pin)}, &reply)
	return reply.Info, err
}

func (p *process) objects(id wire.TokenID) []wire.Object {
	p.t.Helper()
	var reply wire.ObjectsReply
	if err := p.do(wire.TypeObjects, &wire.Objects{Token: id}, &reply); err != nil {
		p.t.Fatalf("objects: %v", err)
	}
	return reply.Objects
}

func (p *process) sign(m *wire.Operate) ([]byte, error) {
	p.t.Helper()
	var reply wire.OperateReply
	err := p.do(wire.TypeOperate, m, &reply)
	return reply.Result, err
}

// failure returns the *wire.Error in err, or fails the test.
func failure(t testing.TB, err error) *wire.Error {
	t.Helper()
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		t.Fatalf("got %v, want an error of the module process", err)
	}
	return e
}

// wantRV fails the test unless err comes from the function and has the return value.
func wantRV(t testing.TB, err error, function string, rv uint64) {
	t.Helper()
	if e := failure(t, err); e.RV != rv || e.Function != function {
		t.Fatalf("got %v, want %s: %s", e, function, wire.RVName(rv))
	}
}

func wantReason(t testing.TB, err error, r wire.Reason) {
	t.Helper()
	if e := failure(t, err); e.Reason != r {
		t.Fatalf("got %v (reason %d), want: %v", e, e.Reason, r)
	}
}

// agentProcess starts a module process, has it load a module, prints its process id, and
// never ends.
func agentProcess() int {
	c, socket, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return 1
	}
	_, lanes, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return 1
	}
	cmd := command(os.Environ(), os.Stderr, socket, lanes)
	cmd.Env = append(cmd.Env, "P11_TEST_PROCESS=module")
	if err := cmd.Start(); err != nil {
		return 1
	}
	conn := wire.NewConn(c)
	if err := conn.WriteRequest(1, wire.TypeHello, &wire.Hello{Version: wire.Version, Path: os.Getenv("P11_TEST_MODULE")}); err != nil {
		return 1
	}
	fmt.Println(cmd.Process.Pid)
	select {}
}

// hardenProcess prints the state of the process after harden.
func hardenProcess() int {
	if err := harden(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		return 1
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		return 1
	}
	fmt.Printf("dumpable %d core %d %d\n", dumpable, core.Cur, core.Max)
	return 0
}
