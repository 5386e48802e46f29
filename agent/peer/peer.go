// Package peer tells who is at the other end of a Unix socket.
package peer

// A Peer is the process that opened a connection, as the kernel knows it. What
// could not be found out is left at its zero value (Known says so for the
// whole); a Peer is a value and is not changed once made.
type Peer struct {
	Known bool // the kernel told the credentials below
	PID   int
	UID   int
	GID   int
	// Chain is the process and its ancestors, nearest first, as far as they
	// can be read; each program says of itself what it is called.
	Chain []Process
}

// A Process is one link of the chain.
type Process struct {
	PID  int
	Name string // the program's file name, or the name it gave itself, made printable
}
