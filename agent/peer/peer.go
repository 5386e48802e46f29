// Package peer tells which process is at the other end of a Unix socket. It reads the
// credentials that the kernel recorded when the connection was made, and the chain of programs
// that led to the process.
//
// It promises:
//
//   - A Chain describes the very process that made the connection, not another one that got
//     its number later.
//   - A name in a Chain can be shown to a person: it has no control character and cannot
//     imitate the links of the chain.
//   - [Peer.Desk] finds the display and the terminal of the same process, or none. It opens
//     the terminal only while the process is the job in the foreground there. It opens the
//     terminal through the process, so that it gets the right file also in a container.
//
// The owner of the processes chooses the names. They help a person to recognise a request and
// prove nothing. The process that made a connection need not be the one that uses it: processes
// inherit sockets and pass them on, and a forwarded agent has ssh as its peer. Callers decide
// what a peer may do.
package peer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"p11-agent/pinentry/plain"
)

// A Peer is the process that opened a connection, as the kernel knows it. An unknown field has its
// zero value; Known is false if all are unknown. A Peer is a value and does not change.
type Peer struct {
	Known bool // the kernel has told the credentials below
	PID   int  // 0 when the process is in a PID namespace that is not visible here
	UID   int
	GID   int
	// Chain is the process and its ancestors, nearest first, as far as they can be read.
	// Each program chooses its name. Chain is empty when the process has ended, also if
	// another process uses its socket now.
	Chain []Process
	// Program is the file that the process runs. It is zero without a Chain. It is also
	// zero when the kernel does not show the file: for another user's process, and for a
	// process that hides its memory (PR_SET_DUMPABLE in prctl(2)).
	Program Program
	// id tells the process from another one that gets its number.
	id   identity
	text string // the result of String, if it is known; each line of the log has it
}

// A Program is a file that a process runs.
type Program struct {
	Path     string // of the file when it was started; another file may be there by now
	Dev, Ino uint64
}

// A Process is one link of the chain.
type Process struct {
	PID  int
	Name string // the program's file name, or the name it gave itself, made printable
}

// String returns the chain for a person, such as
// "ssh (1234) ← git (1230) ← bash (99)", or as much as is known.
func (p Peer) String() string {
	switch {
	case p.text != "":
		return p.text
	case !p.Known:
		return "unknown process"
	case len(p.Chain) > 0:
		var b strings.Builder
		for i, link := range p.Chain {
			if i > 0 {
				b.WriteString(arrow)
			}
			fmt.Fprintf(&b, "%s (%d)", link.Name, link.PID)
		}
		return b.String()
	case p.PID > 0:
		return fmt.Sprintf("process %d", p.PID)
	}
	return "process out of sight"
}

// SameProgram returns nil if the process runs the program that this process runs: the same file, or
// a file of the same name. People have the program in several places, and an upgrade replaces the
// file. Any user who can start programs can give them that name. So SameProgram tells p11-agent
// from ssh, not from a program that means to deceive.
func (p Peer) SameProgram() error {
	own := ownProgram()
	switch {
	case own == Program{}:
		return errors.New("the agent's own program cannot be seen")
	case p.Program == Program{}:
		return errors.New("the program of the process that asks cannot be seen")
	case p.Program.Dev == own.Dev && p.Program.Ino == own.Ino, filepath.Base(p.Program.Path) == filepath.Base(own.Path):
		return nil
	}
	return fmt.Errorf("the request comes from %s, and only %s may ask for that", plain.Program(filepath.Base(p.Program.Path), maxName), filepath.Base(own.Path))
}

var ownProgram = sync.OnceValue(func() Program { return programOf(os.Getpid()) })
