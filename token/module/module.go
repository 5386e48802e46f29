// Package module is the program inside a module process. It loads one PKCS#11 module, and
// makes the calls that the agent requests over a socket (package wire).
//
// The package promises:
//
//   - A crash, a hang or a lie of the module stays in this process. The process ends as
//     soon as the agent ends or closes the socket.
//   - A PIN lies in locked memory only. The module gets it without a copy by this
//     program, and only after another check of the token.
//   - One request at a time uses a session.
//   - Neither standard error nor an answer ever contains a secret.
//   - The process confines itself before it loads the module (package sandbox).
//
// The package knows no PIN policy and never retries a PIN. The agent decides how long to
// wait, and when to kill the process. The agent also sets the environment. The C library
// of a module may copy a PIN, so the agent makes glibc overwrite memory that it frees
// (GLIBC_TUNABLES=glibc.malloc.perturb=165:glibc.malloc.tcache_count=0).
package module

import (
	"errors"
	"io"
	"log"
	"os"
)

// Main runs the module process on the sockets at the file descriptors wire.FD and
// wire.LanesFD. It returns the exit status: 0 when the agent has closed the socket, 1
// otherwise. The caller exits at once, because calls into the module may still hang. Main
// writes its messages to standard error.
func Main() int {
	logger := log.New(os.Stderr, "", 0)
	if err := run(logger); !errors.Is(err, io.EOF) {
		logger.Print(err)
		return 1
	}
	return 0
}

// run answers the agent until an error occurs. The error is io.EOF when the agent has
// closed the socket.
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
