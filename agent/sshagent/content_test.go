package sshagent

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

// A dataRecorder is a key that notes the data to sign, before any hash.
type dataRecorder struct {
	*ecdsa.PrivateKey
	signed [][]byte
}

func newDataRecorder(t testing.TB) *dataRecorder {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &dataRecorder{PrivateKey: key}
}

// SignMessage makes it a crypto.MessageSigner, which TLS and X.509 prefer.
func (r *dataRecorder) SignMessage(rand io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	r.signed = append(r.signed, bytes.Clone(msg))
	w := opts.HashFunc().New()
	w.Write(msg)
	return r.PrivateKey.Sign(rand, w.Sum(nil), opts)
}

// sshDataRecorder is a dataRecorder for SSH.
type sshDataRecorder struct {
	ssh.Signer
	*dataRecorder
}

func (r sshDataRecorder) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	r.signed = append(r.signed, bytes.Clone(data))
	return r.Signer.Sign(rand, data)
}

func (r *dataRecorder) ssh(t testing.TB) sshDataRecorder {
	t.Helper()
	s, err := ssh.NewSignerFromKey(r.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return sshDataRecorder{s, r}
}

func (r *dataRecorder) last(t testing.TB) []byte {
	t.Helper()
	if len(r.signed) == 0 {
		t.Fatal("nothing was signed")
	}
	return r.signed[len(r.signed)-1]
}

// handshake makes a TLS connection. Both ends sign with the key.
func handshake(t testing.TB, r *dataRecorder, version uint16) {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"here"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, r.Public(), r.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: r}},
		MinVersion:   version, MaxVersion: version, ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true,
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	failed := make(chan error, 1)
	go func() { failed <- tls.Server(a, config).Handshake() }()
	if err := tls.Client(b, config).Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

// exchange makes an SSH connection. The server signs with its host key.
func exchange(t testing.TB, r *dataRecorder) {
	t.Helper()
	server := &ssh.ServerConfig{NoClientAuth: true}
	server.AddHostKey(r.ssh(t))
	// Both ends speak first, for which a net.Pipe has no room.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		a, err := l.Accept()
		if err != nil {
			return
		}
		defer a.Close()
		if c, _, _, err := ssh.NewServerConn(a, server); err == nil {
			c.Close()
		}
	}()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c, _, _, err := ssh.NewClientConn(b, "here", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	<-done
}

func sshsig(namespace, algorithm string, digest []byte) []byte {
	data := []byte(magicSignature)
	for _, field := range []string{namespace, "", algorithm, string(digest)} {
		data = appendString(data, field)
	}
	return data
}

func sudoRequest(user string, key []byte) []byte {
	data := appendString(nil, "session")
	data = append(data, msgTrustRequest)
	for _, field := range []string{user, serviceSudo, methodPublicKey} {
		data = appendString(data, field)
	}
	return appendString(appendString(append(data, 1), "ecdsa-sha2-nistp256"), key)
}

// contentSamples returns data that real programs sign.
func contentSamples(t testing.TB) (samples map[string][]byte, key []byte) {
	t.Helper()
	r := newDataRecorder(t)
	signer := r.ssh(t)
	key = signer.PublicKey().Marshal()
	samples = make(map[string][]byte)

	handshake(t, r, tls.VersionTLS13)
	samples["TLS 1.3, client"], samples["TLS 1.3, server"] = r.signed[len(r.signed)-1], r.signed[len(r.signed)-2]
	handshake(t, r, tls.VersionTLS12)
	samples["TLS 1.2, client"], samples["TLS 1.2, server"] = r.signed[len(r.signed)-1], r.signed[len(r.signed)-2]
	exchange(t, r)
	samples["exchange hash"] = r.last(t)

	cert := &ssh.Certificate{Key: signer.PublicKey(), KeyId: "joe", CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	samples["OpenSSH certificate"] = r.last(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "here"}}
	if _, err := x509.CreateCertificate(rand.Reader, template, template, r.Public(), r); err != nil {
		t.Fatal(err)
	}
	samples["X.509 certificate"] = r.last(t)
	if _, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), r); err != nil {
		t.Fatal(err)
	}
	samples["X.509 request"] = r.last(t)

	digest := sha512.Sum512([]byte("file"))
	samples["git"] = sshsig("git", "sha512", digest[:])
	samples["file"] = sshsig("file", "sha256", digest[:32])
	samples["another namespace"] = sshsig("mail@example.org", "sha512", digest[:])
	samples["sudo"] = sudoRequest("joe", key)
	samples["host key proof"] = appendString(appendString(appendString(nil, hostKeysProve), digest[:32]), key)
	samples["revoked keys"] = []byte(magicKRL + "\x00\x00\x00\x01")
	return samples, key
}

