package sshagent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent"
	"p11-agent/agent/door"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

const (
	// listPatience is how long a list may take. The agent's own keys wait for the list,
	// and so does every ssh that starts.
	listPatience = 2 * time.Second
	// checkPatience is how long an agent that was too slow for a list may take for a check,
	// which no client waits for.
	checkPatience  = 10 * time.Second
	removePatience = 5 * time.Second
	// passPatience leaves time for a person: a message that is passed on may ask one.
	passPatience = 30 * time.Second

	// maxUpstreamComment bounds the bytes of a comment in another agent's list.
	maxUpstreamComment = 1 << 10
)

// An Upstream is another agent behind a Unix socket. Any goroutine may call its methods.
//
// Every request has a connection of its own. So no connection has the binds of another client, and
// a request can be given up at any time: the connection closes when the ctx of the request ends.
// Upstream first binds the connection to the sessions of the Caller, so that the other agent can
// apply its constraints.
//
// An agent that was too slow for a List counts as slow. Further Lists fail at once. Meanwhile a
// check, one request at a time that no client waits for, finds out when the agent answers again.
// The check is the only goroutine that outlives a method. It ends with Close.
//
//	          a List takes too long
//	normal ─────────────────────────▶ slow ──┐ a check takes too long:
//	   ▲                               │ ▲   │ the next List starts another
//	   └───────────────────────────────┘ └───┘
//	 a check is answered, or fails at once
type Upstream struct {
	path string

	// testOnlyDial replaces the socket.
	testOnlyDial func(context.Context) (net.Conn, error)

	checks sync.WaitGroup

	mu     sync.Mutex
	keys   map[string]ssh.PublicKey // of the last list, by their wire form
	slow   bool
	stop   context.CancelFunc // ends the check; nil: no check is under way
	closed bool
}

var _ agent.Upstream = (*Upstream)(nil)

// NewUpstream returns the agent that listens at path, which is absolute. It does not connect: each
// request does.
func NewUpstream(path string) *Upstream { return &Upstream{path: path} }

// Errors that the code tells apart. Their texts follow "the agent at PATH".
var (
	errRefused = errors.New("refused")
	errSilent  = errors.New("does not answer")
	errClosed  = errors.New("is not asked any more: this agent is stopping")
)

// Name returns the path of the socket.
func (u *Upstream) Name() string { return u.path }

// Close ends a check, and waits for its end. Requests that have begun end with their own ctx. Later
// requests fail. Further calls do nothing.
func (u *Upstream) Close() error {
	u.mu.Lock()
	u.closed = true
	if u.stop != nil {
		u.stop()
	}
	u.mu.Unlock()
	u.checks.Wait() // closed keeps others from being added
	return nil
}

// List returns the identities of the agent. It leaves unreadable keys out, and makes comments safe
// to show.
func (u *Upstream) List(ctx context.Context, c *request.Caller) ([]agent.Identity, error) {
	if u.isSlow() {
		return nil, u.wrap(silent(listPatience))
	}
	answer, err := u.ask(ctx, c, listPatience, []byte{msgRequestIdentities})
	if errors.Is(err, errSilent) {
		u.becameSlow()
	}
	if err != nil {
		return nil, err
	}
	u.mu.Lock()
	old := u.keys
	u.mu.Unlock()
	identities, err := parseIdentities(answer, old)
	if err != nil {
		return nil, u.wrap(unusable(err))
	}
	keys := make(map[string]ssh.PublicKey, len(identities))
	for _, id := range identities {
		keys[string(id.Key.Marshal())] = id.Key
	}
	u.mu.Lock()
	u.keys = keys
	u.mu.Unlock()
	return identities, nil
}

// Sign has the agent sign. It waits as long as ctx does, as the agent may ask a person. Clients
// verify the signature.
func (u *Upstream) Sign(ctx context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error) {
	request := appendString([]byte{msgSignRequest}, r.Key)
	request = appendString(request, r.Data)
	request = binary.BigEndian.AppendUint32(request, uint32(r.Flags))
	answer, err := u.ask(ctx, c, 0, request)
	if err != nil {
		return nil, err
	}
	sig, err := parseSignature(answer)
	if err != nil {
		return nil, u.wrap(unusable(err))
	}
	return sig, nil
}

// Remove removes a key from the agent.
func (u *Upstream) Remove(ctx context.Context, c *request.Caller, key []byte) error {
	answer, err := u.ask(ctx, c, removePatience, appendString([]byte{msgRemoveIdentity}, key))
	if err != nil {
		return err
	}
	in, err := expect(answer, msgSuccess)
	if err == nil {
		err = in.end()
	}
	if err != nil {
		return u.wrap(unusable(err))
	}
	return nil
}

