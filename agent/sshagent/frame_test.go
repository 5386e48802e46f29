package sshagent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/door"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// pipe serves a client over a pipe in a synctest bubble. There, waiting costs no time.
func pipe(t *testing.T, s *Door) (client net.Conn, ended chan time.Time) {
	t.Helper()
	client, nc := net.Pipe()
	ended = make(chan time.Time, 1)
	c := testHandler(s, nc, peer.Peer{Known: true, PID: 4711}, nil)
	go func() {
		defer nc.Close()
		defer c.in.close()
		c.Serve(t.Context())
		ended <- time.Now()
	}()
	t.Cleanup(func() { client.Close() })
	return client, ended
}

func TestPatience(t *testing.T) {
	for _, test := range []struct {
		name   string
		client func(*testing.T, net.Conn)
		ends   bool
		logged string
		takes  time.Duration
	}{
		{
			name: "idle for a year",
			client: func(t *testing.T, conn net.Conn) {
				time.Sleep(365 * 24 * time.Hour)
				ask(t, conn, message(11))
			},
		},
		{
			name: "slow but in time",
			client: func(t *testing.T, conn net.Conn) {
				for _, b := range framed(message(11)) {
					time.Sleep(door.Patience / 8)
					if _, err := conn.Write([]byte{b}); err != nil {
						t.Error(err)
					}
				}
				if answer, err := readAnswer(conn); err != nil || answer[0] != 12 {
					t.Errorf("answer %x, %v", answer, err)
				}
				time.Sleep(2 * door.Patience) // the deadline was for that message alone
				ask(t, conn, message(11))
			},
		},
		{
			name: "half a length",
			client: func(t *testing.T, conn net.Conn) {
				if _, err := conn.Write([]byte{0, 0}); err != nil {
					t.Error(err)
				}
			},
			ends: true, logged: "the rest of a message", takes: door.Patience,
		},
		{
			name: "half a message, byte by byte",
			client: func(t *testing.T, conn net.Conn) {
				for _, b := range framed(bytes.Repeat([]byte{13}, 100)) {
					if _, err := conn.Write([]byte{b}); err != nil {
						return
					}
					time.Sleep(door.Patience / 7)
				}
				t.Error("the connection stays open")
			},
			ends: true, logged: "the rest of a message", takes: door.Patience,
		},
		{
			name: "answer not taken",
			client: func(t *testing.T, conn net.Conn) {
				if _, err := conn.Write(framed(message(11))); err != nil {
					t.Error(err)
				}
			},
			ends: true, logged: "took its answer", takes: door.Patience,
		},
		{
			name: "gone within a message",
			client: func(t *testing.T, conn net.Conn) {
				if _, err := conn.Write([]byte{0, 0, 0, 9, 13}); err != nil {
					t.Error(err)
				}
				synctest.Wait() // a pipe takes no deadline when it is closed
				conn.Close()
			},
			ends: true, logged: "hung up within a message",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, book := newLog()
				began := time.Now()
				conn, ended := pipe(t, &Door{Keyring: newKeyring(), Log: log})
				test.client(t, conn)
				if !test.ends {
					select {
					case <-ended:
						t.Error("the connection was ended")
					default:
					}
					conn.Close()
				}
				took := (<-ended).Sub(began)
				if got := book.String(); !strings.Contains(got, test.logged) || test.logged == "" && got != "" {
					t.Errorf("log %q, want %q in it", got, test.logged)
				}
				if test.takes > 0 && took != test.takes {
					t.Errorf("ended after %v, want %v", took, test.takes)
				}
			})
		})
	}
}

const pin = "correct horse 8472"

// peeking is a connection that checks the memory into which the server reads.
type peeking struct {
	net.Conn
	input []byte
	chunk int
	looks func(into, read []byte)
	out   bytes.Buffer
}

func (p *peeking) Read(b []byte) (int, error) {
	n := copy(b, p.input[:min(p.chunk, len(p.input))])
	p.looks(b, p.input[:n])
	clear(p.input[:n])
	p.input = p.input[n:]
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}
func (p *peeking) Write(b []byte) (int, error)      { return p.out.Write(b) }
func (*peeking) SetReadDeadline(time.Time) error    { return nil }
func (p *peeking) SetWriteDeadline(time.Time) error { return nil }

