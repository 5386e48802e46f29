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

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent/door"
	"p11-agent/agent/request"
)

const (
	enemyVariable   = "P11_ENEMY_OF"
	busyConnections = 39
)

// TestEnemy runs in another process. It makes as many connections as it can get, each with
// a request that gets no answer.
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

// The requests of one process all wait for a person. Other clients still connect. The
// process loses only as many connections as other clients need.
func TestAttack13Busy(t *testing.T) {
	keyring, begun, ended := waiting()
	r := serve(t, &Door{Keyring: keyring, limit: busyConnections + 1})
	mine := r.dial() // waits, too, and longer than any connection of the other process
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
		if err := <-ended; !errors.Is(err, door.ErrMadeRoom) {
			t.Errorf("the request ended because of %v, want %v", err, door.ErrMadeRoom)
		}
	}
	// The server has not ended the connection of this process.
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

// fatHost returns a function that makes binds with a certificate of about size bytes.
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

// Thirty connections send the largest binds, and as many as the agent keeps.
func TestAttack08Binds(t *testing.T) {
	log, book := newLog()
	s := &Door{Keyring: newKeyring(), Log: log, KeepBinds: true}
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
	usage, n := s.door.Kept()
	kept := usage[door.Memory]
	if n != clients || kept > clients*maxBound || kept < clients*maxBound/4 {
		t.Errorf("%d bytes are kept for %d connections", kept, n)
	}
	book.wait(t, fmt.Sprintf("the limit is %d", maxBind))
	book.wait(t, fmt.Sprintf("the limit is %d", maxBound))
}

// The memory of incomplete messages counts, and that of unread messages.
func TestAttack08Halves(t *testing.T) {
	log, book := newLog()
	keyring := newKeyring()
	s := &Door{Keyring: keyring, Log: log}
	r := serve(t, s)
	half := append([]byte{0, 4, 0, 0, 13}, make([]byte, 255<<10)...)
	for range 2 * door.MaxProcess[door.Memory] / maxFrame {
		conn := r.dial()
		if _, err := conn.Write(half); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
	}
	book.wait(t, "its process would keep")
	if kept, _ := s.door.Kept(); kept[door.Memory] > door.MaxProcess[door.Memory] {
		t.Errorf("%d bytes are kept", kept[door.Memory])
	}
}

// The memory of a request counts until its answer.
func TestRequestsCount(t *testing.T) {
	keyring := newKeyring()
	s := &Door{Keyring: keyring}
	r := serve(t, s)
	var during door.Usage
	keyring.add = func(request.AddKey) {
		during, _ = s.door.Kept()
	}
	conn := r.dial()
	for _, m := range addMessages(t) {
		ask(t, conn, m)
	}
	if during[door.Memory] == 0 || during[door.Locked] == 0 {
		t.Error("nothing is counted while a key is added")
	}
	ask(t, conn, message(20, "pkcs11:", "1234"), message(22, "phrase"), message(23, "phrase"))
	if kept, _ := s.door.Kept(); kept != (door.Usage{}) {
		t.Errorf("%d bytes are counted afterwards", kept[door.Memory])
	}
}

// The door refuses a text that is too long for any program, before it takes locked memory.
func TestLongTexts(t *testing.T) {
	for name, m := range map[string][]byte{
		"provider":   message(20, strings.Repeat("x", maxURI+1), ""),
		"PIN":        message(20, "pkcs11:", strings.Repeat("1", maxPIN+1)),
		"passphrase": message(22, strings.Repeat("1", maxPIN+1)),
	} {
		t.Run(name, func(t *testing.T) {
			keyring := newKeyring()
			conn := serve(t, &Door{Keyring: keyring}).dial()
			if answer := ask(t, conn, m)[0]; !bytes.Equal(answer, []byte{5}) || len(keyring.noted()) > 0 {
				t.Errorf("answer %x, %v", answer, keyring.noted())
			}
		})
	}
}

// The server stops without waiting for clients that send slowly or read nothing.
func TestAttack13Stop(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
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
