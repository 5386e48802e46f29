package tokentest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
)

const patience = proctest.Patience

// A Subject is a token that the suite is run on. When a test begins, the
// token has no login and has refused no PIN.
type Subject struct {
	Spec    token.ModuleSpec
	Command []string
	Token   string          // label
	PIN     string          // not to be found by chance in a log
	Keys    map[string]byte // ID of a key of each kind, such as P256
	// Decrypts and Derives are IDs of keys for that. 0: those of Keys do.
	Decrypts, Derives byte
	NoDerive          bool // the token says that its keys do not derive
	TPM               bool // without SHA-224; its module has no OAEP with a label
	// Wrong returns how many wrong PINs have reached the token; nil when it does
	// not tell.
	Wrong func() int
}

// Store opens a Store on modules and waits until they have been looked at. It is
// closed when the test ends, and then nothing may be left: no goroutine, no
// process and no open file. What it logs shows with the test, and may hold none
// of the secrets. RunAll looks for the files that tests of Parallel leave open.
func Store(t testing.TB, opts token.Options, secrets ...string) *token.Store {
	t.Helper()
	proctest.Mark(t)
	open := func() int { return proctest.Files(t, os.Getpid(), "pipe:", "socket:") }
	files, before := open(), proctest.CountOf(t, ofStore)
	var log logtest.Buffer
	var handler slog.Handler = slog.NewTextHandler(io.MultiWriter(t.Output(), &log), &slog.HandlerOptions{Level: slog.LevelDebug})
	if opts.Log != nil { // the test watches the log, too
		handler = slog.NewMultiHandler(handler, opts.Log.Handler())
	}
	opts.Log = slog.New(handler)
	s := token.Open(opts)
	t.Cleanup(func() {
		var pids []int
		for _, m := range s.Modules() {
			if m.PID != 0 {
				pids = append(pids, m.PID)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("process %d is left: %v", pid, err)
			}
		}
		Until(t, "every goroutine of the Store ends", func() bool { return proctest.CountOf(t, ofStore) <= before })
		if !parallel(t) {
			Until(t, "files that were opened are closed", func() bool { return open() <= files })
		}
		for _, text := range secrets {
			if strings.Contains(log.String(), text) {
				t.Error("the log holds a secret")
			}
		}
		if strings.Contains(log.String(), context.Canceled.Error()) {
			t.Error("the log calls the end of the Store a failure")
		}
	})
	Wait(t, s.Settled())
	return s
}

// parallels holds the names of the tests that run side by side.
var parallels sync.Map

// Parallel lets a test run at the same time as other tests of Parallel.
func Parallel(t *testing.T) {
	t.Helper()
	t.Parallel()
	parallels.Store(t.Name(), true)
}

// parallel reports whether a test, or a test that it is a part of, is one of Parallel.
func parallel(t testing.TB) bool {
	name := t.Name()
	for {
		if _, ok := parallels.Load(name); ok {
			return true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return false
		}
		name = name[:i]
	}
}

// RunAll calls run, which runs the tests of a package, and returns the exit code. RunAll fails if
// the tests leave pipes or sockets open.
func RunAll(run func() int) int {
	open := func() int {
		n, err := proctest.OpenFiles(os.Getpid(), "pipe:", "socket:")
		if err != nil {
			panic(err)
		}
		return n
	}
	before, code := open(), run()
	for end := time.Now().Add(patience); code == 0 && open() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			fmt.Fprintf(os.Stderr, "the tests have left %d pipes and sockets open\n", open()-before)
			return 1
		}
	}
	return code
}

// ofStore matches a goroutine that works for a Store.
func ofStore(g proctest.Goroutine) bool {
	return strings.Contains(g.Stack, proctest.Methods[token.Store]())
}

// waitForLogins waits until so many goroutines wait for a login.
func waitForLogins(t testing.TB, n int) {
	t.Helper()
	proctest.Until(t, fmt.Sprintf("%d requests wait for a login", n), func() bool {
		return proctest.CountOf(t, func(g proctest.Goroutine) bool { return g.Runs((*pin.State).Share) }) == n
	})
}

// Until waits until a condition holds that no event tells: see [proctest.Until].
func Until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	proctest.Until(t, what, condition)
}

