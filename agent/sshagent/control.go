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

// extensionControl is our own extension: what p11-agent's commands ask of a running
// agent. Its request is
//
//	byte    SSH_AGENTC_EXTENSION
//	string  "control-v1@p11-agent"
//	string  what is wanted: "status", "login" or "logout"
//	string  the URI that names tokens; empty: all, but with "login"
//
// and with "login" there follow
//
//	string  the PIN; empty: from where a signature would get it
//	boolean reserved
//
// The boolean counts for nothing. It once said that the person at the client wants the
// last try used, which no client can be believed: the agent asks by itself.
//
// The answer to what may be asked is
//
//	byte    SSH_AGENT_EXTENSION_RESPONSE
//	string  "control-v1@p11-agent"
//	string  JSON: the status, or a ControlAnswer
//
// and SSH_AGENT_EXTENSION_FAILURE to what may not. It is never passed on to an
// upstream agent, which would take it for a question of this program's.
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
	// maxStatus bounds what a client takes for a status.
	maxStatus = 64 << 20
)

// A ControlAnswer tells what came of a login or logout.
type ControlAnswer struct {
	request.LoginAnswer
	Error string // empty: it was done
}

// controlRequest is a request as it came; all of it lies in the message.
type controlRequest struct {
	what     string
	uri, pin []byte
}

// parseControl reads what follows the extension's name.
func parseControl(in reader) (controlRequest, error) {
	r := controlRequest{what: string(in.bytes()), uri: in.bytes()}
	switch r.what {
	case controlStatus, controlLogout:
	case controlLogin:
		r.pin = in.bytes()
		in.bool()
	default:
		return controlRequest{}, errors.New("the login is not known: it is of another version")
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
	if err != nil { // it has nothing but texts and booleans
		return []byte("{}")
	}
	return text
}

var (
	// ErrNotOurs says that the agent at a socket is none of this program, or of a
	// version before it could be asked.
	ErrNotOurs = errors.New("it is another kind of agent")
	// ErrControlRefused says that it does not let this process ask: its log says why.
	ErrControlRefused = errors.New("it does not answer such questions over a forwarded connection, or to another user")
)

// A ControlError is what a running agent says is wrong with a question.
type ControlError string

func (e ControlError) Error() string { return string(e) }

// A Control is a connection to a running agent of this program. It is used by one
// goroutine at a time. What a method waits for ends with its ctx, and then the
// connection does, too.
type Control struct{ conn net.Conn }

// DialControl connects to the agent that listens at path. It fails when that is not
// an agent of this user: nobody else is to be given a PIN.
func DialControl(ctx context.Context, path string) (*Control, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return nil, errno // what is around it names the path, as the caller does
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

// Status returns the status in JSON, which has no member "error", of the tokens that the URI selects, or of
// everything when it is empty.
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

// Login logs in to the token that the URI names. An empty PIN is one that is
// typed on the reader, or that the agent gets as for a signature: from its
// configuration, or from a person with pinentry. The PIN stays the caller's.
func (c *Control) Login(ctx context.Context, uri string, pin *secret.Secret) (ControlAnswer, error) {
	head := binary.BigEndian.AppendUint32(controlMessage(controlLogin, uri), uint32(pin.Len()))
	return c.done(ctx, head, pin, []byte{0})
}

// Logout logs out of the tokens that the URI selects, or of all when it is empty.
func (c *Control) Logout(ctx context.Context, uri string) (ControlAnswer, error) {
	return c.done(ctx, controlMessage(controlLogout, uri), nil, nil)
}

// Lock locks the agent with the passphrase, which stays the caller's. It reports
// whether the agent has done so: it does not say why not.
func (c *Control) Lock(ctx context.Context, phrase *secret.Secret) (bool, error) {
	return c.lock(ctx, msgLock, phrase)
}

// Unlock unlocks it, as Lock locks it.
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

// ask returns the JSON that the agent answers with.
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

// exchange sends a message in three parts, of which the secret one is not copied,
// and returns the answer, of at least one byte.
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
	// Memory grows with what arrives, not with what is announced.
	answer, err = io.ReadAll(io.LimitReader(c.conn, int64(n)))
	if err == nil && len(answer) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, broken(err)
	}
	return answer, nil
}