// Pass sends a message as it is, and returns the answer as it is, its type first. A refusal is an
// error.
func (u *Upstream) Pass(ctx context.Context, c *request.Caller, message []byte) ([]byte, error) {
	answer, err := u.ask(ctx, c, passPatience, message)
	if err != nil {
		return nil, err
	}
	if refusal(answer[0]) {
		return nil, u.wrap(errRefused)
	}
	return answer, nil
}

// isSlow tells whether the agent counts as slow. If it does, isSlow makes sure that a check is
// under way.
func (u *Upstream) isSlow() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.slow {
		u.checkLocked()
	}
	return u.slow
}

func (u *Upstream) becameSlow() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.slow = true
	u.checkLocked()
}

// checkLocked starts a check in the background, unless one is under way. A check waits until a slow
// agent answers again. Any answer counts, and so does a failure at once, as of an agent that has
// died: the next List asks again.
func (u *Upstream) checkLocked() {
	if u.stop != nil || u.closed {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	u.stop = cancel
	u.checks.Go(func() {
		defer cancel()
		_, err := u.ask(ctx, nil, checkPatience, []byte{msgRequestIdentities})
		u.mu.Lock()
		defer u.mu.Unlock()
		u.stop = nil
		u.slow = errors.Is(err, errSilent)
	})
}

// ask sends a request and returns the answer, of at least one byte, in memory of its own. A limit
// of 0 is no limit. Every error names the agent. The error is errSilent only if the limit ran out.
func (u *Upstream) ask(ctx context.Context, c *request.Caller, limit time.Duration, request []byte) ([]byte, error) {
	u.mu.Lock()
	closed := u.closed
	u.mu.Unlock()
	if closed {
		return nil, u.wrap(errClosed)
	}
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, silent(limit))
		defer cancel()
	}
	answer, err := u.exchange(ctx, c, request)
	switch {
	case err == nil:
		return answer, nil
	case ctx.Err() == nil:
		return nil, u.wrap(err)
	}
	// Any failure happened because the connection was closed.
	cause := context.Cause(ctx)
	if !errors.Is(cause, errSilent) {
		cause = fmt.Errorf("was not waited for: %w", cause)
	}
	return nil, u.wrap(cause)
}

// exchange makes a connection, binds it as the connection of the Caller is bound, and asks.
func (u *Upstream) exchange(ctx context.Context, c *request.Caller, request []byte) ([]byte, error) {
	dial := u.connect
	if u.testOnlyDial != nil {
		dial = u.testOnlyDial
	}
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = conn.Close() // a deadline could be overwritten by that of a frame
	})
	defer func() {
		if stop() {
			_ = conn.Close()
		} else {
			<-closed // so that nothing is left running
		}
	}()
	in := newFrames(conn, nil) // answers hold no secret
	defer in.close()
	for _, bind := range bindsOf(c) {
		answer, err := talk(conn, &in, bind)
		if err != nil {
			return nil, err
		}
		// An agent that refuses to be bound knows what it refused, or has no
		// constraints that depend on it.
		if answer[0] != msgSuccess && !refusal(answer[0]) {
			return nil, unusable(unexpected(answer[0]))
		}
		in.done()
	}
	answer, err := talk(conn, &in, request)
	if err != nil {
		return nil, err
	}
	return bytes.Clone(answer), nil
}

// failingBind is a bind that every agent refuses: everything in it is empty.
var failingBind = append(appendString([]byte{msgExtension}, extensionSessionBind), make([]byte, 4+4+4+1)...)

// bindsOf returns the messages that bind a connection as the connection of c is bound. The agent
// does not keep a failed bind. But the other agent has to know of it: to ssh-agent, a connection
// without any bind is a local one, which may do more (socket_is_remote in OpenSSH's ssh-agent.c).
func bindsOf(c *request.Caller) [][]byte {
	if c == nil {
		return nil
	}
	var messages [][]byte
	for _, b := range c.Binds {
		messages = append(messages, b.Message)
	}
	if c.BindFailed {
		messages = append(messages, failingBind)
	}
	return messages
}

// talk sends one message and returns its answer, which is valid until in.done.
func talk(conn net.Conn, in *frames, message []byte) ([]byte, error) {
	if len(message) == 0 || len(message) > maxFrame {
		return nil, fmt.Errorf("can be sent messages of 1 to %d bytes, and not of %d", maxFrame, len(message))
	}
	// The message may hold a secret, so that no copy is made of it.
	out := net.Buffers{binary.BigEndian.AppendUint32(nil, uint32(len(message))), message}
	if _, err := out.WriteTo(conn); err != nil {
		return nil, broken(err)
	}
	answer, err := in.next()
	if err != nil {
		return nil, broken(err)
	}
	return answer, nil
}

