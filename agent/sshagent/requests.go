package sshagent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/door"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// Message numbers (RFC 9987 section 8.1).
const (
	msgFailure                   = 5
	msgSuccess                   = 6
	msgRemoveAllRSA1             = 9 // of SSH protocol 1
	msgRequestIdentities         = 11
	msgIdentitiesAnswer          = 12
	msgSignRequest               = 13
	msgSignResponse              = 14
	msgAddIdentity               = 17
	msgRemoveIdentity            = 18
	msgRemoveAllIdentities       = 19
	msgAddSmartcardKey           = 20
	msgRemoveSmartcardKey        = 21
	msgLock                      = 22
	msgUnlock                    = 23
	msgAddIdentityConstraint     = 25
	msgAddSmartcardKeyConstraint = 26
	msgExtension                 = 27
	msgExtensionFailure          = 28
	msgExtensionResponse         = 29
)

// The extensions that a client may ask for, as query lists them.
const (
	extensionQuery       = "query"
	extensionSessionBind = "session-bind@openssh.com"
)

const (
	// maxAnswer and maxIdentities bound a list: see Listed.
	maxAnswer     = 256 << 10
	maxIdentities = 2048
	// maxQuoted bounds what a log line quotes of a client's message.
	maxQuoted = 64
)

var (
	errMalformed = errors.New("the message is cut short or has bytes left over")
	errNUL       = errors.New("a text in the message has a NUL byte in it")
)

// maxHead is the most bytes of a message that mayHoldSecret looks at.
const maxHead = 1 + 4 + len(extensionSessionBind)

// mayHoldSecret tells from the start of a message, its type first, whether the rest may hold a PIN,
// a private key or a passphrase. more is how many further bytes mayHoldSecret has to see before it
// can say no. It never asks for a byte that may belong to a secret. An unknown message may hold a
// secret.
func mayHoldSecret(head []byte) (secret bool, more int) {
	switch head[0] {
	case msgRequestIdentities, msgSignRequest, msgRemoveIdentity, msgRemoveAllIdentities, msgRemoveAllRSA1:
		return false, 0
	case msgExtension:
		if len(head) < 1+4 {
			return true, 1 + 4 - len(head)
		}
		n := binary.BigEndian.Uint32(head[1:])
		if n != uint32(len(extensionQuery)) && n != uint32(len(extensionSessionBind)) {
			return true, 0
		}
		if more := 1 + 4 + int(n) - len(head); more > 0 {
			return true, more
		}
		name := string(head[1+4:])
		return name != extensionQuery && name != extensionSessionBind, 0
	}
	return true, 0
}

// answer appends the answer to one message to c.out.
//
// A message that is cut short, or goes on after its last field, is refused. The connection goes on,
// as the frames around the message are in order. ssh-agent ignores bytes after the last field. No
// client is known to send any.
func (c *handler) answer(ctx context.Context, message []byte) {
	in := reader{rest: message[1:]}
	if message[0] != msgRequestIdentities {
		c.look()
	}
	emptied := c.emptied
	c.emptied = false
	switch message[0] {
	case msgRequestIdentities:
		c.list(ctx, in)
	case msgSignRequest:
		c.sign(ctx, in)
	case msgRemoveIdentity:
		key := in.bytes()
		if c.wellFormed(request.ActionRemove, in) {
			c.status(c.server.Keyring.Remove(ctx, c.caller, key))
		}
	case msgRemoveAllIdentities, msgRemoveAllRSA1:
		// ssh-agent does the same for both, and ssh-add -D sends one after the other.
		switch {
		case !c.wellFormed(request.ActionRemoveAll, in):
		case emptied && message[0] == msgRemoveAllRSA1:
			c.status(nil)
		default:
			err := c.server.Keyring.RemoveAll(ctx, c.caller)
			c.emptied = err == nil
			c.status(err)
		}
	case msgAddSmartcardKey, msgAddSmartcardKeyConstraint:
		c.token(ctx, request.ActionAdd, in, message[0] == msgAddSmartcardKeyConstraint, c.server.Keyring.AddToken)
	case msgRemoveSmartcardKey:
		c.token(ctx, request.ActionRemove, in, false, c.server.Keyring.RemoveToken)
	case msgAddIdentity, msgAddIdentityConstraint:
		c.add(ctx, message)
	case msgLock:
		c.lock(ctx, request.ActionLock, in, c.server.Keyring.Lock)
	case msgUnlock:
		c.lock(ctx, request.ActionUnlock, in, c.server.Keyring.Unlock)
	case msgExtension:
		c.extension(ctx, message)
	default:
		c.pass(ctx, message, fmt.Sprintf("message %d", message[0]))
	}
}

