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

// errNotAgent means that the socket is missing, or that it is not the agent's.
var errNotAgent = errors.New("this command is run by p11-agent itself")

// agentSockets takes over the two sockets that the agent has left for this process. The
// agent sends requests on one socket, and opens lanes with the other. The parent process
// must hold the other ends, and must still live.
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
	// The kernel notes the credentials of the process that made a socket pair.
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(peer.Pid) != os.Getppid() {
		return nil, errNotAgent
	}
	unix.CloseOnExec(fd) // a module may start programs
	f := os.NewFile(uintptr(fd), "agent")
	defer f.Close() // FileConn copies it
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use the agent's socket: %w", err)
	}
	return c.(*net.UnixConn), nil // the domain is AF_UNIX
}

// harden keeps this process's memory private and makes the process end with the agent.
//
// The end of the agent first shows as end of file on the socket. The signal is for a
// module that has broken this program's threads. The kernel sends it when the thread of
// the agent that started this process ends. So the agent has to keep its threads. Go
// keeps them, unless a goroutine ends while it has locked its thread.
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
	// Some modules print to standard output. Their text goes to the log.
	if err := unix.Dup3(unix.Stderr, unix.Stdout, 0); err != nil {
		return fmt.Errorf("send standard output to the log: %w", err)
	}
	// The calls run in C, and lanes wait for the agent in system calls. A thread that
	// returns from there should find a processor at once. With fewer processors it would
	// wait up to 10 ms, until the scheduler finds out that another thread does not use
	// its processor.
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 4) + 8)
	return nil
}