// broken returns what an error of the connection means.
func broken(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("hung up before its answer was complete: see what it has logged (%w)", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("took more than %v for one answer: restart it (%w)", door.Patience, err)
	}
	return unusable(err)
}

// connect connects to the socket. It refuses an agent of another user: such an agent must not see
// the request, and its answers cannot be believed.
func (u *Upstream) connect(ctx context.Context) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", u.path)
	if errors.Is(err, syscall.EAGAIN) {
		return nil, fmt.Errorf("has too many clients waiting: restart it if it hangs (%w)", syscall.EAGAIN)
	}
	if err != nil {
		if errno, ok := errors.AsType[syscall.Errno](err); ok {
			err = errno // without the path, which wrap names
		}
		return nil, fmt.Errorf("cannot be reached: start it, or take it out of the configuration (%w)", err)
	}
	uid, err := owner(conn.(*net.UnixConn))
	if err == nil {
		err = mayAsk(uid, os.Geteuid())
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// owner returns the user that the other end ran as when it began to listen. peer.Of would tell
// more, but makes some 20 system calls for each request.
func owner(conn *net.UnixConn) (uid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("is not asked, because the kernel does not tell whose it is: %w", err)
	}
	return int(cred.Uid), nil
}

func mayAsk(uid, ours int) error {
	if uid != ours && uid != 0 {
		return fmt.Errorf("runs as another user (uid %d) and is not asked: name the socket of an agent of this user (uid %d) or of root", uid, ours)
	}
	return nil
}

// wrap puts the agent in front of an error, so that both make a whole sentence.
func (u *Upstream) wrap(err error) error { return fmt.Errorf("the agent at %s %w", u.path, err) }

func silent(limit time.Duration) error {
	return fmt.Errorf("%w within %v: restart it if it hangs", errSilent, limit)
}

func unusable(err error) error {
	if errors.Is(err, errRefused) {
		return err
	}
	return fmt.Errorf("gave an answer of no use: update it, or take it out of the configuration (%w)", err)
}

func unexpected(kind byte) error { return fmt.Errorf("an answer of type %d", kind) }

// refusal tells whether an answer of a type means no.
func refusal(kind byte) bool { return kind == msgFailure || kind == msgExtensionFailure }

// expect returns the fields of an answer that has to be of a type.
func expect(answer []byte, kind byte) (reader, error) {
	in := reader{rest: answer}
	switch got := in.byte(); {
	case in.failed:
		return in, errMalformed
	case got == kind:
		return in, nil
	case refusal(got):
		return in, errRefused
	default:
		return in, unexpected(got)
	}
}

// parseIdentities reads SSH_AGENT_IDENTITIES_ANSWER (RFC 9987 section 5.5). Memory grows with the
// identities in the answer, not with their announced number. old are the keys of the last list, by
// their wire form: the signature of a certificate is verified once.
func parseIdentities(answer []byte, old map[string]ssh.PublicKey) ([]agent.Identity, error) {
	in, err := expect(answer, msgIdentitiesAnswer)
	if err != nil {
		return nil, err
	}
	n := in.uint32()
	if n > maxIdentities {
		return nil, fmt.Errorf("a list of %d keys; the limit is %d", n, maxIdentities)
	}
	var identities []agent.Identity
	for range n {
		blob, comment := in.bytes(), in.bytes()
		if in.failed {
			return nil, errMalformed
		}
		key := old[string(blob)]
		if key == nil {
			var err error
			key, err = parseKey(blob, maxCertificate)
			// A client asks for a key by its wire form. A key with another wire form
			// here could be shown and not used.
			if err != nil || !bytes.Equal(key.Marshal(), blob) {
				continue
			}
		}
		identities = append(identities, agent.Identity{Key: key, Comment: plain.Comment(comment, maxUpstreamComment)})
	}
	if err := in.end(); err != nil {
		return nil, err
	}
	return identities, nil
}

// parseSignature reads SSH_AGENT_SIGN_RESPONSE (RFC 9987 section 5.6). The signature shares no
// memory with the answer.
func parseSignature(answer []byte) (*ssh.Signature, error) {
	in, err := expect(answer, msgSignResponse)
	if err != nil {
		return nil, err
	}
	sig := reader{rest: in.bytes()}
	if err := in.end(); err != nil {
		return nil, err
	}
	// The bytes after the two are for security keys (OpenSSH's PROTOCOL.u2f).
	format, blob := sig.bytes(), sig.bytes()
	if sig.failed || len(format) == 0 || len(blob) == 0 {
		return nil, errMalformed
	}
	return &ssh.Signature{Format: string(format), Blob: bytes.Clone(blob), Rest: bytes.Clone(sig.rest)}, nil
}