// Wait waits until a channel is closed.
func Wait(t testing.TB, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal("nothing happened")
	}
}

// Keys waits until the keys of a Store are so many.
func Keys(t testing.TB, s *token.Store, n int) []*token.Key {
	t.Helper()
	for end := time.After(patience); ; {
		changed := s.Changed()
		keys := s.Keys()
		if len(keys) == n {
			return keys
		}
		select {
		case <-changed:
		case <-end:
			t.Fatalf("there are %d keys, not %d", len(keys), n)
		}
	}
}

// Key returns the key of a token with an ID.
func Key(t testing.TB, s *token.Store, label string, id byte) *token.Key {
	t.Helper()
	for _, k := range s.Keys() {
		if k.Token().Label == label && bytes.Equal(k.ID(), []byte{id}) {
			return k
		}
	}
	t.Fatalf("token %q shows no key %02x, but %v", label, id, s.Keys())
	return nil
}

// Sign makes a signature with a key, of SHA-256 where there is a hash, and checks
// it.
func Sign(ctx context.Context, k *token.Key) error {
	msg := []byte("sign me")
	hash := crypto.SHA256
	if _, ok := k.Public().(ed25519.PublicKey); ok {
		hash = 0
	}
	sig, err := k.SignMessageContext(ctx, msg, hash)
	if err != nil {
		return err
	}
	return verify(k.Public(), msg, hash, sig)
}

// verify checks a signature of a message.
func verify(pub crypto.PublicKey, msg []byte, opts crypto.SignerOpts, sig []byte) error {
	digest := msg
	if opts.HashFunc() != 0 {
		h := opts.HashFunc().New()
		_, _ = h.Write(msg)
		digest = h.Sum(nil)
	}
	ok := false
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		if pss, is := opts.(*rsa.PSSOptions); is {
			return rsa.VerifyPSS(pub, pss.Hash, digest, sig, pss)
		}
		return rsa.VerifyPKCS1v15(pub, opts.HashFunc(), digest, sig)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, digest, sig)
	}
	if !ok {
		return errors.New("the signature is wrong")
	}
	return nil
}

// Secret returns a PIN that is wiped when the test ends.
func Secret(t testing.TB, pin string) *secret.Secret {
	t.Helper()
	return secrettest.Of(t, pin)
}

// Run runs the suite that every token must pass. open returns the token for one
// test.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	tests := []struct {
		name string
		run  func(t *testing.T, s Subject)
	}{
		{"List", testList},
		{"Sign", testSign},
		{"TLS", testTLS},
		{"Refuses", testRefuses},
		{"WrongPIN", testWrongPIN},
		{"GivenPIN", testGivenPIN},
		{"Declined", testDeclined},
		{"PromptEndsWithLastWaiter", testPromptEnds},
		{"OnePromptForMany", testOnePrompt},
		{"Parallel", testParallel},
		{"LogoutAll", testLogoutAll},
		{"ProcessKilled", testKilled},
		{"ProcessKilledWhileSigning", testKilledWhileSigning},
		{"CloseWithRequests", testClose},
		{"OperateSigns", testOperateSigns},
		{"OperateDecrypts", testDecrypts},
		{"OperateDerives", testDerives},
		{"OperateRefuses", testOperateRefuses},
		{"OperateCancelled", testOperateCancelled},
		{"ProcessKilledWhileDecrypting", testKilledWhileDecrypting},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, open(t)) })
	}
}

// store opens a Store on the subject. Its log may hold neither the PIN nor the secrets.
func (s Subject) store(t *testing.T, p *Person, secrets ...string) *token.Store {
	t.Helper()
	opts := token.Options{Modules: []token.ModuleSpec{s.Spec}, Command: s.Command}
	if p != nil {
		opts.PINs = p
	}
	return Store(t, opts, append(secrets, s.PIN, s.wrongPIN())...)
}

func (s Subject) wrongPIN() string { return "x" + s.PIN }

// key returns a key that has no cost.
func (s Subject) key(t *testing.T, st *token.Store) *token.Key {
	t.Helper()
	return Key(t, st, s.Token, s.Keys[P256])
}

