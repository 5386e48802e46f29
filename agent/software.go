package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
)

// maxForwardedRSABits bounds the RSA keys that the keyring takes into memory from a
// forwarded client. A key of twice the size takes eight times as long to sign: a tenth of
// a second with 8192 bits, and a second with 16384. ssh-keygen makes keys of up to 16384
// bits, and a person may have one. A forwarded host needs none.
const maxForwardedRSABits = 8192

var errPrivate = errors.New("the private key is incomplete or wrong")

// newSoftwareKey checks a request and makes a key in memory of it. With an RSA key, that
// takes as long as a signature, and waits for a turn.
func (k *Keyring) newSoftwareKey(ctx context.Context, c *request.Caller, r request.AddKey, wire string) (*softwareKey, error) {
	if key, ok := r.Private.(*rsa.PrivateKey); ok {
		if err := k.prepareRSA(ctx, c, key); err != nil {
			return nil, err
		}
	}
	plain := sshkey.Plain(r.Public)
	pub, err := ssh.NewPublicKey(r.Private.Public())
	if err != nil || string(pub.Marshal()) != string(plain.Marshal()) {
		return nil, errors.New("its private and public halves do not belong together")
	}
	s := new(softwareKey)
	// A certificate is kept in its wire form alone: the parsed one is much larger.
	s.key, s.plain, s.ID = &wiredKey{pub, []byte(wire), r.Public.Type()}, pub, wire
	s.Comment, s.Fingerprint, s.PublicKey = r.Comment, k.fingerprint(pub), r.Private.Public()
	s.software, s.limits = r.Private, limitsOf(&r.Constraints, k.opts.Lifetime)
	s.kept = kept{
		size:      3*request.Overhead + 3*len(wire) + 2*len(r.Comment) + request.KeySize(pub) + privateSize(r.Private) + r.Constraints.Size(),
		forwarded: c.Forwarded,
	}
	return s, nil
}

// prepareRSA checks an RSA key, and computes the values that make its signatures fast.
func (k *Keyring) prepareRSA(ctx context.Context, c *request.Caller, key *rsa.PrivateKey) error {
	limit := sshkey.MaxRSABits
	if c.Forwarded {
		limit = maxForwardedRSABits
	}
	if bits := key.N.BitLen(); bits < sshkey.MinRSABits || bits > limit {
		return fmt.Errorf("an RSA key of %d bits: from %d to %d are taken here", bits, sshkey.MinRSABits, limit)
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
func (k *Keyring) signSoftware(ctx context.Context, c *request.Caller, key crypto.Signer, data []byte, hash crypto.SignerOpts) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, slow := key.(*rsa.PrivateKey); !slow {
		return crypto.SignMessage(key, rand.Reader, data, hash)
	}
	// The data is the door's memory, and may change when ctx ends.
	h := hash.HashFunc().New()
	h.Write(data)
	digest := h.Sum(nil)
	return compute(ctx, &k.computing, c, func() ([]byte, error) { return key.Sign(rand.Reader, digest, hash) })
}

// compute calls f when it is the turn of the caller's process. Nothing can interrupt f.
// When ctx ends, compute returns at once, and the turn lasts until f returns.
func compute(ctx context.Context, t *turns, c *request.Caller, f func() ([]byte, error)) ([]byte, error) {
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
		var o outcome
		defer func() {
			o.panicked = recover()
			release()
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

// turns share the processors out among the processes whose requests compute for long.
// Half of the processors compute, at least one: lists and signatures of tokens need the
// others. One request of each process computes or waits for a processor. So a request
// waits for one request of each other process, however many those have. An ssh that
// forwards the agent is one process. The zero value is ready to use, from any goroutine.
type turns struct {
	mu        sync.Mutex
	processes map[turnKey]*turn
	running   chan struct{} // has an element for each that computes
}

type turnKey struct {
	uid, pid int
	number   uint64 // of the connection, when the process is not known
}

// turn is the turn of a process.
type turn struct {
	users int           // requests that have it or wait for it
	taken chan struct{} // has an element while a request has it
}

// take waits for a turn, which lasts until release. The error is that of ctx.
func (t *turns) take(ctx context.Context, c *request.Caller) (release func(), err error) {
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
