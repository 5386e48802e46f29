package module

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"p11-agent/token/wire"
)

// errNotAgent is returned when the socket is not there, or not the agent's.
var errNotAgent = errors.New("this command is run by p11-agent itself")

// agentSockets takes over the sockets that the agent has left for this process: the
// one that it asks at, and the one that it opens lanes with. Their other ends must
// be held by the parent process, which must still live.
func agentSockets() (*wire.ModuleConn, *wire.ModuleLanes, error) {
	asks, err := agentSocket(wire.FD, unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, err
	}
	opens, err := agentSocket(wire.LanesFD, unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, nil, errors.Join(err, asks.Close())
	}
	return wire.NewModuleConn(asks), wire.NewModuleLanes(opens), nil
}

func agentSocket(fd, kind int) (*net.UnixConn, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_UNIX {
		return nil, errNotAgent
	}
	is, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || is != kind {
		return nil, errNotAgent
	}
	// A socket pair has the credentials of the process that made it.
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(peer.Pid) != os.Getppid() {
		return nil, errNotAgent
	}
	unix.CloseOnExec(fd) // a module may start programs
	f := os.NewFile(uintptr(fd), "agent")
	defer f.Close() // FileConn makes a copy of its own
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use the agent's socket: %w", err)
	}
	return c.(*net.UnixConn), nil // that is what its domain is for
}

// harden makes this process keep its memory to itself and end with the agent.
//
// The end of the agent shows first as end of file on the socket. The signal is
// for a module that has broken this program's own threads. It is sent when the
// agent's thread that started this process ends, and so is for an agent that
// keeps its threads, as Go does unless a locked one is let go.
func harden() error {
	debug.SetTraceback("none") // registers and stacks may hold a PIN
	if err := crashQuietly(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("end with the agent: %w", err)
	}
	// Some modules print; what they print is for the log.
	if err := unix.Dup3(unix.Stderr, unix.Stdout, 0); err != nil {
		return fmt.Errorf("send standard output to the log: %w", err)
	}
	// The work is done in C, and lanes wait for the agent in system calls: a thread
	// that comes back from there is to find a place to run at once, and not when the
	// scheduler finds out in 10 ms that another one is not using its own.
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 4) + 8)
	return nil
}
