package sshagent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/secret"
)

// frameSeeds are whole conversations, as a client would write them.
func frameSeeds(t testing.TB) [][]byte {
	t.Helper()
	h := newHost(t)
	key := h.PublicKey().Marshal()
	return [][]byte{
		{},
		framed(message(11)),
		framed(message(13, key, "data", uint32(0)), message(13, key, "data", uint32(2)), message(13, key, "data", uint32(8))),
		framed(message(18, key), message(19)),
		framed(message(20, "pkcs11:", "1234"), message(21, "pkcs11:", "")),
		framed(message(26, "pkcs11:", "1234", raw{1, 0, 0, 0, 60, 2})),
		framed(message(26, "pkcs11:", "1234", destinationsOf(encodeDestination(encodeHop("", ""), encodeHop("me", "host", key, false))))),
		framed(message(26, "pkcs11:", "1234", certsOf(true, newCert(t).Marshal()))),
		framed(message(27, "query"), message(27, "unknown")),
		framed(h.bind(t, "session", true), h.bind(t, "another", false), h.bind(t, "too late", false)),
		framed(message(1), message(9), message(17, "x"), message(22, "x"), message(255)),
		framed(message(13, key, bytes.Repeat([]byte{'d'}, 2*bufferSize), uint32(0)), message(11)),
		{0, 0, 0, 0},
		{0, 4, 0, 1, 11},
		{0, 0, 0, 5, 11},
	}
}

// checking is a keyring that checks the promises of the door.
type checking struct {
	t   *testing.T
	n   int
	err error
}

func (k *checking) called(c *request.Caller) error {
	if c == nil || len(c.Binds) > maxBinds {
		k.t.Errorf("caller %+v", c)
	}
	if c.BindFailed && !c.Forwarded {
		k.t.Error("a failed bind passes for a local connection")
	}
	if k.n++; k.n%3 == 0 {
		return k.err
	}
	return nil
}

func (k *checking) List(_ context.Context, c *request.Caller) (*agent.Listing, error) {
	return &agent.Listing{Identities: []agent.Identity{{Key: fixed("KEY"), Comment: "name"}}}, k.called(c)
}

func (k *checking) Sign(_ context.Context, c *request.Caller, r request.Sign) (*ssh.Signature, error) {
	if r.Flags > 6 || r.Flags&1 != 0 {
		k.t.Errorf("flags %x", r.Flags)
	}
	return &ssh.Signature{Format: "alg", Blob: []byte("sig")}, k.called(c)
}

func (k *checking) AddToken(_ context.Context, c *request.Caller, r request.Token) error {
	if bytes.IndexByte(r.Provider, 0) >= 0 || bytes.IndexByte(r.PIN.Bytes(), 0) >= 0 {
		k.t.Error("NUL in a text")
	}
	return k.called(c)
}

func (k *checking) RemoveToken(ctx context.Context, c *request.Caller, r request.Token) error {
	if r.Constraints.Lifetime != 0 || r.Constraints.Confirm || r.Constraints.Destinations != nil || r.Constraints.Certificates != nil {
		k.t.Errorf("constraints %+v", r.Constraints)
	}
	return k.AddToken(ctx, c, r)
}

func (k *checking) Add(_ context.Context, c *request.Caller, r request.AddKey) error {
	if r.Private == nil || r.Public == nil || len(r.Comment) > maxComment {
		k.t.Errorf("half a key: %+v", r.Public)
	}
	return k.called(c)
}

func (k *checking) Lock(_ context.Context, c *request.Caller, _ *secret.Secret) error {
	return k.called(c)
}

func (k *checking) Unlock(_ context.Context, c *request.Caller, _ *secret.Secret) error {
	return k.called(c)
}

func (k *checking) Pass(_ context.Context, c *request.Caller, _ []byte) ([]byte, error) {
	if err := k.called(c); err != nil {
		return nil, err
	}
	return []byte{msgSuccess}, nil
}

func (k *checking) Status(_ context.Context, c *request.Caller, provider []byte) ([]byte, error) {
	if bytes.IndexByte(provider, 0) >= 0 || len(provider) > maxURI {
		k.t.Errorf("URI %q", provider)
	}
	return []byte("{}"), k.called(c)
}

func (k *checking) Login(ctx context.Context, c *request.Caller, r request.TokenLogin) (request.LoginAnswer, error) {
	if bytes.IndexByte(r.PIN.Bytes(), 0) >= 0 || r.PIN.Len() > maxPIN || r.PIN != nil && r.PIN.Len() == 0 {
		k.t.Error("a PIN that can be none")
	}
	_, err := k.Status(ctx, c, r.Provider)
	return request.LoginAnswer{}, err
}

func (k *checking) Logout(ctx context.Context, c *request.Caller, provider []byte) error {
	_, err := k.Status(ctx, c, provider)
	return err
}

func (k *checking) Refuse(_ *request.Caller, request request.Action, reason error) {
	if request == "" || reason == nil {
		k.t.Errorf("refused %q for %v", request, reason)
	}
}

func (k *checking) Remove(_ context.Context, c *request.Caller, _ []byte) error { return k.called(c) }

func (k *checking) RemoveAll(_ context.Context, c *request.Caller) error { return k.called(c) }

// FuzzFrames sends the bytes of whole connections. Every whole message gets a well-formed
// answer, in order, until the first bytes that cannot be a message. The memory in use is
// bounded by the sent bytes.
func FuzzFrames(f *testing.F) {
	seeds := frameSeeds(f)
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		f.Add(s, uint16(1<<15))
		f.Add(s, uint16(7))
	}
	f.Fuzz(func(t *testing.T, input []byte, chunk uint16) {
		want := 0
		for rest := input; len(rest) >= 4; want++ {
			n := binary.BigEndian.Uint32(rest)
			if n == 0 || n > maxFrame || int(n) > len(rest)-4 {
				break
			}
			rest = rest[4+n:]
		}
		var c *handler
		nc := &peeking{input: bytes.Clone(input), chunk: int(chunk) + 1}
		nc.looks = func(_, _ []byte) {
			if len(c.in.buf) > max(bufferSize, 2*len(input)) {
				t.Fatalf("buffer of %d bytes for %d", len(c.in.buf), len(input))
			}
		}
		log, book := newLog()
		c = testHandler(&Door{Keyring: &checking{t: t, err: errors.New("no")}, Log: log}, nc, peer.Peer{}, nil)
		c.Serve(t.Context())
		c.in.close()
		for i := range want {
			answer, err := readAnswer(&nc.out)
			if err != nil || len(answer) == 0 {
				t.Fatalf("answer %d of %d: %x, %v", i+1, want, answer, err)
			}
			switch answer[0] {
			case msgFailure, msgSuccess, msgExtensionFailure:
				if len(answer) != 1 {
					t.Errorf("answer %x", answer)
				}
			case msgIdentitiesAnswer, msgSignResponse, msgExtensionResponse:
			default:
				t.Errorf("answer %x", answer)
			}
		}
		if rest, err := io.ReadAll(&nc.out); len(rest) > 0 || err != nil {
			t.Errorf("%x after %d answers, %v", rest, want, err)
		}
		if n := len(book.String()); n > 1000*(want+1) {
			t.Errorf("%d bytes of log for %d messages", n, want)
		}
	})
}
