package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/token/wire"
)

// Options say how to start a module process.
type Options struct {
	Name string // of the module; added to Command
	// Command is the program and its arguments.
	Command []string
	Env     []string   // the whole environment
	Hello   wire.Hello // what to load, and how; Start sets the version
	// Timeout is the time for any one request. It replaces the timeouts of this package, but only lengthens
	// GenerateTimeout. 0: none.
	Timeout time.Duration
	Log     *slog.Logger
	// SlotsLeft is called with slots that have lost their token, and with nil if each slot may have. It may be nil.
	SlotsLeft func(p *Process, slots []wire.SlotID)
	// Starting is called before the process can answer. It may be nil.
	Starting func(*Process)
}

// Start starts a module process and has it load the module. ctx bounds the start only: the process lives until it is
// killed. On failure, Start waits for the end of the process.
func Start(ctx context.Context, opts Options) (*Process, error) {
	asks, theirs, err := connect(unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	opens, theirLanes, err := connect(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, errors.Join(err, asks.Close(), theirs.Close())
	}
	conn, lanes := wire.NewConn(asks), wire.NewLanes(opens)
	closeAll := func() error { return errors.Join(conn.Close(), lanes.Close(), theirs.Close(), theirLanes.Close()) }

	said, printed, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll())
	}
	argv := opts.Command
	cmd := exec.Command(argv[0], append(argv[1:len(argv):len(argv)], opts.Name)...)
	cmd.Args[0] = "p11-agent" // for the list of processes
	cmd.Env = opts.Env
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, theirLanes} // become wire.FD and wire.LanesFD
	cmd.Stdout = printed                            // keeps the module from printing to the agent's output
	cmd.Stderr = printed
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no Ctrl-C of the agent's terminal
	err = cmd.Start()
	_ = printed.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll(), said.Close())
	}
	_ = theirs.Close() // so that the end of the process is the end of the file
	_ = theirLanes.Close()

	p := &Process{
		name:    opts.Name,
		timeout: opts.Timeout,
		cmd:     cmd,
		conn:    conn,
		lanes:   lanes,
		log:     opts.Log,
		events:  make(chan struct{}, 1),
		done:    make(chan struct{}),
		waiting: make(map[uint32]*pending),
		queues:  make(map[wire.TokenID]*queue),
	}
	if opts.SlotsLeft != nil {
		p.left = func(slots []wire.SlotID) { opts.SlotsLeft(p, slots) }
	}
	if p.output, err = newOutput(said, opts.Log); err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll(), said.Close(), cmd.Process.Kill(), cmd.Wait())
	}
	if opts.Starting != nil {
		opts.Starting(p)
	}
	p.attend(said)

	hello := opts.Hello
	hello.Version = wire.Version
	if err := p.Call(ctx, startTimeout, wire.TypeHello, &hello, &p.info); err != nil {
		p.Kill(errors.New("the module process did not start"))
		<-p.done
		return nil, quote(err, p.output.since(0))
	}
	return p, nil
}

// attend reads the answers and the output of the process, and closes done after the process has ended and both are
// read.
func (p *Process) attend(said *os.File) {
	var reading sync.WaitGroup
	reading.Go(func() { p.output.readAll(p.output.read) })
	reading.Go(p.read)
	go func() {
		killRest(p.cmd.Process.Pid)
		state := p.cmd.Wait()
		p.fail(exitReason(state))
		// A child that has left the process group may keep the pipe open.
		_ = said.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		reading.Wait()
		p.sending.Wait()
		_ = said.Close()
		p.mu.Lock()
		p.err = quote(p.err, p.output.since(0))
		p.mu.Unlock()
		close(p.done)
	}()
}

// connect makes a socket pair: the agent's end, and the file for the module process.
func connect(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("connect a module process: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "module process")
	c, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("connect a module process: %w", err), theirs.Close())
	}
	return c.(*net.UnixConn), theirs, nil
}

// killRest waits for the end of a process and kills the rest of its process group: the children of its module. The
// caller has not waited for the process yet, so no other process has its number.
func killRest(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == nil {
			_ = unix.Kill(-pid, unix.SIGKILL) // fails if there is no child
		}
		if err != unix.EINTR {
			return
		}
	}
}

// exitReason returns how a process ended.
func exitReason(err error) error {
	e, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return ErrGone
	}
	if ws, ok := e.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return fmt.Errorf("%w: it crashed (%s)", ErrGone, ws.Signal())
	}
	return fmt.Errorf("%w: %s", ErrGone, e.ProcessState)
}
