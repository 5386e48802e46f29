package door

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer"
	"p11-agent/agent/peer/proctest"
	"p11-agent/agent/peer/terminaltest"
)

func TestMain(m *testing.M) { os.Exit(terminaltest.Without(m).Run()) }

// An echo sends back what a client sends.
type echo struct{ *Conn }

func (e *echo) Serve(context.Context) { _, _ = io.Copy(e.Net(), e.Net()) }
func (e *echo) Close()                {}

// Connections that are over leave nothing behind in the watcher.
func TestWatcherForgets(t *testing.T) {
	proctest.NoLeaks(t, proctest.Methods[Server]())
	w, err := newWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(doortest.Dir(t), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	nc, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	client.Close()
	c := NewConn(&Server{}, nc, peer.Peer{}, nil)
	_, c.cancel = context.WithCancelCause(t.Context())
	c.serve(t.Context(), w, &echo{c})
	if len(w.conns) > 0 {
		t.Errorf("%d connections are still watched", len(w.conns))
	}
	w.hangUp()
	if err := w.add(c); !errors.Is(err, errStopping) {
		t.Errorf("%v, want %v", err, errStopping)
	}
}

func TestAllowed(t *testing.T) {
	proctest.NoLeaks(t, proctest.Methods[Server]())
	var log strings.Builder // the Server has ended when the test reads it
	var asked peer.Peer
	s := &Server{Log: slog.New(slog.NewTextHandler(&log, nil)), allowed: func(p peer.Peer) error {
		asked = p
		return errors.New("not on a Sunday")
	}}
	l, err := Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- s.Serve(ctx, l, func(*Conn) Protocol {
			t.Error("a connection is served")
			return nil
		})
	}()
	conn, err := net.Dial("unix", l.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if b, err := io.ReadAll(conn); len(b) > 0 || err != nil {
		t.Errorf("read %x, %v, want the end", b, err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if asked.PID != os.Getpid() {
		t.Errorf("asked about %v, want this process", asked)
	}
	got := log.String()
	if strings.Count(got, "\n") != 1 || !strings.Contains(got, "not on a Sunday") || !strings.Contains(got, fmt.Sprintf("(%d)", os.Getpid())) {
		t.Errorf("log:\n%swant one line with peer and reason", got)
	}
}

func TestSameUser(t *testing.T) {
	me := os.Geteuid()
	for _, test := range []struct {
		name string
		peer peer.Peer
		want bool
	}{
		{"the same user", peer.Peer{Known: true, UID: me}, true},
		{"root", peer.Peer{Known: true, UID: 0}, true},
		{"another user", peer.Peer{Known: true, UID: me + 1}, false},
		{"unknown", peer.Peer{UID: me}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := SameUser(test.peer); (err == nil) != test.want {
				t.Errorf("%v", err)
			}
		})
	}
}

// Waiting for the shortage to pass does not keep the server from stopping.
func TestStopDuringShortage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &exhausted{closed: make(chan struct{})}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		began := time.Now()
		s := &Server{}
		var clients sync.WaitGroup
		if err := s.accept(ctx, l, nil, nil, &clients); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != time.Hour {
			t.Errorf("stopped after %v", took)
		}
		// 5 ms, 10 ms, ... 1 s, and then once each second.
		if n := l.calls.Load(); n < 3600 || n > 3620 {
			t.Errorf("%d tries within the hour", n)
		}
	})
}

type exhausted struct {
	calls  atomic.Int64
	closed chan struct{}
}

func (l *exhausted) AcceptUnix() (*net.UnixConn, error) {
	l.calls.Add(1)
	return nil, syscall.EMFILE
}

func (l *exhausted) Close() error { return nil }
