package registry

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"

	"p11-agent/pinentry/plain"
)

// An attempt is one start of a Bridge's command.
type attempt struct {
	done chan struct{} // closed when the command has ended
	err  error         // why it ended; nil: without an error
	said tail
}

// Cause tells what happened to the command that the Bridge started last. Add it to an
// error of the module that the Bridge serves: such an error only says that the connection
// broke.
//
// The command may be about to end, so Cause waits for its end, at most for the time that
// a command may take to end. Cause returns "" if no command was started. It also returns
// "" if the command ended without an error and printed nothing.
func (b *Bridge) Cause(ctx context.Context) string {
	b.mu.Lock()
	a := b.last
	b.mu.Unlock()
	if a == nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	// The command's arguments stay out of the text: they may hold a PIN.
	text := fmt.Sprintf("its command %q ", b.o.Command[0])
	said := a.said.String()
	select {
	case <-a.done:
		said = a.said.String()
		switch {
		case a.err != nil:
			text += fmt.Sprintf("failed: %v", a.err)
		case said == "":
			return ""
		default:
			text += "ended"
		}
	case <-ctx.Done():
		text += "still runs"
	}
	if said != "" {
		text += "; it said: " + said
	}
	return text
}

// ServerCause tells why p11-kit-client.so cannot reach the server at an address. It
// returns "" if the server can be reached, or if ServerCause cannot check that.
func ServerCause(ctx context.Context, address string) string {
	path, ok := strings.CutPrefix(address, "unix:path=")
	if !ok {
		return ""
	}
	if plain, err := url.PathUnescape(path); err == nil {
		path = plain
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Sprintf("its server cannot be reached: %v", err)
	}
	_ = c.Close()
	return ""
}

const (
	tailLines = 3   // of a command's output are kept
	tailLine  = 200 // bytes of each
	tailLog   = 200 // lines of one command are logged
)

// tail keeps the last lines of the text that a command writes to it.
type tail struct {
	log *slog.Logger

	mu     sync.Mutex
	line   []byte
	last   []string
	logged int
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for rest := b; len(rest) > 0; {
		part, after, whole := bytes.Cut(rest, []byte("\n"))
		t.line = append(t.line, part[:min(len(part), tailLine-len(t.line))]...)
		rest = after
		if whole {
			t.endLocked()
		}
	}
	return len(b), nil
}

// endLocked stores the line that has ended. The caller holds mu.
func (t *tail) endLocked() {
	line := plain.Output(t.line)
	t.line = t.line[:0]
	if line == "" {
		return
	}
	t.last = append(t.last, line)
	t.last = t.last[max(0, len(t.last)-tailLines):]
	if t.logged++; t.log != nil && t.logged <= tailLog {
		t.log.Debug("command of a remote module printed", "line", line)
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.last
	if line := plain.Output(t.line); line != "" {
		all = append(all[:len(all):len(all)], line)
	}
	return strings.Join(all[max(0, len(all)-tailLines):], " | ")
}

// started notes that the command is about to start.
func (b *Bridge) started() *attempt {
	a := &attempt{done: make(chan struct{}), said: tail{log: b.o.Log}}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = a
	return a
}

// ended notes how the command ended. Call it once.
func (a *attempt) ended(err error) {
	a.err = err
	close(a.done)
}
