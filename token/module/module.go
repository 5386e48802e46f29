// Package module is the program inside a module process: it loads one PKCS#11
// module, and does with it what the agent asks for over a socket (package wire).
//
// It promises that a crash, a hang or a lie of the module stays in this process,
// which ends as soon as the agent does or closes the socket; that a PIN lies in
// locked memory only, is given to the module without a copy of this program's
// making, and only after the token has been looked at once more; that a session
// is used by one request at a time; and that neither standard error nor an
// answer ever has a secret in it. Before the module is loaded the process confines
// itself (package sandbox).
//
// It knows nothing of PIN policy and never retries a PIN. It leaves to the agent
// how long to wait, when to kill the process, and the environment it runs in:
// the C library of a module may copy a PIN, so the agent has glibc overwrite
// what is freed (GLIBC_TUNABLES=glibc.malloc.perturb=165:glibc.malloc.tcache_count=0).
package module

import (
	"errors"
	"io"
	"log"
	"os"
)

// Main runs the module process on the sockets at the file descriptors wire.FD and
// wire.LanesFD and
// returns its exit status: 0 when the agent has closed the socket, 1 otherwise.
// The caller exits with it at once: calls into the module may still hang.
//
// What there is to tell goes to standard error.
func Main() int {
	logger := log.New(os.Stderr, "", 0)
	if err := run(logger); !errors.Is(err, io.EOF) {
		logger.Print(err)
		return 1
	}
	return 0
}

// run answers the agent until there is an error, which is io.EOF when the agent
// has closed the socket.
func run(logger *log.Logger) error {
	if err := harden(); err != nil {
		return err
	}
	conn, lanes, err := agentSockets()
	if err != nil {
		return err
	}
	s := newServer(conn, logger)
	go s.acceptLanes(lanes)
	return s.serve()
}