// TestSecretsAreHidden checks messages that may hold a secret. The door reads them only into
// the memory of a Secret. It wipes the Secret after the message. No other code leaves a copy
// of a PIN.
func TestSecretsAreHidden(t *testing.T) {
	long := strings.Repeat("l", 3*bufferSize)
	for _, test := range []struct {
		name     string
		messages [][]byte
		cut      int // bytes missing at the end
		chunk    int
	}{
		{name: "added", messages: [][]byte{message(20, "pkcs11:", pin), message(11)}, chunk: 1 << 20},
		{name: "added with constraints", messages: [][]byte{message(26, "pkcs11:", pin, byte(2)), message(11)}, chunk: 1 << 20},
		{name: "removed", messages: [][]byte{message(21, "pkcs11:", pin), message(11)}, chunk: 1 << 20},
		{name: "in the name", messages: [][]byte{message(20, "pkcs11:?pin-value="+pin, ""), message(11)}, chunk: 1 << 20},
		{name: "in small pieces", messages: [][]byte{message(20, "pkcs11:", pin), message(11)}, chunk: 3},
		{name: "in a long message", messages: [][]byte{message(99, long, pin), message(11)}, chunk: 100},
		{name: "behind a long message", messages: [][]byte{message(13, "key", long, uint32(0)), message(20, "pkcs11:", pin), message(11)}, chunk: 1 << 20},
		{name: "before long constraints", messages: [][]byte{message(26, "pkcs11:", pin, raw(long)), message(11)}, chunk: 1000},
		{name: "behind a list", messages: [][]byte{message(11), message(20, "pkcs11:", pin), message(11)}, chunk: 1 << 20},
		{name: "unknown constraint", messages: [][]byte{message(26, "pkcs11:", pin, byte(9)), message(11)}, chunk: 1 << 20},
		{name: "bytes left over", messages: [][]byte{message(20, "pkcs11:", pin, byte(9)), message(11)}, chunk: 1 << 20},
		{name: "passphrase of a lock", messages: [][]byte{message(22, pin), message(11)}, chunk: 1 << 20},
		{name: "passphrase at once", messages: [][]byte{message(23, raw(pin)), message(11)}, chunk: 1 << 20},
		{name: "private key", messages: [][]byte{message(17, "ssh-ed25519", pin, pin), message(11)}, chunk: 1 << 20},
		{name: "login", messages: [][]byte{message(27, extensionControl, "login", "pkcs11:", pin, false), message(11)}, chunk: 1 << 20},
		{name: "login, bytes left over", messages: [][]byte{message(27, extensionControl, "login", "pkcs11:", pin, false, byte(9)), message(11)}, chunk: 1 << 20},
		{name: "login that panics", messages: [][]byte{message(27, extensionControl, "login", "panic", pin, false), message(11)}, chunk: 1 << 20},
		{name: "an extension without a name", messages: [][]byte{message(27, "", raw(pin)), message(11)}, chunk: 1 << 20},
		{name: "an extension that is not known", messages: [][]byte{message(27, "x", raw(pin)), message(11)}, chunk: 1 << 20},
		{name: "an extension with a name as long as a known one", messages: [][]byte{message(27, "Query", raw(pin)), message(11)}, chunk: 1 << 20},
		{name: "an unknown message", messages: [][]byte{message(99, raw(pin)), message(11)}, chunk: 1 << 20},
		{name: "cut short", messages: [][]byte{message(20, "pkcs11:", pin, strings.Repeat("x", 100))}, cut: 50, chunk: 1 << 20},
		{name: "the keyring panics", messages: [][]byte{message(20, "panic", pin), message(11)}, chunk: 1 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c *handler
			input := framed(test.messages...)
			nc := &peeking{input: input[:len(input)-test.cut], chunk: test.chunk}
			from := bytes.Index(input, []byte(pin))
			nc.looks = func(into, read []byte) {
				at := len(input) - test.cut - len(nc.input)
				if at >= from+len(pin) || at+len(read) <= from {
					return
				}
				hidden := c.in.hidden.Buffer()
				if len(hidden) == 0 || !overlap(into, hidden) {
					t.Errorf("bytes %d to %d, of which the PIN is %d to %d, are read into memory of another kind", at, at+len(read), from, from+len(pin))
				}
			}
			log, book := newLog()
			keyring := &wary{fakeKeyring: newKeyring()}
			c = testHandler(&Door{Keyring: keyring, Log: log}, nc, peer.Peer{}, nil)
			func() {
				defer c.in.close()
				defer c.Survive()
				c.Serve(t.Context())
			}()
			if c.in.hidden != nil {
				t.Error("the message was not wiped")
			}
			if keyring.pin.Len() > 0 {
				t.Error("the keyring's copy was not wiped")
			}
			if bytes.Contains(c.out, []byte(pin[:6])) || strings.Contains(book.String(), pin[:6]) {
				t.Errorf("the PIN got into an answer or the log: %s", book)
			}
			if bytes.Contains(c.in.head[:], []byte(pin[:6])) {
				t.Error("the PIN is in the head of the message")
			}
		})
	}
}