// pass has an upstream agent answer a message that this package does not know. what names the
// message.
func (c *handler) pass(ctx context.Context, message []byte, what string) {
	answer, err := c.server.Keyring.Pass(ctx, c.caller, message)
	switch {
	case errors.Is(err, agent.ErrNotPassed):
		c.fail("request refused", errors.New(what+" is not supported"))
	case err != nil:
		c.fail("request refused", fmt.Errorf("%s: %w", what, err))
	default:
		c.out = append(c.out, answer...)
	}
}

// fail answers that a request is refused, and logs why.
func (c *handler) fail(what string, reason error) {
	c.out = append(c.out, msgFailure)
	c.Refuse(what, reason)
}

// reject refuses a request without asking the keyring. The keyring records the refusal.
func (c *handler) reject(action request.Action, reason error) {
	c.out = append(c.out, msgFailure)
	c.server.Keyring.Refuse(c.caller, action, reason)
}

// wellFormed refuses a request that does not end with its last field.
func (c *handler) wellFormed(action request.Action, in reader) bool {
	if err := in.end(); err != nil {
		c.reject(action, err)
		return false
	}
	return true
}

// status answers a request that returns nothing (RFC 9987 section 5.1). The keyring has logged its
// error.
func (c *handler) status(err error) {
	if err != nil {
		c.out = append(c.out, msgFailure)
		return
	}
	c.out = append(c.out, msgSuccess)
}

// list answers SSH_AGENTC_REQUEST_IDENTITIES (RFC 9987 section 5.5).
func (c *handler) list(ctx context.Context, in reader) {
	if err := in.end(); err != nil {
		c.fail("refused to list keys", err)
		return
	}
	list, err := c.server.Keyring.List(ctx, c.caller)
	if err != nil {
		c.out = append(c.out, msgFailure)
		return
	}
	c.whole = list.Encoded(encodeList)
	if listed := listed(c.whole); listed < len(list.Identities) && c.server.cuts.isNew(listed, len(list.Identities)) {
		c.Log(slog.LevelWarn, "list of keys cut short", slog.Int("keys", len(list.Identities)), slog.Int("listed", listed),
			slog.String("reason", fmt.Sprintf("OpenSSH takes %d keys and %d KiB at the most", maxIdentities, maxAnswer>>10)),
			slog.String("next", "name the keys that you use in keys of the configuration"))
	}
}

// maxCuts bounds how many cut lists the log reports.
const maxCuts = 64

// cuts remembers which lists were cut short, so that the log reports each once.
type cuts struct {
	mu   sync.Mutex
	told map[[2]int]bool
}

// isNew tells whether the log has not yet reported a list of so many keys, of which so many were
// listed.
func (c *cuts) isNew(listed, keys int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.told[[2]int{listed, keys}] || len(c.told) == maxCuts {
		return false
	}
	if c.told == nil {
		c.told = make(map[[2]int]bool)
	}
	c.told[[2]int{listed, keys}] = true
	return true
}

// Listed tells which of the identities a client gets. OpenSSH takes messages of at most 256 KiB
// (MAX_AGENT_REPLY_LEN, authfd.c) and at most 2,048 identities (MAX_AGENT_IDENTITIES). If there are
// more, identities that the configuration or a client names come first, and then the others, in
// their order.
func Listed(identities []agent.Identity) []bool {
	shown := make([]bool, len(identities))
	n, size := 0, listHeader
	for _, named := range []bool{true, false} {
		for i, id := range identities {
			more := identitySize(id)
			if id.Named != named || n == maxIdentities || size+more > 4+maxAnswer {
				continue
			}
			shown[i] = true
			n, size = n+1, size+more
		}
	}
	return shown
}

// listHeader is the size of what an answer has before the identities: its length, its type, and
// their number.
const listHeader = 4 + 1 + 4

func identitySize(id agent.Identity) int {
	return 4 + len(id.Key.Marshal()) + 4 + len(listedComment(id))
}

