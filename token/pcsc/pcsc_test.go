package pcsc_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token/pcsc"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

// A variable makes the test program take one of these roles.
const (
	roleVariable = "P11_TEST_PCSC"
	secretive    = "secretive" // connects to pcscd and keeps to itself
	looker       = "looker"    // prints who is connected
)

func TestMain(m *testing.M) {
	socket := pcsc.Socket(os.Environ())
	switch os.Getenv(roleVariable) {
	case secretive:
		c, err := net.Dial("unix", socket)
		if err == nil {
			err = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
		}
		fmt.Println("ready", err)
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = c.Close()
	case looker:
		c, err := pcsc.Clients(context.Background(), socket)
		fmt.Println(c.Clients, c.Hidden, c.Suspects, err)
	default:
		os.Exit(terminaltest.Without(m).Run())
	}
}

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSocket(t *testing.T) {
	for _, tt := range []struct {
		name    string
		environ []string
		want    string
	}{
		{"none", []string{"HOME=/root"}, pcsc.DefaultSocket},
		{"set", []string{"PCSCLITE_CSOCK_NAME=/tmp/comm"}, "/tmp/comm"},
		{"empty", []string{"PCSCLITE_CSOCK_NAME="}, pcsc.DefaultSocket},
		{"twice", []string{"PCSCLITE_CSOCK_NAME=/tmp/one", "PCSCLITE_CSOCK_NAME=/tmp/two"}, "/tmp/two"},
	} {
		want(t, tt.name, pcsc.Socket(tt.environ), tt.want)
	}
}

// TestReaders asks a real pcscd.
func TestReaders(t *testing.T) {
	p := tokentest.StartPCSCD(t, "Some Reader")
	socket := pcsc.Socket(p.Env())
	client := tokentest.BuildPCSCClient(t)
	first := func() pcsc.Reader {
		t.Helper()
		readers, err := pcsc.Readers(t.Context(), socket)
		noError(t, err)
		var names []string
		for _, r := range readers {
			names = append(names, r.Name)
		}
		if !slices.Equal(names, []string{"Some Reader 00 00", "Some Reader 00 01"}) {
			t.Fatalf("readers: %q", names)
		}
		return readers[0]
	}
	empty := first()
	want(t, "card", empty.Card, false)
	c := tokentest.NewCard(t, pivcard.Options{})
	p.Insert(0, c)
	tokentest.Until(t, "the card is seen", func() bool { return first().Card })
	if first().Events == empty.Events {
		t.Error("an insertion is no event")
	}
	want(t, "users", first().Users, 0)
	for mode, users := range map[string]int{"exclusive": pcsc.Exclusive, "transaction": 1} {
		n := p.Neighbour(client, mode)
		want(t, "the program says", n.Line(), "ready")
		want(t, mode, first().Users, users)
		n.Close()
		tokentest.Until(t, "the reader is free", func() bool { return first().Users == 0 })
	}
	want(t, "commands to the card", c.Counts().Commands, 0)

	s, err := pcsc.Dial(t.Context(), socket)
	noError(t, err)
	defer s.Close()
	p.Stop()
	if _, err := s.Readers(t.Context()); err == nil {
		t.Error("a pcscd that has ended answers")
	}
	if _, err := pcsc.Dial(t.Context(), socket); err == nil {
		t.Error("a pcscd that does not run is connected to")
	}
}

// TestClients finds the processes that are connected to one pcscd. It does not find those
// of another pcscd, whose socket has the same name.
func TestClients(t *testing.T) {
	p, other := tokentest.StartPCSCD(t), tokentest.StartPCSCD(t)
	client := tokentest.BuildPCSCClient(t)
	var running []*tokentest.Neighbour
	for _, d := range []*tokentest.PCSCD{p, other} {
		d.Insert(0, tokentest.NewCard(t, pivcard.Options{}))
		n := d.Neighbour(client, "exclusive")
		want(t, "the program says", n.Line(), "ready")
		running = append(running, n)
	}
	for i, d := range []*tokentest.PCSCD{p, other} {
		c, err := pcsc.Clients(t.Context(), pcsc.Socket(d.Env()))
		noError(t, err)
		want(t, "clients", fmt.Sprint(c.Clients), fmt.Sprintf("[pcscclient (%d)]", running[i].PID))
		want(t, "hidden", c.Hidden, 0)
	}
	running[0].Close()
	tokentest.Until(t, "the program is not connected any more", func() bool {
		c, err := pcsc.Clients(t.Context(), pcsc.Socket(p.Env()))
		return err == nil && len(c.Clients) == 0 && c.Hidden == 0
	})
	if _, err := pcsc.Clients(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a socket: %v", err)
	}
}

