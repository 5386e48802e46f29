package sshagent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent/door"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
)

// waiting returns a keyring whose signatures take until their context ends, as during a
// prompt for a PIN.
func waiting() (keyring *fakeKeyring, begun chan struct{}, ended chan error) {
	begun, ended = make(chan struct{}, 1000), make(chan error, 1000)
	keyring = newKeyring()
	keyring.sign = func(ctx context.Context, _ *request.Caller, _ request.Sign) (*ssh.Signature, error) {
		begun <- struct{}{}
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return nil, ctx.Err()
	}
	return keyring, begun, ended
}

var signRequest = message(13, "key", "data", uint32(0))

func send(t *testing.T, conn net.Conn, messages ...[]byte) {
	t.Helper()
	if _, err := conn.Write(framed(messages...)); err != nil {
		t.Fatal(err)
	}
}

func TestHangUpEndsTheRequest(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*net.UnixConn) error
		more [][]byte
	}{
		{name: "closed", end: (*net.UnixConn).Close},
		{name: "closed with an answer not read", end: (*net.UnixConn).Close, more: [][]byte{message(11)}},
		{name: "shut down both ways", end: func(c *net.UnixConn) error { return errors.Join(c.CloseWrite(), c.CloseRead()) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			keyring, begun, ended := waiting()
			r := serve(t, &Door{Keyring: keyring})
			conn := r.dial()
			send(t, conn, append(test.more, signRequest)...)
			<-begun
			if err := test.end(conn); err != nil {
				t.Fatal(err)
			}
			if err := <-ended; !errors.Is(err, door.ErrHungUp) {
				t.Errorf("the request ended because of %v, want %v", err, door.ErrHungUp)
			}
			// No other client is affected.
			if answer := ask(t, r.dial(), message(11))[0]; answer[0] != 12 {
				t.Errorf("answer %x to another client", answer)
			}
		})
	}
}

// When a client is killed, its request ends.
func TestKilledClientEndsTheRequest(t *testing.T) {
	keyring, begun, ended := waiting()
	r := serve(t, &Door{Keyring: keyring})
	key := filepath.Join(doortest.Dir(t), "key.pub")
	if err := os.WriteFile(key, ssh.MarshalAuthorizedKey(keyring.signers[0].PublicKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "ssh-add"), "-T", key)
	cmd.Env = []string{"SSH_AUTH_SOCK=" + r.socket}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-begun
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, door.ErrHungUp) {
		t.Errorf("the request ended because of %v, want %v", err, door.ErrHungUp)
	}
	cmd.Wait()
}

// A client may say that it sends no more and wait for the answer.
func TestHalfClosedClientIsAnswered(t *testing.T) {
	keyring := newKeyring()
	begun, proceed := make(chan struct{}), make(chan struct{})
	keyring.sign = func(ctx context.Context, _ *request.Caller, _ request.Sign) (*ssh.Signature, error) {
		begun <- struct{}{}
		<-proceed
		return &ssh.Signature{Format: "alg"}, ctx.Err()
	}
	r := serve(t, &Door{Keyring: keyring})
	conn := r.dial()
	send(t, conn, signRequest, message(11))
	<-begun
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	// The watcher handles another connection in the meantime. So it has seen every event
	// of the first.
	other := r.dial()
	send(t, other, signRequest)
	<-begun
	other.Close()
	proceed <- struct{}{}
	proceed <- struct{}{}
	for _, want := range []byte{14, 12} {
		if answer, err := readAnswer(conn); err != nil || answer[0] != want {
			t.Errorf("answer %x, %v; want number %d", answer, err, want)
		}
	}
	if _, err := readAnswer(conn); !errors.Is(err, io.EOF) {
		t.Errorf("%v after the last answer, want the end", err)
	}
}

