// Package peer tells who is at the other end of a Unix socket: the credentials
// that the kernel recorded when the connection was made, and the chain of
// programs that led to it.
//
// It promises that a Chain describes the very process that made the connection,
// not another one that got its number later, and that a name in it can be put
// in front of a person: it holds no control character and cannot imitate the
// links of the chain. The names are what the processes' owner chose; they help a
// person to recognise a request and prove nothing.
//
// Later, when a person is to be asked, [Peer.Desk] tells where the one is who
// uses that process: which display and which terminal. Then, too, it is the very
// process or none. A terminal is opened through the process, so that it is the
// right one also in a container, and only while the process is the job in the
// foreground there.
//
// The process that made a connection need not be the one that uses it: sockets
// are inherited and passed on, and a forwarded agent has ssh as its peer. What
// to make of a peer is left to others.
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

// A Peer is the process that opened a connection, as the kernel knows it. What
// could not be found out is left at its zero value (Known says so for the
// whole); a Peer is a value and is not changed once made.
type Peer struct {
	Known bool // the kernel told the credentials below
	PID   int  // 0 when the process is in a PID namespace that is not visible here
	UID   int
	GID   int
	// Chain is the process and its ancestors, nearest first, as far as they
	// can be read; each program says of itself what it is called. It is empty
	// when the process has ended, also if another one uses its socket now.
	Chain []Process
	// Program is the file that the process runs. It is the zero value when there is no
	// Chain, and when the kernel does not show it: that of another user's process, or
	// of one that keeps its memory to itself (PR_SET_DUMPABLE in prctl(2)).
	Program Program
	// id tells the process from another one that gets its number.
	id   identity
	text string // what String returns, when that is known; it is in each line of the log
}

// A Program is a file that a process runs.
type Program struct {
	Path     string // where it was when it was started; another file may be there by now
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

// SameProgram tells whether the process runs the program that this one runs: the
// same file or, as an upgrade may have put another in its place and people have it
// in several places, one of the same name. Whoever can start programs can give them
// that name: it tells p11-agent from ssh, not from somebody who means to deceive.
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
	return fmt.Errorf("it comes from %s, and only %s may ask for that", plain.Program(filepath.Base(p.Program.Path), maxName), filepath.Base(own.Path))
}

var ownProgram = sync.OnceValue(func() Program { return programOf(os.Getpid()) })