// encodeList returns the answer with the identities, its length first, as far as clients can take
// it. If clients cannot take all identities, the named ones come first.
func encodeList(identities []agent.Identity) []byte {
	var chosen []agent.Identity
	shown := Listed(identities)
	if !slices.Contains(shown, false) {
		chosen = identities
	} else {
		for _, named := range []bool{true, false} {
			for i, id := range identities {
				if shown[i] && id.Named == named {
					chosen = append(chosen, id)
				}
			}
		}
	}
	size := listHeader
	for _, id := range chosen {
		size += identitySize(id)
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, size), uint32(size-4))
	b = binary.BigEndian.AppendUint32(append(b, msgIdentitiesAnswer), uint32(len(chosen)))
	for _, id := range chosen {
		b = appendString(appendString(b, id.Key.Marshal()), listedComment(id))
	}
	return b
}

// listedComment returns the comment up to its first NUL. OpenSSH reads nothing of a list that has a
// NUL in a comment. The door and the configuration refuse such comments.
func listedComment(id agent.Identity) string {
	comment, _, _ := strings.Cut(id.Comment, "\x00")
	return comment
}

// listed returns how many identities an answer of encodeList has.
func listed(list []byte) int { return int(binary.BigEndian.Uint32(list[5:])) }

// sign answers SSH_AGENTC_SIGN_REQUEST (RFC 9987 section 5.6).
func (c *handler) sign(ctx context.Context, in reader) {
	r := request.Sign{Key: in.bytes(), Data: in.bytes(), Flags: request.SignatureFlags(in.uint32())}
	if !c.wellFormed(request.ActionSign, in) {
		return
	}
	if unknown := r.Flags &^ (request.SignatureRSASHA2256 | request.SignatureRSASHA2512); unknown != 0 {
		c.reject(request.ActionSign, fmt.Errorf("unknown signature flags %#x", uint32(unknown)))
		return
	}
	r.Content, r.Login = parseContent(r.Data, r.Key)
	sig, err := c.server.Keyring.Sign(ctx, c.caller, r)
	if err != nil {
		c.out = append(c.out, msgFailure)
		return
	}
	// string signature, which is in turn string format, string blob and, for
	// security keys, what comes after it (RFC 4253 section 6.6).
	c.out = append(c.out, msgSignResponse)
	c.out = binary.BigEndian.AppendUint32(c.out, uint32(4+len(sig.Format)+4+len(sig.Blob)+len(sig.Rest)))
	c.out = appendString(c.out, sig.Format)
	c.out = appendString(c.out, sig.Blob)
	c.out = append(c.out, sig.Rest...)
}

// lock answers SSH_AGENTC_LOCK and SSH_AGENTC_UNLOCK (RFC 9987 section 5.7).
func (c *handler) lock(ctx context.Context, action request.Action, in reader, do func(context.Context, *request.Caller, *secret.Secret) error) {
	text := in.bytes()
	if !c.wellFormed(action, in) {
		return
	}
	if len(text) > maxPIN {
		c.reject(action, fmt.Errorf("a passphrase of more than %d bytes", maxPIN))
		return
	}
	if err := c.Keep(door.Locked, door.LockedSize(len(text))); err != nil {
		c.reject(action, err)
		return
	}
	defer c.Release(door.Locked, door.LockedSize(len(text)))
	phrase, err := secret.From(text)
	if err != nil {
		c.reject(action, err)
		return
	}
	defer phrase.Wipe()
	c.status(do(ctx, c.caller, phrase))
}

// token answers the smart card requests (RFC 9987 sections 5.2.6 and 5.4).
func (c *handler) token(ctx context.Context, action request.Action, in reader, constrained bool,
	do func(context.Context, *request.Caller, request.Token) error,
) {
	provider, pin := in.bytes(), in.bytes()
	switch {
	case len(provider) > maxURI:
		c.reject(action, fmt.Errorf("a URI or path of %d bytes: the limit is %d", len(provider), maxURI))
		return
	case len(pin) > maxPIN:
		c.reject(action, fmt.Errorf("a PIN of more than %d bytes", maxPIN))
		return
	}
	r := request.Token{Provider: provider}
	if constrained {
		constraints, err := parseConstraints(&in, true)
		if err != nil {
			c.reject(action, err)
			return
		}
		r.Constraints = constraints
		size := constraints.Size()
		if err := c.Keep(door.Memory, size); err != nil {
			c.reject(action, err)
			return
		}
		defer c.Release(door.Memory, size)
	}
	if !c.wellFormed(action, in) {
		return
	}
	// Both are C strings to every other agent, which would read up to the NUL only.
	if bytes.IndexByte(provider, 0) >= 0 || bytes.IndexByte(pin, 0) >= 0 {
		c.reject(action, errNUL)
		return
	}
	if len(pin) > 0 {
		err := c.Keep(door.Locked, door.LockedSize(len(pin)))
		if err != nil {
			c.reject(action, err)
			return
		}
		defer c.Release(door.Locked, door.LockedSize(len(pin)))
		if r.PIN, err = secret.From(pin); err != nil {
			c.reject(action, err)
			return
		}
		defer r.PIN.Wipe()
	}
	c.status(do(ctx, c.caller, r))
}

