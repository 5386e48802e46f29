package process

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/token/wire"
)

// pipeProcess is a process that is no more than the other end of a pipe, in a
// bubble of time. serve gets its requests.
func pipeProcess(t *testing.T, serve func(c *wire.ModuleConn, r wire.Request)) *Process {
	t.Helper()
	ours, theirs := net.Pipe()
	conn := wire.NewModuleConn(theirs)
	p := &Process{
		cmd: &exec.Cmd{Process: new(os.Process)}, conn: wire.NewConn(ours),
		events: make(chan struct{}, 1), done: make(chan struct{}), waiting: make(map[uint32]*pending),
		queues: make(map[wire.TokenID]*queue),
	}
	var all sync.WaitGroup
	all.Go(func() {
		p.read()
		p.fail(ErrGone)
		close(p.done)
	})
	all.Go(func() {
		for {
			r, err := conn.ReadRequest()
			if err != nil {
				return
			}
			serve(conn, r)
		}
	})
	t.Cleanup(func() {
		p.Kill(errors.New("the test is over"))
		all.Wait()
		p.sending.Wait()
		_ = conn.Close()
	})
	return p
}

// A slow card with a queue of requests does not hang: each answer gives the other requests their whole time again. A
// card that answers nothing hangs, even while the other cards of its module answer.
func TestSlowIsNoHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, hung := wire.TokenID{Label: "slow"}, wire.TokenID{Label: "hung"}
		const n, takes = 20, SignTimeout - time.Second
		type request struct {
			conn *wire.ModuleConn
			id   uint32
		}
		queue := make(chan request, 3*n)
		ended := make(chan struct{})
		defer close(ended)
		go func() { // one after the other
			for {
				var r request
				select {
				case r = <-queue:
				case <-ended:
					return
				}
				select {
				case <-time.After(takes):
				case <-ended:
					return
				}
				_ = r.conn.WriteReply(r.id, new(wire.OperateReply)) // the agent may have gone
			}
		}()
		p := pipeProcess(t, func(conn *wire.ModuleConn, r wire.Request) {
			if m, ok := r.Message.(*wire.Operate); ok && m.Key.Token == slow {
				queue <- request{conn, r.ID}
			}
		})
		sign := func(id wire.TokenID) error {
			return p.Call(t.Context(), SignTimeout, wire.TypeOperate, &wire.Operate{Key: wire.KeyID{Token: id}}, new(wire.OperateReply))
		}
		var all sync.WaitGroup
		start := time.Now()
		for range n {
			all.Go(func() {
				if err := sign(slow); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if took := time.Since(start); took != n*takes {
			t.Errorf("%d signatures took %v", n, took)
		}

		start = time.Now()
		for range n {
			all.Go(func() { _ = sign(slow) })
		}
		err := sign(hung)
		if _, ok := errors.AsType[*HungError](err); !ok || !errors.Is(err, ErrGone) {
			t.Errorf("the hung one: %v", err)
		}
		if took := time.Since(start); took != SignTimeout {
			t.Errorf("the process was killed after %v", took)
		}
		all.Wait()
	})
}

