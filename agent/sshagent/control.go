package sshagent

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// extensionControl is this program's own extension. With it, commands of p11-agent ask a
// running agent. The request is
//
//	byte    SSH_AGENTC_EXTENSION
//	string  "control-v1@p11-agent"
//	string  the question: "status", "login" or "logout"
//	string  the URI that names tokens; empty means all tokens, except for "login"
//
// "login" is followed by
//
//	string  the PIN; empty means from where a signature would get it
//	boolean reserved
//
// The agent ignores the boolean. It once said that the person at the client wants to use the
// last try. The agent cannot believe a client that, so it asks by itself.
//
// If the client may ask, the answer is
//
//	byte    SSH_AGENT_EXTENSION_RESPONSE
//	string  "control-v1@p11-agent"
//	string  JSON: the status, or a ControlAnswer
//
// and otherwise SSH_AGENT_EXTENSION_FAILURE. The agent never passes the extension on to an
// upstream agent, which would take it for a question of this program.
const extensionControl = "control-v1@p11-agent"

const (
	controlStatus = "status"
	controlLogin  = "login"
	controlLogout = "logout"
)

const (
	// maxURI and maxPIN bound what a client may send, in bytes. A path has up to
	// 4 KiB (PATH_MAX), and programs read PINs and passphrases into 1 KiB.
	maxURI = 4 << 10
	maxPIN = 1 << 10
	// maxStatus bounds the bytes of a status that a client accepts.
	maxStatus = 64 << 20
)

// A ControlAnswer is the result of a login or logout.
type ControlAnswer struct {
	request.LoginAnswer
	Error string // empty: the agent did it
}

// controlRequest is a request as it came. All of it shares the memory of the message.
type controlRequest struct {
	what     string
	uri, pin []byte
}

// parseControl reads the fields after the extension's name.
func parseControl(in reader) (controlRequest, error) {
	r := controlRequest{what: string(in.bytes()), uri: in.bytes()}
	switch r.what {
	case controlStatus, controlLogout:
	case controlLogin:
		r.pin = in.bytes()
		in.bool()
	default:
		return controlRequest{}, errors.New("unknown form of a login: the client has another version")
	}
	switch {
	case in.end() != nil:
		return controlRequest{}, errMalformed
	case len(r.uri) > maxURI:
		return controlRequest{}, fmt.Errorf("a URI of %d bytes: the limit is %d", len(r.uri), maxURI)
	case len(r.pin) > maxPIN:
		return controlRequest{}, fmt.Errorf("a PIN of more than %d bytes", maxPIN)
	case bytes.IndexByte(r.uri, 0) >= 0 || bytes.IndexByte(r.pin, 0) >= 0:
		return controlRequest{}, errNUL
	}
	return r, nil
}

// control answers extensionControl.
func (c *handler) control(ctx context.Context, in reader) {
	r, err := parseControl(in)
	if err != nil {
		c.out = append(c.out, msgExtensionFailure)
		c.server.Keyring.Refuse(c.caller, request.ActionStatus, err)
		return
	}
	var answer []byte
	switch r.what {
	case controlStatus:
		if answer, err = c.server.Keyring.Status(ctx, c.caller, r.uri); err != nil {
			answer = controlAnswer(request.LoginAnswer{}, err)
		}
	case controlLogin:
		login := request.TokenLogin{Provider: r.uri}
		if len(r.pin) > 0 {
			if login.PIN, err = secret.From(r.pin); err != nil {
				c.out = append(c.out, msgExtensionFailure)
				c.server.Keyring.Refuse(c.caller, request.ActionLogin, err)
				return
			}
			defer login.PIN.Wipe()
		}
		var said request.LoginAnswer
		said, err = c.server.Keyring.Login(ctx, c.caller, login)
		answer = controlAnswer(said, err)
	case controlLogout:
		err = c.server.Keyring.Logout(ctx, c.caller, r.uri)
		answer = controlAnswer(request.LoginAnswer{}, err)
	}
	if errors.Is(err, agent.ErrNoControl) {
		c.out = append(c.out, msgExtensionFailure)
		return
	}
	c.out = append(c.out, msgExtensionResponse)
	c.out = appendString(c.out, extensionControl)
	c.out = appendString(c.out, answer)
}

func controlAnswer(said request.LoginAnswer, err error) []byte {
	a := ControlAnswer{LoginAnswer: said}
	if err != nil {
		a.Error = err.Error()
	}
	text, err := json.Marshal(a)
	if err != nil { // impossible: the answer has texts and booleans only
		return []byte("{}")
	}
	return text
}

var (
	// ErrNotOurs says that the agent at a socket is another program, or a version of this
	// program without the extension.
	ErrNotOurs = errors.New("another kind of agent answers there")
	// ErrControlRefused says that the agent does not let this process ask. The agent's log
	// says why.
	ErrControlRefused = errors.New("the agent does not answer such questions over a forwarded connection, or to another user")
)

// A ControlError says what is wrong with a question. A running agent sends it.
type ControlError string

func (e ControlError) Error() string { return string(e) }

