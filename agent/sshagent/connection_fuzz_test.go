package sshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"testing"

	"p11-agent/agent"
	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// oneToken is a token with one key, for a real keyring.
type oneToken struct{ key ed25519.PrivateKey }

func (t *oneToken) Public() crypto.PublicKey { return t.key.Public() }
func (*oneToken) URI() string                { return "pkcs11:token=one;id=%01" }
func (*oneToken) Unfit() string              { return "" }
func (*oneToken) Insertions() uint64         { return 1 }
func (*oneToken) AsksPIN() bool              { return false }
func (*oneToken) Present() bool              { return true }
func (*oneToken) TokenName() string          { return "one" }
func (*oneToken) Away() []request.Key        { return nil }
func (*oneToken) Changed() <-chan struct{}   { return nil }

func (t *oneToken) SignMessageContext(_ context.Context, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return t.key.Sign(nil, msg, opts)
}

func (t *oneToken) Keys() []request.Key { return []request.Key{t} }
func (*oneToken) Generation() uint64    { return 1 }

func (*oneToken) Settled() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func (*oneToken) Poke()                           {}
func (*oneToken) Rescan(context.Context) error    { return nil }
func (*oneToken) Drop(request.Selection)          {}
func (*oneToken) LogoutAll(context.Context) error { return nil }

func (*oneToken) LogoutOf(context.Context, func([]request.Key) bool) error { return nil }

func (t *oneToken) Login(_ context.Context, s request.Selection, pin *secret.Secret) (request.LoginAnswer, error) {
	if !s.Match(t) {
		return request.LoginAnswer{}, errors.New("no match")
	}
	return request.LoginAnswer{Already: pin == nil}, nil
}

func (t *oneToken) Logout(_ context.Context, s request.Selection) error {
	if !s.Match(t) {
		return errors.New("no match")
	}
	return nil
}

// selected is a Selection: the beginning of the key's URI.
type selected string

func (s selected) String() string           { return string(s) }
func (s selected) Match(k request.Key) bool { return strings.HasPrefix(k.URI(), string(s)) }
func (s selected) Broad() bool              { return true }
func (s selected) All() bool                { return s == "pkcs11:" }

func (*oneToken) Parse(provider []byte, _ bool) (request.Selection, error) {
	if !bytes.HasPrefix(provider, []byte("pkcs11:")) {
		return nil, errors.New("not allowed")
	}
	return selected(provider), nil
}

func (t *oneToken) Select(_ context.Context, s request.Selection, _ func(request.Key) bool, _ *secret.Secret) (keys []request.Key, taken bool, err error) {
	if !s.Match(t) {
		return nil, false, errors.New("no match")
	}
	return t.Keys(), false, nil
}

// agrees says yes to every second question.
type agrees struct{ n int }

func (a *agrees) Confirm(context.Context, approval.Question) (approval.Answer, error) {
	a.n++
	return approval.Answer{Allowed: a.n%2 == 0}, nil
}

// connectionSeeds are whole connections.
func connectionSeeds(t testing.TB) (all [][]byte) {
	t.Helper()
	key := oneToken{ed25519.NewKeyFromSeed(make([]byte, 32))}
	pub := makeSigners()[0].PublicKey().Marshal()
	own := encode("ssh-ed25519", []byte(key.key[32:]))
	soft := []any{"ssh-ed25519", []byte(key.key[32:]), []byte(key.key), "soft"}
	limit := destinationsOf(encodeDestination(encodeHop("", ""), encodeHop("m*", "host", pub, false)))
	login := encode("session", byte(50), "me", "ssh-connection", "publickey", byte(1), "ssh-ed25519", own)
	list := message(msgRequestIdentities)
	sign := message(msgSignRequest, own, login, uint32(0))
	all = append(all,
		framed(list, sign, message(msgRemoveAllIdentities), list),
		framed(message(msgAddSmartcardKeyConstraint, "pkcs11:", "1234", byte(2)), sign, sign, message(msgRemoveSmartcardKey, "pkcs11:", "")),
		framed(message(msgLock, "a"), list, message(msgUnlock, "a"), list),
		framed(message(msgAddIdentity, soft...), sign, message(msgRemoveIdentity, own), list),
		framed(message(msgAddIdentityConstraint, append(soft, limit)...), list, sign, message(msgExtension, extensionSessionBind, pub, "session", "sig", false), list, sign),
		framed(message(msgExtension, extensionQuery), message(240)),
		framed(message(msgExtension, extensionControl, "status", ""), sign, message(msgExtension, extensionControl, "status", "pkcs11:")),
		framed(message(msgExtension, extensionControl, "login", "pkcs11:", "1234", false), sign, message(msgExtension, extensionControl, "logout", "")),
		framed(message(msgExtension, extensionControl, "login", "pkcs11:", "", true), message(msgLock, "a"), message(msgExtension, extensionControl, "status", "")),
	)
	for _, m := range addMessages(t) {
		if len(m) < 1500 {
			all = append(all, framed(m, list))
		}
	}
	return all
}

// ourselves returns a client that runs this program.
func ourselves(t testing.TB) peer.Peer {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return peer.Peer{
		Known: true, PID: os.Getpid(), UID: os.Geteuid(),
		Chain: []peer.Process{{PID: os.Getpid(), Name: "p11-agent"}}, Program: peer.Program{Path: path},
	}
}

// FuzzConnection sends the bytes of whole connections to a real keyring with a token. Each
// whole message gets an answer, no code panics, and a connection costs little memory.
func FuzzConnection(f *testing.F) {
	for _, s := range connectionSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 1<<16 {
			return
		}
		// A wrong passphrase waits. This test does not want to wait.
		want, unlocks := 0, 0
		for rest := input; len(rest) >= 5; want++ {
			n := binary.BigEndian.Uint32(rest)
			if n == 0 || n > maxFrame || int(n) > len(rest)-4 {
				break
			}
			if rest[4] == msgUnlock {
				unlocks++
			}
			rest = rest[4+n:]
		}
		if unlocks > 2 {
			return
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		keyring := agent.NewKeyring(agent.Options{
			Tokens:  &oneToken{ed25519.NewKeyFromSeed(make([]byte, 32))},
			Rules:   agent.Rules{Name: func(request.Key) string { return "" }},
			Confirm: new(agrees), SoftwareKeys: true, RemoteTokens: true, Log: slog.New(slog.DiscardHandler),
			Report: func(s agent.Status, _ request.Selection) ([]byte, error) { return []byte(fmt.Sprint(s)), nil },
		})
		nc := &peeking{input: bytes.Clone(input), chunk: 1 << 15, looks: func(_, _ []byte) {}}
		c := testHandler(&Door{Keyring: keyring}, nc, ourselves(t), nil)
		c.Serve(t.Context())
		c.in.close()
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
			t.Errorf("%d bytes of messages took %d bytes of memory", len(input), used)
		}
		answers := 0
		for out := bytes.NewReader(nc.out.Bytes()); ; answers++ {
			if _, err := readAnswer(out); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("answer %d: %v", answers, err)
				}
				break
			}
		}
		if answers != want {
			t.Errorf("%d answers to %d messages", answers, want)
		}
	})
}