// A token that makes a key may be slow. Requests that wait for it, and for other tokens of its module, do not end
// the process. A request for a key that never ends does.
func TestGenerateIsNoHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, other := wire.TokenID{Label: "slow"}, wire.TokenID{Label: "other"}
		ended := make(chan struct{})
		defer close(ended)
		takes := GenerateTimeout - time.Second
		made := make(chan struct{})
		p := pipeProcess(t, func(conn *wire.ModuleConn, r wire.Request) {
			go func() {
				wait := (<-chan struct{})(made)
				if r.Type == wire.TypeGenerate {
					select {
					case <-time.After(takes):
					case <-ended:
						return
					}
					_ = conn.WriteReply(r.ID, new(wire.GenerateReply))
					close(made)
					return
				}
				select {
				case <-wait:
					_ = conn.WriteReply(r.ID, new(wire.OperateReply))
				case <-ended:
				}
			}()
		})
		generate := func() error {
			return p.CallThrough(t.Context(), GenerateTimeout, wire.TypeGenerate, &wire.Generate{Token: slow}, new(wire.GenerateReply))
		}
		start := time.Now()
		var all sync.WaitGroup
		all.Go(func() {
			if err := generate(); err != nil {
				t.Error(err)
			}
		})
		for _, id := range []wire.TokenID{slow, other} {
			all.Go(func() {
				err := p.Call(t.Context(), SignTimeout, wire.TypeOperate, &wire.Operate{Key: wire.KeyID{Token: id}}, new(wire.OperateReply))
				if err != nil {
					t.Errorf("%s: %v", id.Label, err)
				}
			})
		}
		all.Wait()
		if took := time.Since(start); took != takes {
			t.Errorf("it took %v", took)
		}

		p.timeout = time.Second // of the configuration: for the others
		takes, made = 2*GenerateTimeout, make(chan struct{})
		start = time.Now()
		if _, ok := errors.AsType[*HungError](generate()); !ok || time.Since(start) != GenerateTimeout {
			t.Errorf("one that never ends was killed after %v", time.Since(start))
		}
	})
}

// endless is what a module prints that never stops.
type endless struct {
	line string
	at   int // where in the line it is
	left int
}

func (e *endless) Read(b []byte) (int, error) {
	if e.left <= 0 {
		return 0, io.EOF
	}
	n := 0
	for n < len(b) {
		c := copy(b[n:], e.line[e.at:])
		n, e.at = n+c, (e.at+c)%len(e.line)
	}
	e.left -= n
	return n, nil
}

// What a module prints is read, at a bounded speed and with a bounded log.
func TestOutput(t *testing.T) {
	listen := func(w *output, r io.Reader) {
		b := make([]byte, 8<<10)
		w.readAll(func(limit int) (int, error) {
			n, err := r.Read(b[:min(limit, len(b))])
			w.mu.Lock()
			w.addLocked(b[:n])
			w.mu.Unlock()
			return n, err
		})
	}
	synctest.Test(t, func(t *testing.T) {
		const megabytes = 50
		var log bytes.Buffer
		w := &output{log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
		start := time.Now()
		listen(w, &endless{line: strings.Repeat("x", 99) + "\n", left: megabytes << 20})
		if took, least := time.Since(start), (megabytes-1)*stderrSpan; took < least || took > least+2*stderrSpan {
			t.Errorf("%d MiB took %v", megabytes, took)
		}
		if n := strings.Count(log.String(), "module printed\""); n != stderrPerProc {
			t.Errorf("%d lines are logged", n)
		}
		if !strings.Contains(log.String(), "module printed too much") || log.Len() > 100<<10 {
			t.Errorf("the log has %d bytes", log.Len())
		}
	})
	const because = "the module failed (C_Initialize: CKR_GENERAL_ERROR); it said: "
	for _, tt := range []struct{ name, printed, want string }{
		{"nothing", "", "the module failed and does not say why (C_Initialize: CKR_GENERAL_ERROR)"},
		{"lines", "one\ntwo\n\n  \n", because + "one | two"},
		{"no end of line", "one\ntwo", because + "one | two"},
		{"an escape", "\x1b[2Jred", because + "?[2Jred"},
		{"a long line", strings.Repeat("y", 1<<20), because + strings.Repeat("y", quotedLine)},
		{"many lines", strings.Repeat("one\n", 1000) + "two\n", because + "one | one | two"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := &output{log: slog.New(slog.DiscardHandler)}
			listen(w, strings.NewReader(tt.printed))
			err := w.explain(&wire.Error{Function: "C_Initialize", RV: wire.CKRGeneralError}, 0)
			if got := err.Error(); got != tt.want {
				t.Errorf("%q", got)
			}
			if again := quote(err, []string{"more"}); again.Error() != tt.want && tt.printed != "" {
				t.Errorf("quoted twice: %q", again)
			}
			if !wire.IsRV(err, wire.CKRGeneralError) {
				t.Error("the return value is lost")
			}
		})
	}
}