// The server uses file descriptors and buffers again at once. The end of one client must
// not affect the next.
func TestHangUpLeavesOtherClients(t *testing.T) {
	keyring, begun, ended := waiting()
	r := serve(t, &Door{Keyring: keyring})
	for range 200 {
		gone := r.dial()
		send(t, gone, signRequest)
		<-begun
		gone.Close()
		stays := r.dial() // likely on the descriptors that are being closed
		if answer := ask(t, stays, message(11))[0]; answer[0] != 12 {
			t.Fatalf("answer %x", answer)
		}
		if err := <-ended; !errors.Is(err, door.ErrHungUp) {
			t.Fatal(err)
		}
		if answer := ask(t, stays, message(11))[0]; answer[0] != 12 {
			t.Fatalf("answer %x", answer)
		}
		stays.Close()
	}
}

func TestStopWithClients(t *testing.T) {
	keyring, begun, ended := waiting()
	r := serve(t, &Door{Keyring: keyring})
	idle, half, waits := r.dial(), r.dial(), r.dial()
	ask(t, idle, message(11))
	if _, err := half.Write(unhex(t, "000000ff 0d")); err != nil {
		t.Fatal(err)
	}
	send(t, waits, signRequest)
	<-begun
	r.stop()
	r.stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the request ended because of %v", err)
	}
	<-r.stopped
	if r.err != nil {
		t.Error(r.err)
	}
	for _, conn := range []net.Conn{idle, half, waits} {
		var want []byte
		if conn == net.Conn(waits) {
			want = framed(message(5))
		}
		if b, err := io.ReadAll(conn); !bytes.Equal(b, want) || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %x, %v after the end, want %x", b, err, want)
		}
	}
	if _, err := os.Lstat(r.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's file: %v, want it gone", err)
	}
}