func TestContent(t *testing.T) {
	samples, key := contentSamples(t)
	for name, want := range map[string]request.Content{
		"TLS 1.3, client":     {Kind: request.KindTLS},
		"TLS 1.3, server":     {Kind: request.KindTLS},
		"TLS 1.2, client":     {Kind: request.KindTLS},
		"TLS 1.2, server":     {Kind: request.KindTLS},
		"exchange hash":       {Kind: request.KindHostKey},
		"host key proof":      {Kind: request.KindHostKey},
		"OpenSSH certificate": {Kind: request.KindSSHCertificate, Detail: "joe"},
		"X.509 certificate":   {Kind: request.KindX509},
		"X.509 request":       {Kind: request.KindX509},
		"git":                 {Kind: request.KindSignature, Namespace: "git"},
		"file":                {Kind: request.KindSignature, Namespace: "file"},
		"another namespace":   {Kind: request.KindSignature, Namespace: "mail@example.org"},
		"sudo":                {Kind: request.KindSudo, Detail: "user joe"},
		"revoked keys":        {Kind: request.KindKRL},
	} {
		t.Run(name, func(t *testing.T) {
			got, login := parseContent(samples[name], key)
			if got != want || login != nil {
				t.Errorf("%+v (login %v), want %+v", got, login, want)
			}
			// Data that is cut short or goes on is of another kind. The test leaves
			// out kinds without a length of their own.
			switch want.Kind {
			case request.KindHostKey, request.KindKRL:
				return
			}
			for what, data := range map[string][]byte{
				"one byte less": samples[name][:len(samples[name])-1],
				"one byte more": append(bytes.Clone(samples[name]), 0),
			} {
				if got, _ := parseContent(data, key); got.Kind != request.KindUnknown {
					t.Errorf("%s: %+v, want unknown data", what, got)
				}
			}
		})
	}
}

func TestUnknownContent(t *testing.T) {
	_, key := contentSamples(t)
	digest := make([]byte, 64)
	for name, data := range map[string][]byte{
		"nothing":                   nil,
		"text":                      []byte("sign me"),
		"signature, no namespace":   sshsig("", "sha512", digest),
		"signature, other hash":     sshsig("git", "sha1", digest[:20]),
		"signature, short digest":   sshsig("git", "sha512", digest[:32]),
		"sudo with another key":     sudoRequest("joe", []byte("another")),
		"proof of another host key": appendString(appendString(appendString(nil, hostKeysProve), digest), "another"),
		"proof for no session":      appendString(appendString(appendString(nil, hostKeysProve), "session"), key),
		"certificate of no type":    appendString(nil, "ssh-strange-cert-v01@openssh.com"),
		"two ASN.1 sequences":       {0x30, 0, 0x30, 0},
		"signature, NUL inside":     sshsig("git\x00", "sha512", digest),
		"signature, long namespace": sshsig(strings.Repeat("n", maxNamespace+1), "sha512", digest),
	} {
		if got, login := parseContent(data, key); got.Kind != request.KindUnknown || login != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// The agent knows the data that ssh-add -T signs by its length alone. The data says nothing
// else, so the keyring decides by the client.
func TestTestContent(t *testing.T) {
	samples, key := contentSamples(t)
	random := make([]byte, testSize)
	rand.Read(random)
	for name, test := range map[string]struct {
		data []byte
		want request.Kind
	}{
		"random":    {random, request.KindTest},
		"zeros":     {make([]byte, testSize), request.KindTest},
		"too short": {random[1:], request.KindUnknown},
		"too long":  {append(bytes.Clone(random), 0), request.KindUnknown},
		// Data of this length may be of another kind.
		"X.509":        {append([]byte{0x30, 0x82, 0x03, 0xfc, 2, 1, 0, 2, 1, 0, 4, 0x82, 0x03, 0xf2}, make([]byte, 1010)...), request.KindX509},
		"revoked keys": {append(bytes.Clone(samples["revoked keys"]), make([]byte, testSize-len(samples["revoked keys"]))...), request.KindKRL},
	} {
		if got, _ := parseContent(test.data, key); got.Kind != test.want {
			t.Errorf("%s, %d bytes: %q, want %q", name, len(test.data), got.Kind, test.want)
		}
	}
}

// FuzzContent checks that parseContent gives the same answer for the same data, and that
// the text of the answer is printable and short.
func FuzzContent(f *testing.F) {
	samples, key := contentSamples(f)
	if len(samples) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range samples {
		f.Add(s, key)
	}
	f.Fuzz(func(t *testing.T, data, key []byte) {
		content, login := parseContent(data, key)
		if (content.Kind == request.KindLogin) != (login != nil) {
			t.Errorf("%+v with login %v", content, login)
		}
		if again, _ := parseContent(bytes.Clone(data), key); again != content {
			t.Errorf("%+v, and then %+v", content, again)
		}
		text := content.String()
		if len(text) > 600 {
			t.Errorf("a name of %d bytes", len(text))
		}
		for _, r := range text {
			if r < ' ' || r == 0x7f {
				t.Errorf("control character in %q", text)
			}
		}
	})
}
