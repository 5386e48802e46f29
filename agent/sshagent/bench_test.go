package sshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent"
	"p11-agent/agent/approval"
	"p11-agent/agent/door"
	"p11-agent/agent/door/doortest"
	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
)

// manyTokens has any number of keys whose signatures cost nothing.
type manyTokens struct {
	oneToken
	keys []request.Key
}

func (t *manyTokens) Keys() []request.Key { return t.keys }

// stillKey is a key of manyTokens.
type stillKey struct {
	oneToken
	uri       string
	signature []byte
}

func (k *stillKey) URI() string { return k.uri }

func (k *stillKey) SignMessageContext(ctx context.Context, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	_ = ctx.Done() // a key on a token calls it, too, while it waits
	return k.signature, nil
}

// stillKeyring returns a real keyring with keys whose signatures cost nothing, and the wire
// form of its last key.
func stillKeyring(tb testing.TB, log slog.Handler, number int) (*agent.Keyring, []byte) {
	tb.Helper()
	tokens := new(manyTokens)
	for i := range number {
		seed := make([]byte, ed25519.SeedSize)
		seed[0], seed[1] = byte(i), byte(i>>8)
		tokens.keys = append(tokens.keys, &stillKey{
			oneToken:  oneToken{ed25519.NewKeyFromSeed(seed)},
			uri:       fmt.Sprintf("pkcs11:model=SoftHSM%%20v2;manufacturer=SoftHSM%%20project;serial=9b8d2f5c1e0a7f43;token=work;id=%%%02x;object=ssh%d", i%256, i),
			signature: make([]byte, ed25519.SignatureSize),
		})
	}
	pub, err := ssh.NewPublicKey(tokens.keys[number-1].(*stillKey).Public())
	if err != nil {
		tb.Fatal(err)
	}
	return agent.NewKeyring(agent.Options{
		Tokens: tokens, Log: slog.New(log),
		Rules: agent.Rules{
			Name:     func(request.Key) string { return "" },
			Approval: func(request.Key) approval.Policy { return approval.Policy{} },
		},
	}), pub.Marshal()
}

// loginData and gitData return the most common data to sign, in the form of ssh and git.
func loginData(key []byte) []byte {
	host := makeSigners()[1].PublicKey().Marshal()
	return encode(make([]byte, 32), byte(msgUserauthRequest), "me", serviceConnection, methodHostbound, byte(1), "ssh-ed25519", key, host)
}

func gitData() []byte {
	return append([]byte(magicSignature), encode("git", "", "sha512", make([]byte, 64))...)
}

// connected returns the client's end of a served connection.
func connected(tb testing.TB, s *Door, p peer.Peer) net.Conn {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			tb.Fatal(err)
		}
		f.Close()
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c := testHandler(s, ends[1], p, nil)
		defer ends[1].Close()
		defer c.in.close()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c.Serve(ctx)
	}()
	tb.Cleanup(func() {
		ends[0].Close()
		<-ended
	})
	return ends[0]
}

// everyday is the most common client.
var everyday = peer.Peer{Known: true, PID: 4711, UID: 1000, Chain: []peer.Process{
	{PID: 4711, Name: "ssh"}, {PID: 4710, Name: "git"}, {PID: 4709, Name: "bash"}, {PID: 4708, Name: "tmux: server"},
}}

// roundTrip sends a request and reads the answer. It returns the type of the answer.
func roundTrip(conn io.ReadWriter, request, room []byte) (byte, error) {
	if _, err := conn.Write(request); err != nil {
		return 0, err
	}
	have, want := 0, 5
	for have < want {
		n, err := conn.Read(room[have:])
		if err != nil {
			return 0, err
		}
		if have += n; have >= 5 {
			want = 4 + int(room[1])<<16 + int(room[2])<<8 + int(room[3])
		}
	}
	return room[4], nil
}