// When the server stops, a client gets its answer after the end of its request. Until then,
// a prompt may use its terminal.
func TestStopAnswersLast(t *testing.T) {
	keyring := newKeyring()
	begun, proceed := make(chan struct{}), make(chan struct{})
	keyring.sign = func(ctx context.Context, _ *request.Caller, _ request.Sign) (*ssh.Signature, error) {
		begun <- struct{}{}
		<-ctx.Done()
		<-proceed
		return nil, ctx.Err()
	}
	r := serve(t, &Door{Keyring: keyring})
	waits := r.dial()
	var idle []net.Conn
	for range 20 {
		conn := r.dial()
		ask(t, conn, message(11))
		idle = append(idle, conn)
	}
	send(t, waits, signRequest)
	<-begun
	r.stop()
	for _, conn := range idle { // the server closes them, and the waiting one, in any order
		if _, err := readAnswer(conn); !errors.Is(err, io.EOF) {
			t.Errorf("%v, want the end", err)
		}
	}
	raw, err := waits.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 0); n != 0 || err != nil {
			t.Errorf("the client hears of the end too early: %#x, %v", fds[0].Revents, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	close(proceed)
	if b, err := io.ReadAll(waits); !bytes.Equal(b, framed(message(5))) || err != nil {
		t.Errorf("read %x, %v", b, err)
	}
	<-r.stopped
}

// The server stops even if a client does not take its answer.
func TestStopWithStuckClient(t *testing.T) {
	keyring := newKeyring()
	begun := make(chan struct{})
	keyring.sign = func(ctx context.Context, _ *request.Caller, _ request.Sign) (*ssh.Signature, error) {
		begun <- struct{}{}
		<-ctx.Done()
		return &ssh.Signature{Format: "alg", Blob: make([]byte, 4<<20)}, nil
	}
	r := serve(t, &Door{Keyring: keyring})
	send(t, r.dial(), signRequest)
	<-begun
	r.stop()
	select {
	case <-r.stopped:
	case <-time.After(door.Patience / 2):
		t.Error("it waits for a client that takes nothing")
	}
}

func TestStopBeforeServe(t *testing.T) {
	checkLeaks(t)
	l, err := door.Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the program was told to stop"))
	if err := (&Door{Keyring: newKeyring()}).Serve(ctx, l, nil); err != nil {
		t.Error(err)
	}
}

// Serve returns an error if other code closes its listener.
func TestListenerClosed(t *testing.T) {
	checkLeaks(t)
	l, err := door.Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := (&Door{Keyring: newKeyring()}).Serve(t.Context(), l, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want %v", err, net.ErrClosed)
	}
}

// One server may have several sockets.
func TestTwoListeners(t *testing.T) {
	s := &Door{Keyring: newKeyring()}
	one, two := serve(t, s), serve(t, s)
	for _, r := range []*running{one, two, one} {
		if answer := ask(t, r.dial(), message(11))[0]; answer[0] != 12 {
			t.Errorf("answer %x", answer)
		}
	}
	one.stop()
	<-one.stopped
	if answer := ask(t, two.dial(), message(11))[0]; answer[0] != 12 {
		t.Errorf("answer %x", answer)
	}
}

// The agent does not look at the process of a client that lists keys. It looks at the
// process for every other request.
func TestLooksWhenNeeded(t *testing.T) {
	log, book := newLog()
	client, nc := net.Pipe()
	defer client.Close()
	var looks atomic.Int64
	ended := make(chan struct{})
	keyring, key := stillKeyring(t, log.Handler(), 1)
	go func() {
		defer close(ended)
		c := testHandler(&Door{Keyring: keyring, Log: log}, nc, peer.Peer{Known: true, PID: 4711}, func() peer.Peer {
			looks.Add(1)
			return everyday
		})
		defer nc.Close()
		defer c.in.close()
		defer c.looking.Wait()
		c.Serve(t.Context())
	}()
	for range 2 {
		ask(t, client, message(msgRequestIdentities))
	}
	if n := looks.Load(); n != 0 {
		t.Errorf("looked %d times for a list", n)
	}
	ask(t, client, message(msgSignRequest, key, gitData(), uint32(0)))
	if got, want := book.wait(t, "msg=signed"), strconv.Quote(everyday.String()); !strings.Contains(got, "client="+want) || looks.Load() == 0 {
		t.Errorf("the log has %q, want the client %s in it", got, want)
	}
	client.Close()
	<-ended
}

// The test uses the real kernel and a real other user: ssh-add connects as uid 65534.
func TestOtherUserIsRefused(t *testing.T) {
	const nobody = 65534
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root, which CI has to provide")
		}
		t.Skip("this needs root, to become another user")
	}
	log, book := newLog()
	r := serve(t, &Door{Keyring: newKeyring(), Log: log})
	if err := errors.Join(os.Chmod(r.socket, 0o666), os.Chmod(filepath.Dir(r.socket), 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "ssh-add"), "-l")
	cmd.Env = []string{"SSH_AUTH_SOCK=" + r.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("another user got %s", out)
	}
	book.wait(t, "another user (uid 65534)")
}

// At the limit, the server accepts the next client, and closes the connection that has been
// idle for the longest time.
func TestTooManyConnections(t *testing.T) {
	log, book := newLog()
	r := serve(t, &Door{Keyring: newKeyring(), Log: log, limit: 2})
	one, two := r.dial(), r.dial()
	for _, conn := range []*net.UnixConn{one, two, one} {
		ask(t, conn, message(11))
	}
	ask(t, r.dial(), message(11))
	if b, err := io.ReadAll(two); len(b) > 0 || err != nil {
		t.Errorf("read %x, %v, want the end", b, err)
	}
	ask(t, one, message(11))
	book.wait(t, "connection closed to make room")
}

func TestPanicCostsOneConnection(t *testing.T) {
	log, book := newLog()
	keyring := newKeyring()
	keyring.sign = func(context.Context, *request.Caller, request.Sign) (*ssh.Signature, error) {
		panic("confidential")
	}
	r := serve(t, &Door{Keyring: keyring, Log: log})
	bystander := r.dial()
	ask(t, bystander, message(11))
	conn := r.dial()
	send(t, conn, signRequest)
	if b, err := io.ReadAll(conn); len(b) > 0 || err != nil {
		t.Errorf("read %x, %v, want the end", b, err)
	}
	if answer := ask(t, bystander, message(11))[0]; answer[0] != 12 {
		t.Errorf("answer %x", answer)
	}
	got := book.wait(t, "level=ERROR")
	if strings.Contains(got, "confidential") || !strings.Contains(got, "(*handler).sign") {
		t.Errorf("log:\n%swant where it happened and not what was said", got)
	}
}