func testList(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	for kind, id := range s.Keys {
		k := Key(t, st, s.Token, id)
		u, err := pkcs11uri.Parse(k.URI())
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if !k.Matches(u) {
			t.Errorf("%s: its own URI does not match it: %s", kind, u)
		}
		if k.Unfit() != "" {
			t.Errorf("%s: %s", kind, k.Unfit())
		}
	}
	if err := st.Rescan(t.Context()); err != nil {
		t.Error(err)
	}
	if p.Prompts() > 0 {
		t.Error("a PIN was asked for")
	}
}

func testSign(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	msg := []byte("sign me")
	before := make(map[string]*token.Key)
	for kind, id := range s.Keys {
		before[kind] = Key(t, st, s.Token, id)
	}
	for kind, k := range before {
		opts := []crypto.SignerOpts{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512}
		switch k.Public().(type) {
		case ed25519.PublicKey:
			opts = []crypto.SignerOpts{crypto.Hash(0)}
		case *rsa.PublicKey:
			for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
				opts = append(opts, &rsa.PSSOptions{Hash: h, SaltLength: rsa.PSSSaltLengthEqualsHash},
					&rsa.PSSOptions{Hash: h, SaltLength: rsa.PSSSaltLengthAuto}, &rsa.PSSOptions{Hash: h, SaltLength: 20})
			}
		}
		for _, o := range opts {
			name := fmt.Sprintf("%s, %T %v", kind, o, o)
			if pss, ok := o.(*rsa.PSSOptions); ok {
				if _, err := k.SignMessageContext(t.Context(), msg, pss); err != nil && pss.SaltLength != pss.Hash.Size() &&
					pss.SaltLength != rsa.PSSSaltLengthEqualsHash && strings.Contains(err.Error(), "MECHANISM_PARAM_INVALID") {
					t.Logf("%s: the token does not take this salt: %v", name, err)
					continue
				}
			}
			sig, err := k.SignMessageContext(t.Context(), msg, o)
			if err == nil {
				err = verify(k.Public(), msg, o, sig)
			}
			if err != nil {
				t.Errorf("%s, the message: %v", name, err)
			}
			if sig, err = crypto.SignMessage(k, rand.Reader, msg, o); err == nil {
				err = verify(k.Public(), msg, o, sig)
			}
			if err != nil {
				t.Errorf("%s, as a crypto.MessageSigner: %v", name, err)
			}
			digest := msg
			if o.HashFunc() != 0 {
				h := o.HashFunc().New()
				_, _ = h.Write(msg)
				digest = h.Sum(nil)
			}
			if sig, err = k.SignContext(t.Context(), digest, o); err == nil {
				err = verify(k.Public(), msg, o, sig)
			}
			if err != nil {
				t.Errorf("%s, the digest: %v", name, err)
			}
		}
	}
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

func testTLS(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	for kind, id := range s.Keys {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			if err := handshake(Key(t, st, s.Token, id), version); err != nil {
				t.Errorf("%s, %s: %v", kind, tls.VersionName(version), err)
			}
		}
	}
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

// handshake has both a client and a server prove that they have the key, with a
// certificate that the key signs itself.
func handshake(k crypto.Signer, version uint16) error {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "token"}, DNSNames: []string{"token"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		return fmt.Errorf("make a certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	config := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: k, Leaf: cert}},
		RootCAs:      pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "token",
		MinVersion: version, MaxVersion: version,
	}
	c1, c2 := net.Pipe()
	defer c1.Close()
	defer c2.Close()
	server := make(chan error, 1)
	go func() {
		c := tls.Server(c1, config)
		err := c.Handshake()
		if err == nil {
			_, err = c.Write([]byte("done"))
		}
		if err != nil {
			_ = c1.Close()
		}
		server <- err
	}()
	c := tls.Client(c2, config)
	err = c.Handshake()
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 4))
	}
	if err != nil {
		_ = c2.Close()
	}
	return errors.Join(err, <-server)
}