// BenchmarkFrame measures the reading of a message that has arrived.
func BenchmarkFrame(b *testing.B) {
	_, key := stillKeyring(b, slog.DiscardHandler, 1)
	one := framed(message(msgSignRequest, key, loginData(key), uint32(0)))
	nc := &peeking{chunk: len(one), looks: func(_, _ []byte) {}}
	in := newFrames(nc, mayHoldSecret)
	defer in.close()
	input := bytes.Clone(one)
	b.ReportAllocs()
	for b.Loop() {
		nc.input = input[:copy(input, one)]
		if _, err := in.next(); err != nil {
			b.Fatal(err)
		}
		in.done()
	}
}

// BenchmarkContent measures parseContent.
func BenchmarkContent(b *testing.B) {
	_, key := stillKeyring(b, slog.DiscardHandler, 1)
	for _, test := range []struct {
		kind request.Kind
		data []byte
	}{
		{request.KindLogin, loginData(key)},
		{request.KindSignature, gitData()},
		{request.KindUnknown, bytes.Repeat([]byte("text "), 20)},
	} {
		b.Run(string(test.kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if content, _ := parseContent(test.data, key); content.Kind != test.kind {
					b.Fatal(content.Kind)
				}
			}
		})
	}
}

// BenchmarkConnection measures requests on a connection, with both ends of the socket. It
// measures the door with a keyring that does nothing. It also measures the door with a real
// keyring and without a token, with and without a log.
func BenchmarkConnection(b *testing.B) {
	idle := &still{fakeKeyring: newKeyring(), sig: ssh.Signature{Format: "ssh-ed25519", Blob: make([]byte, 64)}}
	unlogged, key := stillKeyring(b, slog.DiscardHandler, 2)
	logged, _ := stillKeyring(b, logtest.File(b), 2)
	for _, keyring := range []struct {
		name string
		Keyring
	}{{"door", idle}, {"unlogged", unlogged}, {"logged", logged}} {
		for _, request := range []struct {
			name    string
			message []byte
		}{
			{"git", framed(message(msgSignRequest, key, gitData(), uint32(0)))},
			{"login", framed(message(msgSignRequest, key, loginData(key), uint32(0)))},
		} {
			b.Run(keyring.name+"/"+request.name, func(b *testing.B) {
				conn, room := connected(b, &Door{Keyring: keyring}, everyday), make([]byte, 4096)
				b.ReportAllocs()
				for b.Loop() {
					if kind, err := roundTrip(conn, request.message, room); err != nil || kind != msgSignResponse {
						b.Fatalf("answer %d, %v", kind, err)
					}
				}
			})
		}
	}
}

// BenchmarkList measures a list on a connection, with both ends of the socket.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{2, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			keyring, _ := stillKeyring(b, slog.DiscardHandler, n)
			conn, room := connected(b, &Door{Keyring: keyring}, everyday), make([]byte, 4+maxFrame)
			request := framed(message(msgRequestIdentities))
			b.ReportAllocs()
			for b.Loop() {
				if kind, err := roundTrip(conn, request, room); err != nil || kind != msgIdentitiesAnswer {
					b.Fatalf("answer %d, %v", kind, err)
				}
			}
		})
	}
}

// BenchmarkConnect measures clients that connect for a single request.
func BenchmarkConnect(b *testing.B) {
	keyring, key := stillKeyring(b, slog.DiscardHandler, 2)
	l, err := door.Listen(filepath.Join(doortest.Dir(b), "s"))
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- (&Door{Keyring: keyring}).Serve(ctx, l, nil) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	}()
	for _, request := range []struct {
		name    string
		message []byte
		answer  byte
	}{
		{"list", framed(message(msgRequestIdentities)), msgIdentitiesAnswer},
		{"login", framed(message(msgSignRequest, key, loginData(key), uint32(0))), msgSignResponse},
	} {
		b.Run(request.name, func(b *testing.B) {
			room := make([]byte, 4096)
			b.ReportAllocs()
			for b.Loop() {
				conn, err := net.Dial("unix", l.Path())
				if err != nil {
					b.Fatal(err)
				}
				kind, err := roundTrip(conn, request.message, room)
				if err = errors.Join(err, conn.Close()); err != nil || kind != request.answer {
					b.Fatalf("answer %d, %v", kind, err)
				}
			}
		})
	}
}