// extension answers SSH_AGENTC_EXTENSION (RFC 9987 section 5.8). An unknown extension gets the
// answer of an unknown message. A known extension that fails gets an answer of its own.
func (c *handler) extension(ctx context.Context, message []byte) {
	in := reader{rest: message[1:]}
	name := in.bytes()
	if in.failed {
		c.fail("extension refused", errMalformed)
		return
	}
	switch string(name) {
	case extensionQuery:
		if err := in.end(); err != nil {
			c.out = append(c.out, msgExtensionFailure)
			c.Refuse("extension query refused", err)
			return
		}
		// RFC 9987 section 5.8.1 and ssh-agent since OpenSSH 10.3: the answer
		// repeats the name of the extension, and the names follow without a count.
		c.out = append(c.out, msgExtensionResponse)
		for _, text := range [...]string{extensionQuery, extensionQuery, extensionSessionBind} {
			c.out = appendString(c.out, text)
		}
		if agent.MayControl(c.caller) == nil {
			c.out = appendString(c.out, extensionControl)
		}
	case extensionSessionBind:
		if err := c.bind(in, message); err != nil {
			c.out = append(c.out, msgExtensionFailure)
			c.Refuse("session not bound", err)
			return
		}
		c.out = append(c.out, msgSuccess)
	case extensionControl:
		c.control(ctx, in)
	default:
		c.pass(ctx, message, "extension "+plain.Quoted(name, maxQuoted))
	}
}

const (
	maxBinds     = 16  // for each connection, as ssh-agent
	maxSessionID = 128 // bytes, as ssh-agent; the longest in use has 64

	// maxBind bounds the message of a bind: a host key, and a signature of the longest
	// RSA key.
	maxBind = maxHostKey + 4<<10
	// maxBound bounds what the binds of one connection keep (agent.Bind.Size). A bind
	// with a plain host key keeps about 1 KiB. A bind with a certificate of RSA keys of
	// 4096 bits keeps about 8 KiB.
	maxBound = 64 << 10
)

// The longest keys that the door reads, in bytes. A certificate of RSA keys of 4096 bits
// has 2 KiB. ssh reads lines with public keys of up to 16 KiB (SSH_MAX_PUBKEY_BYTES in
// OpenSSH's ssh.h).
const (
	maxHostKey     = 8 << 10
	maxCertificate = 16 << 10
	// maxOptions bounds critical options and extensions. OpenSSH knows a dozen.
	maxOptions = 256
)

// bind records that the connection belongs to an SSH session, if the host key has signed the
// session's identifier (OpenSSH's PROTOCOL.agent section 1). The rules are those of ssh-agent:
//
//   - A connection that is bound for logging in is not bound again.
//   - A session is bound to one key. Binding it to that key again changes nothing.
//   - One host may have several sessions.
//
// The connection remembers a failure until it ends.
func (c *handler) bind(in reader, message []byte) error {
	var bind request.Bind
	err := fmt.Errorf("a bind of %d bytes: the limit is %d", len(message), maxBind)
	if len(message) <= maxBind {
		bind, err = parseBind(in)
	}
	if err == nil {
		err = c.mayBind(bind)
	}
	if err == nil {
		if c.server.KeepBinds {
			bind.Message = bytes.Clone(message)
		}
		err = c.keepBind(bind)
	}
	caller := *c.caller
	switch {
	case errors.Is(err, errAlreadyBound):
		return nil
	case err != nil:
		caller.BindFailed = true
	default:
		caller.Binds = append(slices.Clone(caller.Binds), bind)
	}
	caller.Forwarded = caller.Forwarded || caller.BindFailed || bind.Forwarding
	c.caller = &caller
	return err
}

