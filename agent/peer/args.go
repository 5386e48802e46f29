package peer

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// maxArguments is how many bytes of a process's arguments are read.
const maxArguments = 32 << 10

// Arguments returns the arguments of the process that opened the connection, its own name first.
// nil means that they cannot be read. Arguments after the first 32 KiB are missing. Use arguments
// for guesses only: a process may write there what it likes, and another process may have the
// number by now.
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
	// Each argument ends with a NUL. An argument without one is cut off.
	end := bytes.LastIndexByte(b, 0)
	if end < 0 {
		return nil
	}
	return strings.Split(string(b[:end]), "\x00")
}