func testRefuses(t *testing.T, s Subject) {
	st := s.store(t, nil)
	tests := []struct {
		name   string
		kind   string
		digest []byte
		opts   crypto.SignerOpts
	}{
		{"digest of another length", P256, make([]byte, 31), crypto.SHA256},
		{"RSA without a hash", RSA2048, make([]byte, 32), crypto.Hash(0)},
		{"ECDSA without a hash", P256, make([]byte, 32), crypto.Hash(0)},
		{"hash of another kind", RSA2048, make([]byte, 16), crypto.MD5},
		{"no hash at all", RSA2048, make([]byte, 16), crypto.Hash(99)},
		{"salt of negative length", RSA2048, make([]byte, 32), &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: -7}},
		{"Ed25519 of a digest", Ed25519, make([]byte, 64), crypto.SHA512},
		{"Ed25519 with a context", Ed25519, make([]byte, 64), &ed25519.Options{Context: "a"}},
	}
	for _, tt := range tests {
		if _, ok := s.Keys[tt.kind]; !ok {
			continue // a smart card may have no Ed25519
		}
		// Without an asker, the error comes before any PIN.
		_, err := Key(t, st, s.Token, s.Keys[tt.kind]).SignContext(t.Context(), tt.digest, tt.opts)
		if _, asked := errors.AsType[*pin.Error](err); err == nil || asked {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	_, err := s.key(t, st).SignContext(t.Context(), make([]byte, 32), crypto.SHA256)
	if e, ok := errors.AsType[*pin.Error](err); !ok || e.Tried {
		t.Errorf("without an asker: %v", err)
	}
}

func testWrongPIN(t *testing.T, s Subject) {
	p := &Person{PINs: []string{s.wrongPIN(), s.wrongPIN(), s.wrongPIN()}}
	st := s.store(t, p)
	before := 0
	if s.Wrong != nil {
		before = s.Wrong()
	}
	err := Sign(t.Context(), s.key(t, st))
	e, ok := errors.AsType[*pin.Error](err)
	if !ok || !e.Tried || e.Token != s.Token {
		t.Fatalf("after a wrong PIN: %v", err)
	}
	if strings.Contains(err.Error(), s.PIN) {
		t.Error("the error quotes the PIN")
	}
	// The second one is the same, and so is not tried.
	if n := p.Prompts(); n != 2 {
		t.Errorf("%d prompts, want 2", n)
	}
	if got := p.Problems(); got[0] != "" || got[1] == "" {
		t.Errorf("the prompts said %q", got)
	}
	if s.Wrong != nil {
		if n := s.Wrong() - before; n != 1 {
			t.Errorf("%d tries are gone, want 1", n)
		}
	}
	p.PINs = []string{s.PIN}
	if err := Sign(t.Context(), s.key(t, st)); err != nil {
		t.Errorf("after the right PIN: %v", err)
	}
	if n := len(p.Asked()); n != 2 {
		t.Errorf("%d dialogues, want 2", n)
	}
}

func testGivenPIN(t *testing.T, s Subject) {
	st := s.store(t, nil)
	keys := st.Keys()
	if _, err := st.Login(t.Context(), nil, keys, Secret(t, s.wrongPIN())); err == nil {
		t.Error("a wrong PIN logs in")
	} else if e, ok := errors.AsType[*pin.Error](err); !ok || !e.Tried {
		t.Errorf("a wrong PIN: %v", err)
	}
	if _, err := st.Login(t.Context(), nil, keys, Secret(t, s.PIN)); err != nil {
		t.Fatal(err)
	}
	if err := Sign(t.Context(), s.key(t, st)); err != nil {
		t.Error(err)
	}
}

func testDeclined(t *testing.T, s Subject) {
	st := s.store(t, &Person{})
	if err := Sign(t.Context(), s.key(t, st)); !errors.Is(err, pin.ErrCancelled) {
		t.Errorf("got %v", err)
	}
}

func testPromptEnds(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN, Wait: make(chan struct{})}
	st := s.store(t, p)
	k := s.key(t, st)
	var cancels []context.CancelFunc
	var ends []chan error
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		end := make(chan error, 1)
		go func() { end <- Sign(ctx, k) }()
		cancels, ends = append(cancels, cancel), append(ends, end)
	}
	p.Until(t, func() bool { return p.Prompts() == 1 })
	waitForLogins(t, len(cancels))
	for i := range cancels {
		if p.Open() != 1 {
			t.Errorf("after %d of %d have left, the prompt is closed", i, len(cancels))
		}
		cancels[i]()
		if err := <-ends[i]; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	p.Until(t, func() bool { return p.Open() == 0 })
	if n := len(p.Asked()); n != 1 {
		t.Errorf("%d dialogues, want 1", n)
	}
}