// overlap tells whether two slices share memory.
func overlap(a, b []byte) bool {
	start := func(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
	return len(a) > 0 && start(a) < start(b)+uintptr(len(b)) && start(b) < start(a)+uintptr(len(a))
}

// The kernel bounds the memory that the agent may lock. Messages of one process get only a
// part of it, so that other processes have room.
func TestLongSecrets(t *testing.T) {
	log, book := newLog()
	s := &Door{Keyring: newKeyring(), Log: log}
	r := serve(t, s)
	begun := framed(message(26, "pkcs11:", pin, raw(strings.Repeat("l", maxFrame/2))))
	var held []*net.UnixConn
	for range 2 * door.MaxProcess[door.Locked] / (maxFrame / 2) {
		conn := r.dial()
		if _, err := conn.Write(begun[:len(begun)-1]); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	book.wait(t, "its process would keep")
	if kept, _ := s.door.Kept(); kept[door.Locked] > door.MaxProcess[door.Locked] {
		t.Errorf("%d bytes are locked", kept[door.Locked])
	}
	for _, conn := range held {
		_ = conn.CloseWrite()
		_, _ = io.ReadAll(conn) // the door closes a connection after it has made room
	}
	ask(t, r.dial(), message(22, pin))
}

// wary is a keyring that wrongly keeps the PIN, and panics if the test wants it.
type wary struct {
	*fakeKeyring
	pin *secret.Secret
}

func (k *wary) AddToken(_ context.Context, _ *request.Caller, r request.Token) error {
	k.pin = r.PIN
	if string(r.Provider) == "panic" {
		panic(string(r.PIN.Bytes()))
	}
	return nil
}

func (k *wary) Login(_ context.Context, _ *request.Caller, r request.TokenLogin) (request.LoginAnswer, error) {
	return request.LoginAnswer{}, k.AddToken(context.Background(), nil, request.Token{Provider: r.Provider, PIN: r.PIN})
}

// A message costs memory for the bytes that have arrived, not for its announced length.
func TestBufferGrowsWithMessage(t *testing.T) {
	for _, test := range []struct {
		name string
		sent int
		want int
	}{
		{"the length alone", 4, 0},
		{"a little", 1000, bufferSize},
		{"more than the buffer", 4 + bufferSize + 1, 2 * bufferSize},
		{"nearly all", maxFrame, maxFrame},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c *handler
			largest := 0
			input := make([]byte, test.sent)
			copy(input, []byte{0, 4, 0, 0, 13})
			nc := &peeking{input: input, chunk: 1 << 20}
			nc.looks = func(_, _ []byte) { largest = max(largest, len(c.in.buf)) }
			c = testHandler(&Door{Keyring: newKeyring()}, nc, peer.Peer{}, nil)
			c.Serve(t.Context())
			if largest != test.want {
				t.Errorf("buffer of %d bytes for %d of %d, want %d", largest, test.sent, maxFrame, test.want)
			}
			c.in.close()
		})
	}
}

