package sshagent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
)

// member makes a connection for a table, of a process that runs a program, which has
// asked for nothing for so long.
func member(pid int, program uint64, idle time.Duration) *conn {
	c := &conn{recorded: peer.Peer{Known: true, PID: pid, UID: 1000}}
	c.who = func() peer.Peer {
		p := c.recorded
		if program > 0 {
			p.Program.Ino, p.Chain = program, []peer.Process{{PID: pid}}
		}
		return p
	}
	c.active.Store(int64(time.Since(started) - idle))
	return c
}

func (c *conn) asked() *conn { c.answered.Store(true); return c }
func (c *conn) waits() *conn { c.answering.Store(true); return c }

func repeat(n int, make func(i int) *conn) (all []*conn) {
	for i := range n {
		all = append(all, make(i))
	}
	return all
}

// Which connection is closed when there is one too many: the first of each list.
func TestClientsChoose(t *testing.T) {
	const tool, evil = 7, 666 // programs
	second := time.Second
	newcomer := func() *conn { return member(1, tool, 0) }
	for name, all := range map[string][]*conn{
		"one process has many": append(
			repeat(10, func(i int) *conn { return member(9, evil, time.Duration(10-i)*second) }),
			member(2, tool, time.Hour).asked(),
		),
		"one process has many, all of which wait": append(
			repeat(10, func(i int) *conn { return member(9, evil, time.Duration(i)*time.Millisecond).waits() }),
			member(2, tool, time.Hour).asked(),
		),
		"one program has many processes": append(
			repeat(10, func(i int) *conn { return member(9+i, evil, time.Duration(30-i)*second).asked() }),
			member(2, tool, time.Hour).asked(), member(3, tool, time.Hour).asked(),
		)[0:11],
		"many programs, and a tool that just came": append(
			repeat(10, func(i int) *conn { return member(9+i, evil+uint64(i), time.Duration(30-i)*second) }),
			member(2, tool, 0), member(3, tool, second).asked(), member(4, tool, 0).waits(),
		),
		"many logins that wait, and programs that rest": append(
			repeat(3, func(i int) *conn { return member(90+i, evil+uint64(i), time.Duration(10-i)*second) }),
			repeat(100, func(i int) *conn { return member(200+i, tool, time.Minute).waits() })...,
		),
		"processes that have handed on and ended": append(
			repeat(10, func(i int) *conn { return member(9+i, 0, time.Duration(10-i)*second) }),
			member(2, tool, time.Hour).asked(), member(3, tool, time.Hour).asked(),
		),
		"the same process, pauses before what is new and what waits": {
			member(9, tool, second).asked(), member(9, tool, 0).asked(), member(9, tool, second), member(9, tool, second).waits(),
		},
		"of those that wait, who came last": {
			member(9, tool, second).waits(), member(9, tool, 2*second).waits(),
		},
	} {
		t.Run(name, func(t *testing.T) {
			table := newClients(len(all))
			for _, c := range all {
				if table.admit(c) != nil {
					t.Fatal("there was room")
				}
			}
			if got := table.admit(newcomer()); got != all[0] {
				for i, c := range all {
					if c == got {
						t.Errorf("connection %d is closed, want the first", i)
					}
				}
			}
			if len(table.all) != len(all) {
				t.Errorf("%d connections, want %d", len(table.all), len(all))
			}
		})
	}
}