var errAlreadyBound = errors.New("the session is bound already")

func (c *handler) mayBind(bind request.Bind) error {
	for _, b := range c.caller.Binds {
		switch {
		case !b.Forwarding:
			return errors.New("the connection is bound to a session for logging in already")
		case !bytes.Equal(b.SessionID, bind.SessionID):
		case bytes.Equal(b.HostKey.Marshal(), bind.HostKey.Marshal()):
			return errAlreadyBound
		default:
			return errors.New("the session is bound to another host key already")
		}
	}
	if len(c.caller.Binds) >= maxBinds {
		return fmt.Errorf("the connection is bound to %d sessions already, which is the limit", maxBinds)
	}
	return nil
}

// keepBind counts the memory that the connection keeps for a bind.
func (c *handler) keepBind(bind request.Bind) error {
	size := bind.Size()
	if c.bound+size > maxBound {
		return fmt.Errorf("the binds of the connection would keep %d bytes, and the limit is %d", c.bound+size, maxBound)
	}
	if err := c.Keep(door.Memory, size); err != nil {
		return err
	}
	c.bound += size
	return nil
}

// parseBind reads and verifies a bind. The bind shares no memory with the message.
func parseBind(in reader) (request.Bind, error) {
	blob, id, signature, forwarding := in.bytes(), in.bytes(), in.bytes(), in.bool()
	if err := in.end(); err != nil {
		return request.Bind{}, err
	}
	if len(id) == 0 || len(id) > maxSessionID {
		return request.Bind{}, fmt.Errorf("session identifier of %d bytes", len(id))
	}
	key, err := parseKey(blob, maxHostKey)
	if err != nil {
		return request.Bind{}, err
	}
	sig := reader{rest: signature}
	format, value := sig.bytes(), sig.bytes()
	if sig.failed {
		return request.Bind{}, errMalformed
	}
	if err := sshkey.Verify(key, id, &ssh.Signature{Format: string(format), Blob: value, Rest: sig.rest}); err != nil {
		return request.Bind{}, fmt.Errorf("the host key %s has not signed the session", ssh.FingerprintSHA256(key))
	}
	return request.Bind{HostKey: key, SessionID: bytes.Clone(id), Forwarding: forwarding}, nil
}

// parseKey reads a public key of at most limit bytes. It refuses a key that OpenSSH does not read.
// The key shares no memory with blob, and the error quotes little of blob.
func parseKey(blob []byte, limit int) (ssh.PublicKey, error) {
	if len(blob) > limit {
		return nil, fmt.Errorf("a key of %d bytes: the limit is %d", len(blob), limit)
	}
	key, err := ssh.ParsePublicKey(bytes.Clone(blob))
	if err != nil {
		kind := reader{rest: blob}
		return nil, fmt.Errorf("a key of type %s cannot be read", plain.Quoted(kind.bytes(), maxQuoted))
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		if options := len(cert.CriticalOptions) + len(cert.Extensions); options > maxOptions {
			return nil, fmt.Errorf("a certificate with %d options: the limit is %d", options, maxOptions)
		}
	}
	if err := sshkey.Readable(key); err != nil {
		return nil, err
	}
	return key, nil
}

// A reader takes the fields of a message one by one (RFC 4251 section 5). The fields share the
// memory of the message. When a field is missing, reader sets failed, and every further field is
// empty.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) take(n uint32) []byte {
	if r.failed || uint64(n) > uint64(len(r.rest)) {
		r.failed, r.rest = true, nil
		return nil
	}
	field := r.rest[:n:n]
	r.rest = r.rest[n:]
	return field
}

func (r *reader) byte() byte {
	if field := r.take(1); field != nil {
		return field[0]
	}
	return 0
}

func (r *reader) bool() bool { return r.byte() != 0 }

func (r *reader) uint32() uint32 {
	if field := r.take(4); field != nil {
		return binary.BigEndian.Uint32(field)
	}
	return 0
}

func (r *reader) bytes() []byte { return r.take(r.uint32()) }

// end returns an error if a field was missing or bytes follow.
func (r *reader) end() error {
	if r.failed || len(r.rest) > 0 {
		return errMalformed
	}
	return nil
}

func appendString[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}
