package peer

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// maxArguments bounds the bytes that are read of a process's arguments.
const maxArguments = 32 << 10

// Arguments returns the arguments of the process that opened the connection, as the
// process says them, its own name first. nil: they cannot be read. The end of
// arguments of more than 32 KiB is left out. Arguments are good for guesses only: a
// process may write there what it likes, and the number may be that of another process
// by now.
func (p Peer) Arguments() []string {
	if len(p.Chain) == 0 {
		return nil
	}
	f, err := os.Open(procFile(p.Chain[0].PID, "cmdline"))
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxArguments))
	if err != nil {
		return nil
	}
	// Each argument ends with a NUL. What follows the last NUL is cut off.
	end := bytes.LastIndexByte(b, 0)
	if end < 0 {
		return nil
	}
	return strings.Split(string(b[:end]), "\x00")
}