// A Control is a connection to a running agent of this program. One goroutine uses it at a time.
// When the ctx of a method ends, the method and the connection end.
type Control struct{ conn net.Conn }

// DialControl connects to the agent that listens at path. It fails when the agent runs as another
// user: only an agent of this user may get a PIN.
func DialControl(ctx context.Context, path string) (*Control, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return nil, errno // without the path, which the caller names
	}
	if err != nil {
		return nil, err
	}
	uid, err := owner(conn.(*net.UnixConn))
	if err == nil && uid != os.Geteuid() {
		err = fmt.Errorf("the agent runs as another user (uid %d)", uid)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &Control{conn}, nil
}

// Close ends the connection.
func (c *Control) Close() error { return c.conn.Close() }

// Status returns the status in JSON, without a member "error", of the tokens that the URI selects.
// An empty URI selects everything.
func (c *Control) Status(ctx context.Context, uri string) ([]byte, error) {
	text, err := c.ask(ctx, controlMessage(controlStatus, uri), nil, nil)
	var a ControlAnswer
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err == nil && a.Error != "" {
		err = ControlError(a.Error)
	}
	return text, err
}

// Login logs in to the token that the URI names. With an empty PIN, the person types the PIN on the
// reader, or the agent gets it as for a signature: from its configuration, or from a person with
// pinentry. The PIN stays the caller's.
func (c *Control) Login(ctx context.Context, uri string, pin *secret.Secret) (ControlAnswer, error) {
	head := binary.BigEndian.AppendUint32(controlMessage(controlLogin, uri), uint32(pin.Len()))
	return c.done(ctx, head, pin, []byte{0})
}

// Logout logs out of the tokens that the URI selects. An empty URI selects all tokens.
func (c *Control) Logout(ctx context.Context, uri string) (ControlAnswer, error) {
	return c.done(ctx, controlMessage(controlLogout, uri), nil, nil)
}

// Lock locks the agent with the passphrase, which stays the caller's. It returns whether the agent
// is locked now. The agent does not say why it refuses.
func (c *Control) Lock(ctx context.Context, phrase *secret.Secret) (bool, error) {
	return c.lock(ctx, msgLock, phrase)
}

// Unlock unlocks the agent with the passphrase, as Lock locks it.
func (c *Control) Unlock(ctx context.Context, phrase *secret.Secret) (bool, error) {
	return c.lock(ctx, msgUnlock, phrase)
}

func (c *Control) lock(ctx context.Context, message byte, phrase *secret.Secret) (bool, error) {
	answer, err := c.exchange(ctx, binary.BigEndian.AppendUint32([]byte{message}, uint32(phrase.Len())), phrase, nil)
	if err != nil {
		return false, err
	}
	return answer[0] == msgSuccess, nil
}

func controlMessage(what, uri string) []byte {
	m := appendString([]byte{msgExtension}, extensionControl)
	return appendString(appendString(m, what), uri)
}

func (c *Control) done(ctx context.Context, head []byte, hidden *secret.Secret, tail []byte) (ControlAnswer, error) {
	var a ControlAnswer
	text, err := c.ask(ctx, head, hidden, tail)
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	return a, err
}

// ask returns the JSON of the agent's answer.
func (c *Control) ask(ctx context.Context, head []byte, hidden *secret.Secret, tail []byte) ([]byte, error) {
	answer, err := c.exchange(ctx, head, hidden, tail)
	if err != nil {
		return nil, err
	}
	in := reader{rest: answer}
	switch kind := in.byte(); kind {
	case msgFailure:
		return nil, ErrNotOurs
	case msgExtensionFailure:
		return nil, ErrControlRefused
	case msgExtensionResponse:
	default:
		return nil, fmt.Errorf("%w: its answer is of type %d", ErrNotOurs, kind)
	}
	name, text := in.bytes(), in.bytes()
	if in.end() != nil || string(name) != extensionControl {
		return nil, ErrNotOurs
	}
	return text, nil
}

// exchange sends a message in three parts, and returns the answer, which has at least one byte. It
// makes no copy of the secret part.
func (c *Control) exchange(ctx context.Context, head []byte, hidden *secret.Secret, tail []byte) (answer []byte, err error) {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() })
	defer func() {
		if !stop() {
			err = context.Cause(ctx)
		}
	}()
	size := binary.BigEndian.AppendUint32(nil, uint32(len(head)+hidden.Len()+len(tail)))
	out := net.Buffers{size, head, hidden.Bytes(), tail}
	if _, err := out.WriteTo(c.conn); err != nil {
		return nil, broken(err)
	}
	if _, err := io.ReadFull(c.conn, size); err != nil {
		return nil, broken(err)
	}
	n := binary.BigEndian.Uint32(size)
	if n == 0 || n > maxStatus {
		return nil, ErrNotOurs
	}
	// Memory grows with the bytes that arrive, not with the announced length.
	answer, err = io.ReadAll(io.LimitReader(c.conn, int64(n)))
	if err == nil && len(answer) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, broken(err)
	}
	return answer, nil
}
