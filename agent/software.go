package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/crypto/ssh"
)

// The RSA keys that are kept in memory, in bits. A signature takes about eight times
// as long when the key is twice as long: a tenth of a second with 8192 bits, and a
// second with 16384. ssh-keygen makes no longer keys, and a person may have one. A
// host that the agent is forwarded to has no need of it.
const (
	minRSABits          = 1024
	maxRSABits          = 16384
	maxForwardedRSABits = 8192
)

var errPrivate = errors.New("the private key is incomplete or wrong")

// newSoftwareKey makes a key in memory of a request, which it checks. It computes for
// as long as a signature takes, so that it waits for its turn.
func (k *Keyring) newSoftwareKey(ctx context.Context, c *Caller, r KeyRequest, wire string) (*softwareKey, error) {
	if key, ok := r.Private.(*rsa.PrivateKey); ok {
		if err := k.prepareRSA(ctx, c, key); err != nil {
			return nil, err
		}
	}
	plain := plainOf(r.Public)
	pub, err := ssh.NewPublicKey(r.Private.Public())
	if err != nil || string(pub.Marshal()) != string(plain.Marshal()) {
		return nil, errors.New("its private and public halves do not belong together")
	}
	s := new(softwareKey)
	// Of a certificate only its wire form is used from now on.
	s.key, s.plain, s.wire = &wiredKey{pub, []byte(wire), r.Public.Type()}, pub, wire
	s.comment, s.fingerprint = r.Comment, k.fingerprint(pub)
	s.software, s.limits = r.Private, limitsOf(&r.Constraints, k.opts.Lifetime)
	s.kept = kept{
		size:      3*overhead + 3*len(wire) + 2*len(r.Comment) + keySize(pub) + privateSize(r.Private) + r.Constraints.Size(),
		forwarded: c.Forwarded,
	}
	return s, nil
}

// insertSoftwareLocked puts a key in memory into its place: a list has room for so
// many bytes (maxAnswer of the SSH door), so that the keys of forwarded clients come
// last.
func (k *Keyring) insertSoftwareLocked(s *softwareKey) {
	at := len(k.software)
	if !s.kept.forwarded {
		if i := slices.IndexFunc(k.software, func(o *softwareKey) bool { return o.kept.forwarded }); i >= 0 {
			at = i
		}
	}
	k.software = slices.Insert(k.software, at, s)
}

// prepareRSA checks an RSA key, and computes what makes its signatures fast.
func (k *Keyring) prepareRSA(ctx context.Context, c *Caller, key *rsa.PrivateKey) error {
	limit := maxRSABits
	if c.Forwarded {
		limit = maxForwardedRSABits
	}
	if bits := key.N.BitLen(); bits < minRSABits || bits > limit {
		return fmt.Errorf("an RSA key of %d bits: from %d to %d are taken here", bits, minRSABits, limit)
	}
	_, err := compute(ctx, &k.computing, c, func() ([]byte, error) {
		key.Precompute() // Validate does not do it again
		if key.Validate() != nil {
			return nil, errPrivate
		}
		return nil, nil
	})
	return err
}

// signSoftware signs with a key in memory.
func (k *Keyring) signSoftware(ctx context.Context, c *Caller, key crypto.Signer, data []byte, hash crypto.SignerOpts) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, slow := key.(*rsa.PrivateKey); !slow {
		return crypto.SignMessage(key, rand.Reader, data, hash)
	}
	// The data is the door's memory, which it takes back when ctx ends.
	h := hash.HashFunc().New()
	h.Write(data)
	digest := h.Sum(nil)
	return compute(ctx, &k.computing, c, func() ([]byte, error) { return key.Sign(rand.Reader, digest, hash) })
}

// compute calls f when it is the turn of the caller's process. f cannot be
// interrupted, so that it is left to itself when ctx ends: its turn is over when it has
// returned.
func compute(ctx context.Context, t *turns, c *Caller, f func() ([]byte, error)) ([]byte, error) {
	release, err := t.take(ctx, c)
	if err != nil {
		return nil, err
	}
	type outcome struct {
		value    []byte
		err      error
		panicked any
	}
	done := make(chan outcome, 1)
	go func() {
		defer release()
		var o outcome
		defer func() {
			o.panicked = recover()
			done <- o
		}()
		o.value, o.err = f()
	}()
	select {
	case o := <-done:
		if o.panicked != nil {
			panic(o.panicked) // it costs the connection and not the agent
		}
		return o.value, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// turns share the processors out among processes that want something computed that
// takes long. Half of the processors compute, at least one: lists and signatures of
// tokens need the others. Of each process, one request computes or waits for a
// processor. So it waits for one of each other process, however many requests those
// have. The ssh that forwards the agent is one process. The zero value is ready to use,
// from any goroutine.
type turns struct {
	mu        sync.Mutex
	processes map[turnKey]*turn
	running   chan struct{} // has an element for each that computes
}

type turnKey struct {
	uid, pid int
	number   uint64 // of the connection, when the process is not known
}

// turn is that of one process.
type turn struct {
	users int           // who has it or waits for it
	taken chan struct{} // has an element while somebody has it
}

// take waits for a turn, which lasts until release. The error is that of ctx.
func (t *turns) take(ctx context.Context, c *Caller) (release func(), err error) {
	key := turnKey{uid: c.Peer.UID, pid: c.Peer.PID}
	if key.pid == 0 {
		key.number = c.Number
	}
	t.mu.Lock()
	if t.processes == nil {
		t.processes = make(map[turnKey]*turn)
		t.running = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))
	}
	own := t.processes[key]
	if own == nil {
		own = &turn{taken: make(chan struct{}, 1)}
		t.processes[key] = own
	}
	own.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.users--; own.users == 0 {
			delete(t.processes, key)
		}
	}
	for _, queue := range []chan struct{}{own.taken, t.running} {
		select {
		case queue <- struct{}{}: // in the order in which they came
			continue
		case <-ctx.Done():
		}
		if queue == t.running {
			<-own.taken
		}
		leave()
		return nil, ctx.Err()
	}
	return func() {
		<-t.running
		<-own.taken
		leave()
	}, nil
}