func TestClientsCharge(t *testing.T) {
	table := newClients(100)
	a, b, c := member(1, 1, 0), member(1, 1, 0), member(2, 2, 0)
	for _, c := range []*conn{a, b, c} {
		table.admit(c)
	}
	charge := func(c *conn, n int, victims int, fail string) {
		t.Helper()
		got, err := table.charge(c, memory, n)
		if len(got) != victims || (err == nil) != (fail == "") || err != nil && !strings.Contains(err.Error(), fail) {
			t.Errorf("%d connections ended, %v; want %d, %q", len(got), err, victims, fail)
		}
	}
	charge(a, maxProcess[memory]/2, 0, "")
	charge(b, maxProcess[memory]/2, 0, "")
	charge(b, 1, 0, "its process would keep")
	charge(a, -maxProcess[memory]/2, 0, "")
	charge(b, 1, 0, "")
	charge(b, -maxProcess[memory]/2-1, 0, "")
	if table.used != (used{}) {
		t.Errorf("%d bytes are left", table.used[memory])
	}
	// All together: the process with the most loses a connection.
	table.max[memory] = 100
	charge(a, 30, 0, "")
	charge(b, 30, 0, "")
	charge(c, 40, 0, "")
	charge(c, 10, 1, "")
	if a.used[memory]+b.used[memory] != 60 || table.used[memory] != 80 || len(table.all) != 2 {
		t.Errorf("%d bytes of %d connections", table.used[memory], len(table.all))
	}
	gone := a
	if _, ok := table.all[a]; ok {
		gone = b
	}
	charge(gone, 1, 0, "make room")
	charge(gone, -30, 0, "")
	table.leave(gone)
	charge(c, 200, 1, "all connections would keep")
	table.leave(a)
	table.leave(b)
	table.leave(c)
	if table.used != (used{}) || len(table.all) != 0 {
		t.Errorf("%d bytes of %d connections are left", table.used[memory], len(table.all))
	}
}

// A line a minute.
func TestRarely(t *testing.T) {
	var r rarely
	if ok, _ := r.now(); !ok {
		t.Error("the first is not worth a line")
	}
	for range 3 {
		if ok, _ := r.now(); ok {
			t.Error("the next one is, too")
		}
	}
	r.next = time.Now()
	if ok, skipped := r.now(); !ok || skipped != 3 {
		t.Errorf("%t, %d", ok, skipped)
	}
}

const (
	enemyVariable   = "P11_ENEMY_OF"
	busyConnections = 39
)

