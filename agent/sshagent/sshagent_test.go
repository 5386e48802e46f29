package sshagent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/door"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer"
	"p11-agent/agent/peer/proctest"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// fakeKeyring holds keys in memory and records the requests.
type fakeKeyring struct {
	signers []ssh.Signer
	// sign replaces Sign if it is set.
	sign func(context.Context, *request.Caller, request.Sign) (*ssh.Signature, error)
	// list replaces List if it is set.
	list func() []agent.Identity
	// pass answers messages that are passed on. If it is nil, there is no answer.
	pass func(message []byte) ([]byte, error)
	// add gets each key that a client adds.
	add func(request.AddKey)

	mu      sync.Mutex
	calls   []call
	refused []string
}

// call is one request, in memory of its own.
type call struct {
	method      string
	key         string
	provider    string
	pin         string
	constraints request.Constraints
	caller      *request.Caller
}

var errNoKey = errors.New("no such key")

func (k *fakeKeyring) note(c call) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, c)
}

func (k *fakeKeyring) noted() []call {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.calls)
}

func (k *fakeKeyring) List(_ context.Context, c *request.Caller) (*agent.Listing, error) {
	k.note(call{method: "List", caller: c})
	if k.list != nil {
		return &agent.Listing{Identities: k.list()}, nil
	}
	var ids []agent.Identity
	for _, s := range k.signers {
		ids = append(ids, agent.Identity{Key: s.PublicKey(), Comment: "fake " + s.PublicKey().Type()})
	}
	return &agent.Listing{Identities: ids}, nil
}

func (k *fakeKeyring) Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error) {
	k.note(call{method: "Sign", key: string(r.Key), caller: c})
	if k.sign != nil {
		return k.sign(ctx, c, r)
	}
	for _, s := range k.signers {
		if !bytes.Equal(s.PublicKey().Marshal(), r.Key) {
			continue
		}
		algorithm := s.PublicKey().Type()
		switch {
		case algorithm != ssh.KeyAlgoRSA:
		case r.Flags&request.SignatureRSASHA2512 != 0:
			algorithm = ssh.KeyAlgoRSASHA512
		case r.Flags&request.SignatureRSASHA2256 != 0:
			algorithm = ssh.KeyAlgoRSASHA256
		}
		return s.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, r.Data, algorithm)
	}
	return nil, errNoKey
}

func (k *fakeKeyring) AddToken(_ context.Context, c *request.Caller, r request.Token) error {
	k.note(call{method: "AddToken", provider: string(r.Provider), pin: string(r.PIN.Bytes()), constraints: r.Constraints, caller: c})
	return nil
}

func (k *fakeKeyring) Add(_ context.Context, c *request.Caller, r request.AddKey) error {
	k.note(call{method: "Add", key: string(r.Public.Marshal()), provider: r.Comment, constraints: r.Constraints, caller: c})
	if k.add != nil {
		k.add(r)
	}
	return nil
}

func (k *fakeKeyring) Lock(_ context.Context, c *request.Caller, phrase *secret.Secret) error {
	k.note(call{method: "Lock", pin: string(phrase.Bytes()), caller: c})
	return nil
}

func (k *fakeKeyring) Unlock(_ context.Context, c *request.Caller, phrase *secret.Secret) error {
	k.note(call{method: "Unlock", pin: string(phrase.Bytes()), caller: c})
	return nil
}

func (k *fakeKeyring) Pass(_ context.Context, c *request.Caller, message []byte) ([]byte, error) {
	if k.pass == nil {
		return nil, agent.ErrNotPassed
	}
	k.note(call{method: "Pass", key: string(message), caller: c})
	return k.pass(message)
}

func (k *fakeKeyring) RemoveToken(_ context.Context, c *request.Caller, r request.Token) error {
	k.note(call{method: "RemoveToken", provider: string(r.Provider), pin: string(r.PIN.Bytes()), caller: c})
	return nil
}

func (k *fakeKeyring) Remove(_ context.Context, c *request.Caller, key []byte) error {
	k.note(call{method: "Remove", key: string(key), caller: c})
	for _, s := range k.signers {
		if bytes.Equal(s.PublicKey().Marshal(), key) {
			return nil
		}
	}
	return errNoKey
}

func (k *fakeKeyring) RemoveAll(_ context.Context, c *request.Caller) error {
	k.note(call{method: "RemoveAll", caller: c})
	return nil
}

func (k *fakeKeyring) Status(_ context.Context, c *request.Caller, provider []byte) ([]byte, error) {
	k.note(call{method: "Status", provider: string(provider), caller: c})
	return []byte(`{"version":"1"}`), agent.MayControl(c)
}

