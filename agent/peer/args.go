package peer

import (
	"bytes"
	"io"
	"os"
)

// maxArguments bounds the bytes that are read of a process's arguments.
const maxArguments = 32 << 10

// Arguments returns the arguments of the process that opened the connection, and
// of its parent, as they say themselves, within bounds. They are good for guesses
// only: processes may write there what they like, and a number may belong to
// another process by now.
func (p Peer) Arguments() []string {
	var all []string
	for i, link := range p.Chain {
		if i == 2 {
			break
		}
		f, err := os.Open(procFile(link.PID, "cmdline"))
		if err != nil {
			continue
		}
		b, err := io.ReadAll(io.LimitReader(f, maxArguments))
		_ = f.Close()
		if err != nil {
			continue
		}
		for _, arg := range bytes.Split(b, []byte{0}) {
			if len(arg) > 0 {
				all = append(all, string(arg))
			}
		}
	}
	return all
}