// A child may have a connection of its parent, as each child has before it runs its own program.
// The connection is that of the parent.
func TestInheritedConnection(t *testing.T) {
	socket := pcsc.Socket(tokentest.StartPCSCD(t).Env())
	conn, err := net.Dial("unix", socket)
	noError(t, err)
	defer conn.Close()
	file, err := conn.(*net.UnixConn).File()
	noError(t, err)
	defer file.Close()
	child := exec.Command("cat")
	child.ExtraFiles = []*os.File{file}
	stdin, err := child.StdinPipe()
	noError(t, err)
	noError(t, child.Start())
	defer func() {
		noError(t, stdin.Close())
		noError(t, child.Wait())
	}()
	var c pcsc.Connections
	tokentest.Until(t, "pcscd has the connection", func() bool {
		c, err = pcsc.Clients(t.Context(), socket)
		noError(t, err)
		return len(c.Clients) > 0
	})
	if len(c.Clients) != 1 || c.Clients[0].PID != os.Getpid() || c.Hidden != 0 {
		t.Errorf("connected are %v, and %d hidden processes; the test is %d", c.Clients, c.Hidden, os.Getpid())
	}
}

// TestHiddenClient connects processes that do not let other processes look into them.
// Clients counts their connections as hidden, and suspects the processes with known
// names. Root may look into every process, so root changes to another user for the test.
func TestHiddenClient(t *testing.T) {
	p := tokentest.StartPCSCD(t)
	dir := tokentest.TempDir(t)
	copyFile(t, self(t), filepath.Join(dir, "scdaemon"))
	copyFile(t, self(t), filepath.Join(dir, "other"))
	socket := pcsc.Socket(p.Env())
	become := []string{"/usr/bin/env"}
	if os.Geteuid() == 0 {
		become = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env"}
		noError(t, os.Chmod(dir, 0o755))
		for dir := filepath.Dir(socket); dir != os.TempDir(); dir = filepath.Dir(dir) {
			noError(t, os.Chmod(dir, 0o755))
		}
	}
	// look expects a number of hidden clients, and returns the suspects. The machine may
	// run another scdaemon.
	look := func(hidden int) string {
		t.Helper()
		cmd := exec.Command(become[0], append(become[1:], roleVariable+"="+looker, filepath.Join(dir, "other"))...)
		cmd.Env = append(os.Environ(), p.Env()...)
		out, err := cmd.CombinedOutput()
		noError(t, err)
		m := regexp.MustCompile(`^\[\] (\d+) (\[.*\]) <nil>\n$`).FindStringSubmatch(string(out))
		if m == nil {
			t.Fatalf("clients: %s", out)
		}
		want(t, "hidden clients", m[1], strconv.Itoa(hidden))
		return m[2]
	}
	want(t, "suspects of no client", look(0), "[]")
	start := func(name string) *tokentest.Neighbour {
		n := p.Neighbour(append(become, roleVariable+"="+secretive, filepath.Join(dir, name))...)
		want(t, "the program says", n.Line(), "ready <nil>")
		return n
	}
	other := start("other")
	if got := look(1); strings.Contains(got, fmt.Sprintf("(%d)", other.PID)) {
		t.Errorf("%d is suspected: %s", other.PID, got)
	}
	n := start("scdaemon")
	if got := look(2); !strings.Contains(got, fmt.Sprintf("scdaemon (%d)", n.PID)) || strings.Contains(got, fmt.Sprintf("(%d)", other.PID)) {
		t.Errorf("%d alone is to be suspected: %s", n.PID, got)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	noError(t, err)
	noError(t, os.WriteFile(to, b, 0o755))
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	noError(t, err)
	return exe
}

// A service is a faulty pcscd.
func service(t *testing.T, serve func(c net.Conn, r *bufio.Reader)) string {
	t.Helper()
	socket := filepath.Join(tokentest.TempDir(t), "comm")
	l, err := net.Listen("unix", socket)
	noError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c, bufio.NewReader(c))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return socket
}