func TestMany(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})

	t.Run("500 at once", func(t *testing.T) {
		conns := make([]*net.UnixConn, 500)
		for i := range conns {
			conns[i] = r.dial()
		}
		var group sync.WaitGroup
		for _, conn := range conns {
			group.Go(func() {
				for range 3 {
					if _, err := conn.Write(framed(message(11))); err != nil {
						t.Error(err)
						return
					}
					if answer, err := readAnswer(conn); err != nil || answer[0] != 12 {
						t.Errorf("answer %x, %v", answer, err)
						return
					}
				}
			})
		}
		group.Wait()
		for _, conn := range conns {
			conn.Close()
		}
	})
	t.Run("10000 one after another", func(t *testing.T) {
		for range 10000 {
			conn, err := net.Dial("unix", r.socket)
			if err != nil {
				t.Fatal(err)
			}
			if answer := ask(t, conn, message(19))[0]; answer[0] != 6 {
				t.Fatalf("answer %x", answer)
			}
			conn.Close()
		}
	})
}

// brokenListener fails to accept some times before it works.
type brokenListener struct {
	*door.Socket
	errs []error
}

func (l *brokenListener) AcceptUnix() (*net.UnixConn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	return l.Socket.AcceptUnix()
}

func TestAcceptErrors(t *testing.T) {
	checkLeaks(t)
	log, book := newLog()
	l, err := door.Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	broken := &brokenListener{l, []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ECONNABORTED}}
	r := serveOn(t, &Door{Keyring: newKeyring(), Log: log}, broken, l.Path())
	if answer := ask(t, r.dial(), message(11))[0]; answer[0] != 12 {
		t.Errorf("answer %x", answer)
	}
	if n := strings.Count(book.String(), "trying again"); n != 1 {
		t.Errorf("%d lines about one shortage:\n%s", n, book)
	}
}

const starvedVariable = "P11_STARVED_AGENT"

// TestOutOfDescriptors runs a server in a process with few file descriptors. It takes all
// descriptors, and gives them back.
func TestOutOfDescriptors(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "s")
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestStarvedAgent$")
	cmd.Env = append(os.Environ(), starvedVariable+"="+path, "GORACE=atexit_sleep_ms=0")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	said := newLines(stderr)
	said.wait(t, "serving")

	r := &running{t: t, socket: path}
	var conns []*net.UnixConn
	served := 0
	for range 60 { // as many as the backlog holds, and more than there are descriptors
		conn := r.dial()
		send(t, conn, message(11))
		conns = append(conns, conn)
	}
	said.wait(t, "trying again")
	for _, conn := range conns {
		// The server answers each connection now, or after another connection ends.
		if answer, err := readAnswer(conn); err == nil && answer[0] == 12 {
			served++
		}
		conn.Close()
	}
	if served != len(conns) {
		t.Errorf("%d of %d clients were served", served, len(conns))
	}
}

// lines collects the output of a process.
type lines struct{ book *logBook }

func newLines(r io.Reader) *lines {
	_, book := newLog()
	go io.Copy(book, r)
	return &lines{book}
}

func (l *lines) wait(t *testing.T, what string) { t.Helper(); l.book.wait(t, what) }

func TestStarvedAgent(t *testing.T) {
	path, ok := os.LookupEnv(starvedVariable)
	if !ok {
		return // it is only for TestOutOfDescriptors
	}
	l, err := door.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 40, Max: 40}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	fmt.Fprintln(os.Stderr, "serving")
	// The limit of connections is above the limit of files, as if other code held files.
	s := &Door{Keyring: newKeyring(), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), limit: door.MaxConnections}
	if err := s.Serve(ctx, l, nil); err != nil {
		t.Fatal(err)
	}
}