// TestEnemy is another process that takes as many connections as it can get, each with
// a request that is not answered.
func TestEnemy(t *testing.T) {
	path, ok := os.LookupEnv(enemyVariable)
	if !ok {
		return // it is only for TestAttack13Busy
	}
	var conns []net.Conn
	for range busyConnections {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(framed(signRequest)); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	io.Copy(io.Discard, os.Stdin)
	for _, conn := range conns {
		conn.Close()
	}
}

// A process whose requests all wait for a person keeps nobody out, and loses no more
// connections than others need.
func TestAttack13Busy(t *testing.T) {
	keyring, begun, ended := waiting()
	r := serve(t, &Server{Keyring: keyring, MaxConnections: busyConnections + 1})
	mine := r.dial() // which waits, too, for longer than any of the other process
	send(t, mine, signRequest)
	<-begun
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestEnemy$")
	cmd.Env = append(os.Environ(), enemyVariable+"="+r.socket, "GORACE=atexit_sleep_ms=0")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	for range busyConnections {
		<-begun
	}
	for range 5 {
		conn := r.dial()
		if answer := ask(t, conn, message(11))[0]; answer[0] != 12 {
			t.Errorf("answer %x", answer)
		}
		if err := <-ended; !errors.Is(err, errMadeRoom) {
			t.Errorf("the request ended because of %v, want %v", err, errMadeRoom)
		}
	}
	// The one that waits is not the one that was ended.
	raw, err := mine.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 0); n != 0 || err != nil {
			t.Errorf("the first client was ended: %#x, %v", fds[0].Revents, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// fatHost binds with a certificate of about so many bytes.
func fatHost(t *testing.T, size int) func(session string) []byte {
	t.Helper()
	h, ca := newHost(t), newHost(t)
	cert := &ssh.Certificate{Key: h.PublicKey(), CertType: ssh.HostCert, KeyId: strings.Repeat("k", size)}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return func(session string) []byte {
		sig, err := h.Sign(rand.Reader, []byte(session))
		if err != nil {
			t.Fatal(err)
		}
		return bindMessage(cert.Marshal(), session, ssh.Marshal(sig), true)
	}
}

// Thirty connections with the largest binds, and whatever else can be kept.
func TestAttack08Binds(t *testing.T) {
	log, book := newLog()
	s := &Server{Keyring: newKeyring(), Log: log, KeepBinds: true}
	r := serve(t, s)
	const clients = 30
	large, largest := fatHost(t, 200<<10), fatHost(t, 7<<10)
	for range clients {
		conn := r.dial()
		if answer := ask(t, conn, large("s"))[0]; answer[0] != 28 {
			t.Fatalf("answer %x to a certificate that is too large", answer)
		}
		taken := 0
		for i := range maxBinds {
			if answer := ask(t, conn, largest(strconv.Itoa(i)))[0]; answer[0] == 6 {
				taken++
			}
		}
		if taken < 1 || taken == maxBinds {
			t.Errorf("%d binds with the largest certificate are kept", taken)
		}
	}
	s.clients.mu.Lock()
	kept, n := s.clients.used[memory], len(s.clients.all)
	s.clients.mu.Unlock()
	if n != clients || kept > clients*maxBound || kept < clients*maxBound/4 {
		t.Errorf("%d bytes are kept for %d connections", kept, n)
	}
	book.wait(t, fmt.Sprintf("the limit is %d", maxBind))
	book.wait(t, fmt.Sprintf("the limit is %d", maxBound))
}

// Messages that are not whole count, and those that are not read.
func TestAttack08Halves(t *testing.T) {
	log, book := newLog()
	keyring := newKeyring()
	s := &Server{Keyring: keyring, Log: log}
	r := serve(t, s)
	half := append([]byte{0, 4, 0, 0, 13}, make([]byte, 255<<10)...)
	for range 2 * maxProcess[memory] / maxFrame {
		conn := r.dial()
		if _, err := conn.Write(half); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
	}
	book.wait(t, "its process would keep")
	s.clients.mu.Lock()
	defer s.clients.mu.Unlock()
	if s.clients.used[memory] > maxProcess[memory] {
		t.Errorf("%d bytes are kept", s.clients.used[memory])
	}
}

// What a request brings counts while it is answered.
func TestRequestsCount(t *testing.T) {
	keyring := newKeyring()
	s := &Server{Keyring: keyring}
	r := serve(t, s)
	var during used
	keyring.add = func(request.AddKey) {
		s.clients.mu.Lock()
		defer s.clients.mu.Unlock()
		during = s.clients.used
	}
	conn := r.dial()
	for _, m := range addMessages(t) {
		ask(t, conn, m)
	}
	if during[memory] == 0 || during[locked] == 0 {
		t.Error("nothing is counted while a key is added")
	}
	ask(t, conn, message(20, "pkcs11:", "1234"), message(22, "phrase"), message(23, "phrase"))
	s.clients.mu.Lock()
	defer s.clients.mu.Unlock()
	if s.clients.used != (used{}) {
		t.Errorf("%d bytes are counted afterwards", s.clients.used[memory])
	}
}

// Texts that no program sends are refused before they take locked memory.
func TestLongTexts(t *testing.T) {
	for name, m := range map[string][]byte{
		"provider":   message(20, strings.Repeat("x", maxURI+1), ""),
		"PIN":        message(20, "pkcs11:", strings.Repeat("1", maxPIN+1)),
		"passphrase": message(22, strings.Repeat("1", maxPIN+1)),
	} {
		t.Run(name, func(t *testing.T) {
			keyring := newKeyring()
			conn := serve(t, &Server{Keyring: keyring}).dial()
			if answer := ask(t, conn, m)[0]; !bytes.Equal(answer, []byte{5}) || len(keyring.noted()) > 0 {
				t.Errorf("answer %x, %v", answer, keyring.noted())
			}
		})
	}
}

// The end does not wait for clients that send slowly or read nothing.
func TestAttack13Stop(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Server{Keyring: keyring})
	keyring.sign = func(context.Context, *request.Caller, request.Sign) (*ssh.Signature, error) {
		return &ssh.Signature{Format: "alg", Blob: make([]byte, 4<<20)}, nil
	}
	half, deaf, silent := r.dial(), r.dial(), r.dial()
	ask(t, silent, message(11))
	if _, err := half.Write([]byte{0, 0, 1, 0, 13}); err != nil {
		t.Fatal(err)
	}
	send(t, deaf, signRequest)
	// The answer is under way when some of it has come.
	if _, err := io.ReadFull(deaf, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	r.stop()
	<-r.stopped // or the test takes too long
}

// BenchmarkCrowded makes a connection where there are too many.
func BenchmarkCrowded(b *testing.B) {
	table := newClients(DefaultMaxConnections)
	for b.Loop() {
		table.admit(member(9, 666, time.Second))
	}
}
