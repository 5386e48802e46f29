package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/big"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
)

// heap returns the live bytes of the heap.
func heap() int {
	runtime.GC()
	runtime.GC() // the second run empties each sync.Pool
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// reread returns a key as the door reads it, in memory of its own.
func reread(t *testing.T, key ssh.PublicKey) ssh.PublicKey {
	t.Helper()
	again, err := ssh.ParsePublicKey(key.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// fat fills a certificate with as many principals and options as the door takes.
func fat(c *ssh.Certificate) {
	c.KeyId = strings.Repeat("k", 4096)
	c.CriticalOptions, c.Extensions = make(map[string]string), make(map[string]string)
	for i := range 128 {
		c.ValidPrincipals = append(c.ValidPrincipals, "a", "b")
		c.CriticalOptions[fmt.Sprint("c", i)], c.Extensions[fmt.Sprint("e", i)] = "", ""
	}
}

func first[T any](all iter.Seq[T]) T {
	next, stop := iter.Pull(all)
	defer stop()
	v, _ := next()
	return v
}

// The counted size of a thing is at least the memory that it takes.
func TestSizes(t *testing.T) {
	const many = 50
	k, ca := keytest.New(t), keytest.New(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaPublic, err := ssh.NewPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := k.Certificate(t, ca, ssh.HostCert, fat)
	for _, test := range []struct {
		name string
		make func() (thing any, size int)
	}{
		{"bind", func() (any, int) {
			b := &request.Bind{HostKey: reread(t, k.Public), SessionID: make([]byte, 64), Message: make([]byte, 300)}
			return b, b.Size()
		}},
		{"bind with RSA", func() (any, int) {
			b := &request.Bind{HostKey: reread(t, rsaPublic), SessionID: make([]byte, 64)}
			return b, b.Size()
		}},
		{"bind with a certificate", func() (any, int) {
			b := &request.Bind{HostKey: reread(t, cert), SessionID: make([]byte, 64), Message: make([]byte, 10000)}
			return b, b.Size()
		}},
		{"destinations", func() (any, int) {
			c := &request.Constraints{}
			for range 50 {
				d := to(strings.Clone("user"), reread(t, k.Public), reread(t, rsaPublic))
				c.Destinations = append(c.Destinations, d)
			}
			return c, c.Size()
		}},
		{"certificates", func() (any, int) {
			c := &request.Constraints{}
			for range 5 {
				c.Certificates = append(c.Certificates, reread(t, cert).(*ssh.Certificate))
			}
			return c, c.Size()
		}},
		{"key in memory", func() (any, int) {
			f := newFixture(Options{SoftwareKeys: true})
			own := keytest.New(t)
			r := request.AddKey{Private: own.Private, Public: reread(t, own.Public), Comment: strings.Repeat("c", 4096)}
			s, err := f.newSoftwareKey(t.Context(), local, r, string(own.Public.Marshal()))
			if err != nil {
				t.Fatal(err)
			}
			return s, s.kept.size
		}},
		{"certified key in memory", func() (any, int) {
			f := newFixture(Options{SoftwareKeys: true})
			own := reread(t, cert)
			s, err := f.newSoftwareKey(t.Context(), local, request.AddKey{Private: k.Private, Public: own}, string(own.Marshal()))
			if err != nil {
				t.Fatal(err)
			}
			return s, s.kept.size
		}},
		{"RSA key in memory", func() (any, int) {
			f := newFixture(Options{SoftwareKeys: true})
			own := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Set(rsaKey.N), E: rsaKey.E}, D: new(big.Int).Set(rsaKey.D)}
			for _, p := range rsaKey.Primes {
				own.Primes = append(own.Primes, new(big.Int).Set(p))
			}
			s, err := f.newSoftwareKey(t.Context(), local, request.AddKey{Private: own, Public: reread(t, rsaPublic)}, string(rsaPublic.Marshal()))
			if err != nil {
				t.Fatal(err)
			}
			return s, s.kept.size
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.make() // makes the things that all calls share
			things, size := make([]any, many), 0
			before := heap()
			for i := range things {
				things[i], size = test.make()
			}
			each := (heap() - before) / many
			t.Logf("it takes %d bytes and counts as %d", each, size)
			if each > size {
				t.Errorf("it takes %d bytes and counts as %d", each, size)
			}
			runtime.KeepAlive(things)
		})
	}
}

// A client adds keys with large certificates for as long as it can.
func TestAttack08Keys(t *testing.T) {
	ca := keytest.New(t)
	f := newFixture(Options{SoftwareKeys: true})
	add := func(c *request.Caller) error {
		k := keytest.New(t)
		cert := k.Certificate(t, ca, ssh.UserCert, fat)
		return f.Add(t.Context(), c, request.AddKey{Private: k.Private, Public: cert, Comment: "file"})
	}
	fill := func(c *request.Caller) error {
		for {
			if err := add(c); err != nil {
				return err
			}
		}
	}
	if err := fill(forwarded); !errors.Is(err, errTooMany) || !strings.Contains(err.Error(), "over a forwarded connection") {
		t.Errorf("forwarded: %v", err)
	}
	software := f.software.kept
	if software.size > maxForwardedBytes || software.size < maxForwardedBytes/2 {
		t.Errorf("%d bytes are kept for forwarded clients, and the limit is %d", software.size, maxForwardedBytes)
	}
	// The person's own are shown first.
	if err := add(local); err != nil {
		t.Fatalf("a local client finds no room: %v", err)
	}
	if list, err := f.List(t.Context(), local); err != nil || string(list.Identities[0].Key.Marshal()) != first(f.software.all()).ID || first(f.software.all()).kept.forwarded {
		t.Errorf("the key of the local client is not the first: %v", err)
	}
	if err := fill(local); !errors.Is(err, errTooMany) || !strings.Contains(err.Error(), "ssh-add -d") {
		t.Errorf("local: %v", err)
	}
	if software = f.software.kept; software.size > maxKeptBytes {
		t.Errorf("%d bytes are kept, and the limit is %d", software.size, maxKeptBytes)
	}
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	if err := add(forwarded); err != nil {
		t.Errorf("after all were removed: %v", err)
	}
}

func TestMayKeep(t *testing.T) {
	for name, test := range map[string]struct {
		kept       kept
		own, other budget
		fail       string
	}{
		"the last":                      {kept{size: 1}, budget{count: 2}, budget{}, ""},
		"one more":                      {kept{size: 1}, budget{count: 3}, budget{}, "2 are kept"},
		"the last byte":                 {kept{size: 1}, budget{size: maxKeptBytes - 1}, budget{size: 1}, ""},
		"one more byte":                 {kept{size: 1}, budget{size: maxKeptBytes}, budget{size: 1}, "KiB"},
		"local, with much forwarded":    {kept{size: 1}, budget{forwardedCount: 9, forwardedSize: 2 * maxForwardedBytes}, budget{}, ""},
		"the last that is forwarded":    {kept{size: 1, forwarded: true}, budget{forwardedCount: 1}, budget{}, ""},
		"one more that is forwarded":    {kept{size: 1, forwarded: true}, budget{forwardedCount: 2}, budget{}, "forwarded connection: 1"},
		"a byte more that is forwarded": {kept{size: 1, forwarded: true}, budget{forwardedSize: maxForwardedBytes}, budget{forwardedSize: 1}, "KiB"},
	} {
		t.Run(name, func(t *testing.T) {
			err := mayKeep(test.kept, test.own, test.other, 2, 1)
			if (err == nil) != (test.fail == "") || err != nil && (!errors.Is(err, errTooMany) || !strings.Contains(err.Error(), test.fail)) {
				t.Errorf("got %v, want %q", err, test.fail)
			}
		})
	}
	b := budget{count: 2, size: 10, forwardedCount: 1, forwardedSize: 6}
	if got, want := b.replaced(&kept{6, true}, kept{5, false}), (budget{count: 2, size: 9}); got != want {
		t.Errorf("one in place of another: %+v, want %+v", got, want)
	}
}

// A client adds a key of a token with ever new certificates and removes them.
func TestAttack08Removed(t *testing.T) {
	k, ca := keytest.New(t), keytest.New(t)
	token := &fakeKey{Signer: k.Private, uri: "pkcs11:token=a", insertions: 1}
	f := newFixture(Options{}, token)
	cert := k.Certificate(t, ca, ssh.UserCert, nil)
	for serial := range uint64(maxHidden) {
		old := *cert
		old.Serial = serial + 2
		f.hidden[string(old.Marshal())] = 1
	}
	f.add(t, token.uri, request.Constraints{Certificates: []*ssh.Certificate{cert}})
	f.hidden[string(cert.Marshal())] = 1 // that of an addition that is there
	if err := f.Remove(t.Context(), local, k.Public.Marshal()); err != nil {
		t.Fatal(err)
	}
	f.wantList(t) // neither comes back
	if n := len(f.hidden); n != 2 {
		t.Errorf("%d removed identities are remembered", n)
	}
}

func TestRSASizes(t *testing.T) {
	number := func(bits uint) *big.Int { return new(big.Int).SetBit(big.NewInt(1), int(bits-1), 1) }
	f := newFixture(Options{SoftwareKeys: true})
	for _, test := range []struct {
		bits   uint
		caller *request.Caller
		fail   string
	}{
		{1023, local, "bits"},
		{1024, local, "incomplete or wrong"},
		{16384, local, "incomplete or wrong"},
		{16385, local, "bits"},
		{8192, forwarded, "incomplete or wrong"},
		{8193, forwarded, "from 1024 to 8192"},
	} {
		key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: number(test.bits), E: 65537}, D: big.NewInt(3), Primes: []*big.Int{big.NewInt(3), big.NewInt(5)}}
		pub, err := ssh.NewPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Add(t.Context(), test.caller, request.AddKey{Private: key, Public: pub}); err == nil || !strings.Contains(err.Error(), test.fail) {
			t.Errorf("%d bits: %v, want %q", test.bits, err, test.fail)
		}
	}
}

