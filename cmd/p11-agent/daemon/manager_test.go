package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/tokentest"
)

func TestStatusText(t *testing.T) {
	with := func(keys int, in bool, shadow string) token.TokenStatus {
		return token.TokenStatus{Keys: make([]*token.Key, keys), LoggedIn: in, Shadowed: shadow}
	}
	works := func(tokens ...token.TokenStatus) token.ModuleStatus {
		return token.ModuleStatus{Running: true, Tokens: tokens}
	}
	for want, modules := range map[string][]token.ModuleStatus{
		"0 keys on 0 tokens; 0 modules":                                nil,
		"3 keys on 1 token, logged in to 1; 2 modules":                 {works(with(3, true, "")), works()},
		"3 keys on 2 tokens; 1 module":                                 {works(with(1, false, ""), with(2, false, ""))},
		"1 key on 1 token; 2 modules":                                  {works(with(1, false, "")), works(with(1, true, "first"))},
		"0 keys on 0 tokens; 3 modules, 2 not working":                 {works(), {Err: errors.New("x")}, {Err: errors.New("y")}},
		"0 keys on 0 tokens; 2 modules":                                {{Released: true}, {Running: true, Err: errors.New("last")}},
		"4 keys on 2 tokens, logged in to 2; 2 modules, 1 not working": {works(with(2, true, ""), with(2, true, "")), {Err: errors.New("x")}},
	} {
		if got := statusText(modules); got != want {
			t.Errorf("%+v is %q, want %q", modules, got, want)
		}
	}
}

// serviceManager is the other end of NOTIFY_SOCKET. What it is sent comes out of
// the channel, one message after the other.
func serviceManager(t *testing.T) <-chan string {
	t.Helper()
	path := filepath.Join(tokentest.TempDir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	messages := make(chan string, 100)
	go func() {
		defer close(messages)
		b := make([]byte, 8192)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			messages <- string(b[:n])
		}
	}()
	return messages
}

func TestManager(t *testing.T) {
	messages := serviceManager(t)
	var keys atomic.Int64
	r := &manager{log: slog.New(slog.DiscardHandler), modules: func() []token.ModuleStatus {
		return []token.ModuleStatus{{Running: true, Tokens: []token.TokenStatus{{Keys: make([]*token.Key, keys.Load())}}}}
	}}
	changed := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	r.ready()
	go func() {
		defer close(ended)
		r.follow(ctx, changed)
	}()
	want := func(text string) {
		t.Helper()
		if got := <-messages; got != text {
			t.Errorf("it is told %q, want %q", got, text)
		}
	}
	want("READY=1\nSTATUS=0 keys on 1 token; 1 module")
	changed <- struct{}{} // to the same: nothing to tell
	keys.Store(2)
	changed <- struct{}{}
	want("STATUS=2 keys on 1 token; 1 module")
	r.ready()
	want("READY=1\nSTATUS=2 keys on 1 token; 1 module")
	cancel()
	<-ended
}

// The watchdog speaks for as long as the agent answers, and not a moment longer.
func TestWatchdog(t *testing.T) {
	unixSocket := func() *net.UnixListener {
		t.Helper()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(tokentest.TempDir(t), "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	// answering accepts everybody, which is all that is asked of it.
	answering := func() *net.UnixListener {
		l := unixSocket()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return l
	}
	stuck := make(chan struct{})
	t.Cleanup(func() { close(stuck) })
	removed := unixSocket()
	replaced := unixSocket()
	for _, test := range []struct {
		name    string
		sockets []socket
		alive   func()
		before  func() // the watch begins
		want    bool
	}{
		{"all is well", []socket{{listener: answering()}, {listener: answering()}}, func() {}, nil, true},
		{"a socket that accepts no client", []socket{{listener: answering()}, {listener: unixSocket()}}, func() {}, nil, false},
		{"a keyring that is stuck", []socket{{listener: answering()}}, func() { <-stuck }, nil, false},
		{"a socket whose file is gone", []socket{{listener: removed}}, func() {}, func() { os.Remove(removed.Addr().String()) }, true},
		{"a socket whose file is another's", []socket{{listener: replaced}}, func() {}, func() {
			path := replaced.Addr().String()
			os.Remove(path)
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			told := make(chan struct{}, 100)
			var log strings.Builder
			w := &watchdog{
				manager: &manager{log: slog.New(slog.NewTextHandler(&log, nil))},
				every:   300 * time.Millisecond, alive: test.alive, files: socketFiles(test.sockets),
				tell: func() error { told <- struct{}{}; return nil },
			}
			if test.before != nil {
				test.before()
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				w.run(ctx)
			}()
			if test.want {
				for range 3 { // again and again
					tokentest.Wait(t, told)
				}
			} else {
				select {
				case <-told:
					t.Error("the service manager is told that the agent is alive")
				case <-time.After(2 * w.every): // it would have been
				}
			}
			cancel()
			if test.name == "a keyring that is stuck" {
				return // until the end of the test
			}
			<-ended
			if said := strings.Count(log.String(), "does not answer on its own"); (said == 0) != test.want || said > 1 {
				t.Errorf("the log has\n%s", &log)
			}
		})
	}
}