// A list that comes in parts is no hang, however long it takes, and neither is what waits
// behind it for the same token.
func TestListInParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const parts, takes = 50, ListTimeout - time.Second
		p := pipeProcess(t, func(conn *wire.ModuleConn, r wire.Request) {
			if r.Type != wire.TypeObjects {
				return // after the list
			}
			go func() {
				for i := range parts {
					time.Sleep(takes)
					if conn.WritePart(r.ID, &wire.ObjectsPart{First: i == 0 || i == 1, Objects: make([]wire.Object, 2)}) != nil {
						return
					}
				}
				_ = conn.WriteReply(r.ID+1, new(wire.TokenReply))
				_ = conn.WriteReply(r.ID, &wire.ObjectsReply{Cut: true, Long: 3, Objects: make([]wire.Object, 1)})
			}()
		})
		var all sync.WaitGroup
		all.Go(func() {
			synctest.Wait()
			if err := p.Call(t.Context(), ListTimeout, wire.TypeToken, new(wire.Token), new(wire.TokenReply)); err != nil {
				t.Errorf("what waits behind the list: %v", err)
			}
		})
		list, err := p.Objects(t.Context(), new(wire.Objects))
		if err != nil {
			t.Fatal(err)
		}
		// The first part was forgotten when the list began again.
		if n := len(list.Objects); n != 2*(parts-1)+1 || !list.Cut || list.Long != 3 {
			t.Errorf("%d objects, cut: %v, %d long", n, list.Cut, list.Long)
		}
		all.Wait()
	})
}

// A process that lists without end is stopped, and one that answers in parts what has none.
func TestPartsWithoutEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		ask  func(t *testing.T, p *Process) error
		want string
	}{
		"list": {func(t *testing.T, p *Process) error {
			_, err := p.Objects(t.Context(), new(wire.Objects))
			return err
		}, errEndless.Error()},
		"no list": {func(t *testing.T, p *Process) error {
			return p.Call(t.Context(), ListTimeout, wire.TypeToken, new(wire.Token), new(wire.TokenReply))
		}, "it came in parts"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeProcess(t, func(conn *wire.ModuleConn, r wire.Request) {
					go func() {
						for conn.WritePart(r.ID, &wire.ObjectsPart{Objects: make([]wire.Object, wire.MaxList)}) == nil {
						}
					}()
				})
				if err := tt.ask(t, p); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
			})
		})
	}
}

// What a module prints while it has a PIN is neither logged nor quoted.
func TestOutputWithPIN(t *testing.T) {
	r, printed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var log bytes.Buffer
	// The digits of a time could look like those of the PIN.
	noTime := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	w, err := newOutput(r, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: noTime})))
	if err != nil {
		t.Fatal(err)
	}
	say := func(text string) {
		if _, err := printed.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	// readAll does not run yet. beginSecret and endSecret read the pipe as well.
	say("before\n")
	w.beginSecret()
	say("pin 4711\n")
	w.beginSecret()
	w.endSecret()
	say("pin 4712\nand 47")
	w.endSecret()
	say("13\nafter\n")
	if got := w.since(0); len(got) != 2 || got[0] != "before" || got[1] != "after" {
		t.Errorf("%q", got)
	}
	if got := w.since(w.mark()); len(got) > 0 {
		t.Errorf("after the mark: %q", got)
	}
	_ = printed.Close()
	w.readAll(w.read)
	if s := log.String(); strings.Contains(s, "47") || !strings.Contains(s, "line=before") || !strings.Contains(s, "line=after") || !strings.Contains(s, "lines not shown\"=3") {
		t.Errorf("the log: %s", s)
	}
}