func testOnePrompt(t *testing.T, s Subject) {
	wait := make(chan struct{})
	p := &Person{PINs: []string{s.PIN}, Wait: wait}
	st := s.store(t, p)
	other, ok := s.Keys[Ed25519]
	if !ok {
		other = s.Keys[RSA2048]
	}
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			k := s.key(t, st)
			if i%2 == 1 {
				k = Key(t, st, s.Token, other)
			}
			if err := Sign(t.Context(), k); err != nil {
				t.Error(err)
			}
		})
	}
	p.Until(t, func() bool { return p.Prompts() == 1 })
	waitForLogins(t, 50)
	for _, k := range st.Keys() { // while the prompt is open
		if !strings.HasPrefix(k.URI(), "pkcs11:") {
			t.Error("no URI")
		}
	}
	close(wait)
	all.Wait()
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

func testParallel(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10 {
				if err := Sign(t.Context(), s.key(t, st)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if n := p.Prompts(); n != 1 {
		t.Errorf("%d prompts, want 1", n)
	}
}

func testLogoutAll(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	for want := 1; want <= 3; want++ {
		for range 2 {
			if err := Sign(t.Context(), s.key(t, st)); err != nil {
				t.Fatal(err)
			}
		}
		if n := p.Prompts(); n != want {
			t.Errorf("%d prompts, want %d", n, want)
		}
		if err := st.LogoutAll(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// kill kills the module process, as a crash would.
func kill(t *testing.T, st *token.Store) {
	t.Helper()
	pid := st.Modules()[0].PID
	if pid == 0 {
		return // it is about to be started
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatal(err)
	}
}

func testKilled(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	k := s.key(t, st)
	for want := 1; want <= 3; want++ {
		if err := Sign(t.Context(), k); err != nil {
			t.Fatalf("after %d kills: %v", want-1, err)
		}
		if n := p.Prompts(); n != want {
			t.Errorf("%d prompts, want %d", n, want)
		}
		kill(t, st)
	}
	// Before anybody is logged in, too.
	if err := Sign(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if err := st.LogoutAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	kill(t, st)
	if err := Sign(t.Context(), k); err != nil {
		t.Error(err)
	}
}

func testKilledWhileSigning(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN}
	st := s.store(t, p)
	k := s.key(t, st)
	if err := Sign(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	signed := make(chan struct{})
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				if err := Sign(t.Context(), k); err != nil {
					t.Error(err)
					return
				}
				select {
				case signed <- struct{}{}:
				case <-stop:
					return
				}
			}
		})
	}
	for range 20 {
		<-signed
	}
	kill(t, st)
	for range 20 {
		<-signed
	}
	close(stop)
	all.Wait()
	if n := p.Prompts(); n > 2 {
		t.Errorf("%d prompts, want no more than 2", n)
	}
}

func testClose(t *testing.T, s Subject) {
	p := &Person{Always: s.PIN, Wait: make(chan struct{})}
	st := s.store(t, p)
	ends := make(chan error)
	for _, id := range s.Keys {
		go func() { ends <- Sign(context.Background(), Key(t, st, s.Token, id)) }()
	}
	p.Until(t, func() bool { return p.Prompts() == 1 })
	if err := st.Close(); err != nil {
		t.Error(err)
	}
	if p.Open() != 0 {
		t.Error("the prompt outlives the Store")
	}
	for range s.Keys {
		if err := <-ends; !errors.Is(err, token.ErrClosed) {
			t.Errorf("a request that waited got %v", err)
		}
	}
	if err := Sign(context.Background(), st.Keys()[0]); !errors.Is(err, token.ErrClosed) {
		t.Errorf("a request after that got %v", err)
	}
	if err := st.Rescan(context.Background()); err != nil {
		t.Errorf("a look after that got %v", err)
	}
	if err := st.Close(); err != nil {
		t.Errorf("a second Close got %v", err)
	}
}