func numbers(n ...uint32) (b []byte) {
	for _, v := range n {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

const readersSize = 16 * 184

func TestServicesThatAreNotRight(t *testing.T) {
	const version, ask = 8 + 12, 8
	read := func(r io.Reader, n int) []byte {
		b := make([]byte, n)
		_, _ = io.ReadFull(r, b)
		return b
	}
	for _, tt := range []struct {
		name  string
		serve func(c net.Conn, r *bufio.Reader)
		want  string // of the error; empty: none
	}{
		{"hangs up, as polkit has it", func(net.Conn, *bufio.Reader) {}, "it hung up"},
		{"another major version", func(c net.Conn, r *bufio.Reader) {
			read(r, version)
			_, _ = c.Write(numbers(5, 0, 0x8010001E))
		}, "version 5"},
		{"a later minor version, which refuses ours", func(c net.Conn, r *bufio.Reader) {
			read(r, version)
			_, _ = c.Write(numbers(4, 9, 0x8010001E))
			if minor := binary.NativeEndian.Uint32(read(r, version)[12:]); minor != 9 {
				return
			}
			_, _ = c.Write(numbers(4, 9, 0))
			read(r, ask)
			_, _ = c.Write(make([]byte, readersSize))
		}, ""},
		{"refuses its own version", func(c net.Conn, r *bufio.Reader) {
			for range 2 {
				read(r, version)
				_, _ = c.Write(numbers(4, 9, 0x8010001E))
			}
			read(r, ask)
		}, "do not agree"},
		{"ends in the middle", func(c net.Conn, r *bufio.Reader) {
			read(r, version)
			_, _ = c.Write(numbers(4, 4, 0))
			read(r, ask)
			_, _ = c.Write(make([]byte, 100))
		}, "unexpected EOF"},
		{"a name without an end", func(c net.Conn, r *bufio.Reader) {
			read(r, version)
			_, _ = c.Write(numbers(4, 4, 0))
			read(r, ask)
			_, _ = c.Write([]byte(strings.Repeat("x", readersSize)))
		}, "makes no sense"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			readers, err := pcsc.Readers(t.Context(), service(t, tt.serve))
			switch {
			case tt.want == "" && (err != nil || len(readers) > 0):
				t.Errorf("got %v, %v", readers, err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want something with %q", err, tt.want)
			}
		})
	}
}

// If pcscd is silent, a question waits no longer than its caller.
func TestSilentService(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	socket := service(t, func(_ net.Conn, r *bufio.Reader) {
		_, _ = r.ReadByte()
		cancel()
		_, _ = io.Copy(io.Discard, r)
	})
	if _, err := pcsc.Readers(ctx, socket); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestWatch has a real pcscd report changes.
func TestWatch(t *testing.T) {
	p := tokentest.StartPCSCD(t)
	s, err := pcsc.Dial(t.Context(), pcsc.Socket(p.Env()))
	noError(t, err)
	defer s.Close()
	card := func(in bool) {
		t.Helper()
		for {
			readers, err := s.Watch(t.Context())
			noError(t, err)
			if len(readers) > 0 && readers[0].Card == in { // pcscd answers before it has its readers
				return
			}
			noError(t, s.Changed(t.Context()))
		}
	}
	card(false)
	c := tokentest.NewCard(t, pivcard.Options{})
	for range 3 {
		p.Insert(0, c)
		card(true)
		p.Pull(0)
		card(false)
	}
	untilItFails := func(ctx context.Context, s *pcsc.Service) <-chan error {
		ended := make(chan error, 1)
		go func() {
			_, err := s.Watch(ctx)
			for err == nil { // something may change still
				if err = s.Changed(ctx); err == nil {
					_, err = s.Watch(ctx)
				}
			}
			ended <- err
		}()
		return ended
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := untilItFails(ctx, s)
	cancel()
	<-ended

	s, err = pcsc.Dial(t.Context(), pcsc.Socket(p.Env()))
	noError(t, err)
	defer s.Close()
	ended = untilItFails(t.Context(), s)
	p.Stop()
	<-ended
}
