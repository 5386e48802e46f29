package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/certdir"
	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
)

// stillKey is a key whose signatures cost nothing. So a benchmark shows the cost of the
// keyring.
type stillKey struct {
	*fakeKey
	signature []byte
}

func (k *stillKey) SignMessageContext(ctx context.Context, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	_ = ctx.Done() // as a request that waits for a token does
	return k.signature, nil
}

// newStillKey makes a P-256 key with a URI as long as that of a real token.
func newStillKey(tb testing.TB, number int) *stillKey {
	tb.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	uri := fmt.Sprintf("pkcs11:model=SoftHSM%%20v2;manufacturer=SoftHSM%%20project;serial=9b8d2f5c1e0a7f43;token=work;id=%%%02x;object=ssh%d", number%256, number)
	key := &fakeKey{Signer: priv, uri: uri, insertions: 1}
	sig, err := key.SignMessageContext(tb.Context(), []byte("data"), crypto.SHA256)
	if err != nil {
		tb.Fatal(err)
	}
	return &stillKey{key, sig}
}

// stillKeyring returns a keyring in everyday configuration, with keys that cost nothing.
func stillKeyring(tb testing.TB, log slog.Handler, number int) (*Keyring, []request.Key) {
	tb.Helper()
	var keys []request.Key
	for i := range number {
		keys = append(keys, newStillKey(tb, i))
	}
	return NewKeyring(Options{
		Tokens: newFakeTokens(keys...),
		Rules: Rules{
			Name:     func(request.Key) string { return "" },
			Approval: func(request.Key) approval.Policy { return approval.Policy{} },
		},
		Log: slog.New(log),
	}), keys
}

var everyday = &request.Caller{Number: 1, Peer: peer.Peer{Known: true, PID: 4711, UID: 1000, Chain: []peer.Process{
	{PID: 4711, Name: "ssh"}, {PID: 4710, Name: "git"}, {PID: 4709, Name: "bash"}, {PID: 4708, Name: "tmux: server"},
}}}

// gitRequest and loginRequest are the most common requests.
func gitRequest(key request.Key) request.Sign {
	return request.Sign{Key: wireOf(key), Data: make([]byte, 100), Content: request.Content{Kind: request.KindSignature, Namespace: "git"}}
}

func loginRequest(key request.Key) request.Sign {
	return request.Sign{
		Key: wireOf(key), Data: make([]byte, 500), Content: request.Content{Kind: request.KindLogin},
		Login: &request.Login{User: "me", SessionID: make([]byte, 32), HostKey: wireOf(edKey("host"))},
	}
}

// BenchmarkSign measures the cost of a request without its signature. It has to be small
// beside a signature. It runs without a log, and with a log in a file.
func BenchmarkSign(b *testing.B) {
	for _, log := range []struct {
		name    string
		handler slog.Handler
	}{{"unlogged", slog.DiscardHandler}, {"logged", logtest.File(b)}} {
		k, keys := stillKeyring(b, log.handler, 2)
		for _, r := range []struct {
			name string
			request.Sign
		}{{"git", gitRequest(keys[1])}, {"login", loginRequest(keys[1])}} {
			b.Run(log.name+"/"+r.name, func(b *testing.B) {
				ctx, cancel := context.WithCancel(b.Context())
				defer cancel()
				b.ReportAllocs()
				for b.Loop() {
					if _, err := k.Sign(ctx, everyday, r.Sign); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkSignature measures the conversion of a signature.
func BenchmarkSignature(b *testing.B) {
	key := newStillKey(b, 1)
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := signature(pub, pub.Type(), key.signature); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkEnter measures lock.enter, by which a request ends when the agent is locked.
func BenchmarkEnter(b *testing.B) {
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	l := newLock()
	b.ReportAllocs()
	for b.Loop() {
		inside, err := l.enter(ctx, everyday, nil)
		if err != nil {
			b.Fatal(err)
		}
		_ = inside.Done()
		inside.leave()
	}
}

// BenchmarkEvent measures the event of a request, without and with its line in a log.
func BenchmarkEvent(b *testing.B) {
	for _, log := range []struct {
		name    string
		handler slog.Handler
	}{{"unlogged", slog.DiscardHandler}, {"logged", logtest.File(b)}} {
		b.Run(log.name, func(b *testing.B) {
			k, _ := stillKeyring(b, log.handler, 1)
			id := k.now().identities[0]
			b.ReportAllocs()
			for b.Loop() {
				rec := k.begin(everyday, request.ActionSign)
				rec.Use.Content = request.Content{Kind: request.KindSignature, Namespace: "git"}
				rec.About(&id.Target, &id.prefix)
				k.audit.End(rec, nil)
			}
		})
	}
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{2, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			k, _ := stillKeyring(b, slog.DiscardHandler, n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := k.List(b.Context(), everyday); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkView measures the first list after a change.
func BenchmarkView(b *testing.B) {
	for _, n := range []int{2, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			k, _ := stillKeyring(b, slog.DiscardHandler, n)
			b.ReportAllocs()
			for b.Loop() {
				k.change.Add(1)
				if len(k.now().list.Identities) != n {
					b.Fatal("keys are missing")
				}
			}
		})
	}
}

// BenchmarkCertificates measures the look for renewed certificates in each list.
func BenchmarkCertificates(b *testing.B) {
	dir := b.TempDir()
	ca := keytest.New(b)
	for i := range 10 {
		text := ssh.MarshalAuthorizedKey(keytest.New(b).Certificate(b, ca, ssh.UserCert, nil))
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d-cert.pub", i)), text, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	d := certdir.New(dir, slog.New(slog.DiscardHandler))
	b.ReportAllocs()
	for b.Loop() {
		d.Look()
	}
	if n := len(d.Certificates()); n != 10 {
		b.Fatalf("%d certificates", n)
	}
}