func (k *fakeKeyring) Login(_ context.Context, c *request.Caller, r request.TokenLogin) (request.LoginAnswer, error) {
	k.note(call{method: "Login", provider: string(r.Provider), pin: string(r.PIN.Bytes()), caller: c})
	return request.LoginAnswer{Already: true, Tries: request.TriesLow}, agent.MayControl(c)
}

func (k *fakeKeyring) Logout(_ context.Context, c *request.Caller, provider []byte) error {
	k.note(call{method: "Logout", provider: string(provider), caller: c})
	return agent.MayControl(c)
}

func (k *fakeKeyring) Refuse(_ *request.Caller, request request.Action, reason error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refused = append(k.refused, fmt.Sprintf("%s: %v", request, reason))
}

var makeSigners = sync.OnceValue(func() []ssh.Signer {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	var signers []ssh.Signer
	for _, key := range []any{ed, rsaKey} {
		s, err := ssh.NewSignerFromKey(key)
		if err != nil {
			panic(err)
		}
		signers = append(signers, s)
	}
	return signers
})

func newKeyring() *fakeKeyring { return &fakeKeyring{signers: makeSigners()} }

// A logBook is a log that tests read.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
	line chan struct{} // one for each line, as far as they fit
}

func newLog() (*slog.Logger, *logBook) {
	b := &logBook{line: make(chan struct{}, 1000)}
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug})), b
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.line <- struct{}{}:
	default:
	}
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBook) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Reset()
}

// wait waits until the log contains what, and returns the log.
func (b *logBook) wait(t *testing.T, what string) string {
	t.Helper()
	for !strings.Contains(b.String(), what) {
		select {
		case <-b.line:
		case <-t.Context().Done():
			t.Fatalf("the log never said %q:\n%s", what, b)
		}
	}
	return b.String()
}

// testHandler makes a handler for a client that no server has accepted.
func testHandler(s *Door, nc net.Conn, p peer.Peer, look func() peer.Peer) *handler {
	return newHandler(s, door.NewConn(s.connections(), nc, p, look), nil)
}

// running is a server under test.
type running struct {
	t       *testing.T
	server  *Door
	socket  string
	stop    context.CancelFunc
	stopped chan struct{} // closed when Serve has returned
	err     error         // the result of Serve
}

// serve starts a server. At the end of the test, it checks for leaks.
func serve(t *testing.T, s *Door) *running {
	t.Helper()
	checkLeaks(t)
	l, err := door.Listen(filepath.Join(doortest.Dir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, s, l, l.Path())
}

func serveOn(t *testing.T, s *Door, l door.Listener, path string) *running {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	r := &running{t: t, server: s, socket: path, stop: stop, stopped: make(chan struct{})}
	go func() {
		defer close(r.stopped)
		r.err = s.Serve(ctx, l, nil)
	}()
	t.Cleanup(func() {
		stop()
		<-r.stopped
		if r.err != nil {
			t.Errorf("Serve: %v", r.err)
		}
	})
	return r
}

func (r *running) dial() *net.UnixConn {
	r.t.Helper()
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn.(*net.UnixConn)
}

// checkLeaks fails the test when it leaves open files, or goroutines of a door.
func checkLeaks(t *testing.T) {
	t.Helper()
	proctest.NoLeaks(t, proctest.Methods[Upstream](), proctest.Methods[door.Server]())
}

// needs returns the path of a program that the test needs.
func needs(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing, which CI has to install", program)
		}
		t.Skipf("%s is missing", program)
	}
	return path
}

// message builds a message. It begins with its number. A bool and a byte take a byte each,
// and a uint32 takes four. A string and a []byte have their length in front. raw has not.
func message(number byte, fields ...any) []byte {
	return append([]byte{number}, encode(fields...)...)
}

type raw []byte

func encode(fields ...any) []byte {
	var b []byte
	for _, field := range fields {
		switch v := field.(type) {
		case byte:
			b = append(b, v)
		case bool:
			if v {
				b = append(b, 1)
			} else {
				b = append(b, 0)
			}
		case uint32:
			b = binary.BigEndian.AppendUint32(b, v)
		case string:
			b = appendString(b, v)
		case []byte:
			b = appendString(b, v)
		case raw:
			b = append(b, v...)
		default:
			panic(field)
		}
	}
	return b
}

func framed(messages ...[]byte) []byte {
	var b []byte
	for _, m := range messages {
		b = appendString(b, m)
	}
	return b
}

func readAnswer(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

// ask sends messages and returns the answer to each.
func ask(t *testing.T, conn io.ReadWriter, messages ...[]byte) [][]byte {
	t.Helper()
	if _, err := conn.Write(framed(messages...)); err != nil {
		t.Fatal(err)
	}
	var answers [][]byte
	for range messages {
		answer, err := readAnswer(conn)
		if err != nil {
			t.Fatalf("answer %d of %d: %v", len(answers)+1, len(messages), err)
		}
		answers = append(answers, answer)
	}
	return answers
}