// A process has many requests. The request of another process still waits for only one of
// them.
func TestAttack13Turns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const second = time.Second // of one computation
		defer func(n int) { runtime.GOMAXPROCS(n) }(runtime.GOMAXPROCS(2))
		var turns turns
		work := func(ctx context.Context, c *request.Caller) error {
			_, err := compute(ctx, &turns, c, func() ([]byte, error) { time.Sleep(second); return nil, nil })
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 100)
		for range cap(gone) {
			go func() { gone <- work(ctx, forwarded) }()
		}
		synctest.Wait()
		began := time.Now()
		if err := work(t.Context(), local); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 2*second {
			t.Errorf("another process waited for %v", took)
		}
		if len(gone) > 2 {
			t.Errorf("%d requests were done before it", len(gone))
		}
		// Clients that hang up, and an agent that stops, wait for no computation.
		synctest.Wait()
		began = time.Now()
		cancel()
		for range cap(gone) {
			<-gone
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("the end was waited for for %v", took)
		}
		// The running computation keeps its turn until it ends.
		if err := work(t.Context(), local); err != nil || time.Since(began) < second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		time.Sleep(second)
		synctest.Wait()
		turns.mu.Lock()
		defer turns.mu.Unlock()
		if n := len(turns.processes); n > 0 {
			t.Errorf("%d processes are remembered", n)
		}
	})
}

// A panic in a computation ends the connection only.
func TestComputePanics(t *testing.T) {
	var turns turns
	defer func() {
		if recover() == nil {
			t.Error("the panic is lost")
		}
		if len(turns.processes) > 0 || len(turns.running) > 0 {
			t.Error("the turn has not ended")
		}
	}()
	_, _ = compute(t.Context(), &turns, local, func() ([]byte, error) { panic("wrong") })
}

func TestSignatureOfClientThatIsGone(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := new(Keyring).signSoftware(ctx, local, key, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// BenchmarkAdd adds keys to an agent.
func BenchmarkAdd(b *testing.B) {
	for _, n := range []int{500, 1000, 2000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			requests := make([]request.AddKey, n)
			for i := range requests {
				requests[i] = addKey(keytest.New(b), request.Constraints{})
			}
			for b.Loop() {
				f := newFixture(Options{SoftwareKeys: true})
				f.Keyring.log = slog.New(slog.DiscardHandler)
				for _, r := range requests {
					if err := f.Add(b.Context(), local, r); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