// Each message costs two reads and one write.
func TestReads(t *testing.T) {
	reads, c := 0, (*handler)(nil)
	one := framed(signRequest)
	nc := &peeking{input: bytes.Repeat(one, 10), chunk: len(one), looks: func(_, _ []byte) { reads++ }}
	c = testHandler(&Door{Keyring: &fakeKeyring{sign: func(context.Context, *request.Caller, request.Sign) (*ssh.Signature, error) {
		return &ssh.Signature{Format: "x"}, nil
	}}}, nc, peer.Peer{}, nil)
	c.Serve(t.Context())
	c.in.close()
	if reads != 21 { // the last one finds the end
		t.Errorf("%d reads for 10 messages", reads)
	}
}

// still is a keyring that allocates nothing itself.
type still struct {
	*fakeKeyring
	list agent.Listing
	sig  ssh.Signature
}

func (k *still) List(context.Context, *request.Caller) (*agent.Listing, error) { return &k.list, nil }

func (k *still) Sign(context.Context, *request.Caller, request.Sign) (*ssh.Signature, error) {
	return &k.sig, nil
}

func TestAllocations(t *testing.T) {
	key := makeSigners()[1].PublicKey()
	keyring := &still{
		list: agent.Listing{Identities: []agent.Identity{{Key: key, Comment: "one"}, {Key: key, Comment: "two"}}},
		sig:  ssh.Signature{Format: "rsa-sha2-256", Blob: make([]byte, 256)},
	}
	many, _ := stillKeyring(t, slog.DiscardHandler, 1000)
	answer := make([]byte, 4+maxFrame)
	for _, test := range []struct {
		name    string
		keyring Keyring
		request []byte
	}{
		{"list", keyring, framed(message(11))},
		{"list of 1,000 keys", many, framed(message(11))},
		{"sign", keyring, framed(message(13, key.Marshal(), "data", uint32(2)))},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := serve(t, &Door{Keyring: test.keyring}).dial()
			// The test uses the real socket, so that reads, writes and deadlines count.
			if n := testing.AllocsPerRun(200, func() {
				if _, err := roundTrip(conn, test.request, answer); err != nil {
					t.Fatal(err)
				}
			}); n > 0 {
				t.Errorf("%v allocations for each request, want none", n)
			}
		})
	}
}

// gate is a connection that holds an answer back until the test lets it through, or fails to
// write it.
type gate struct {
	net.Conn
	writes chan error
}

func (g *gate) Write(b []byte) (int, error) {
	g.writes <- nil
	if err := <-g.writes; err != nil {
		return 0, err
	}
	return g.Conn.Write(b)
}

// The client gets a signature before the log has its line. The line comes even if the
// client does not get the answer. A refusal is in the log before the answer.
func TestAnswerBeforeLine(t *testing.T) {
	log, book := newLog()
	keyring, key := stillKeyring(t, log.Handler(), 1)
	s := &Door{Keyring: keyring, Log: log}
	for _, test := range []struct {
		name   string
		key    []byte
		broken error
		first  string // in the log before the answer
		then   string
	}{
		{"signed", key, nil, "", "msg=signed "},
		{"signed, and the client has left", key, syscall.EPIPE, "", "msg=signed "},
		{"refused", []byte("no key"), nil, `msg="request refused" `, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			book.reset()
			client, nc := net.Pipe()
			defer client.Close()
			g := &gate{nc, make(chan error)}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				c := testHandler(s, g, everyday, nil)
				defer nc.Close()
				defer c.in.close()
				c.Serve(t.Context())
			}()
			if _, err := client.Write(framed(message(msgSignRequest, test.key, gitData(), uint32(0)))); err != nil {
				t.Fatal(err)
			}
			<-g.writes
			if got := book.String(); !strings.Contains(got, test.first) || (got == "") != (test.first == "") {
				t.Errorf("before the answer the log has %q, want %q in it", got, test.first)
			}
			g.writes <- test.broken
			if test.broken == nil {
				if _, err := readAnswer(client); err != nil {
					t.Error(err)
				}
			}
			client.Close()
			<-ended
			if got := book.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, test.then) {
				t.Errorf("the log has %q, want one line with %q", got, test.then)
			}
		})
	}
}
