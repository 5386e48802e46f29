// Package usage counts what a key does, and decides which of its signatures to verify.
//
// The agent verifies each RSA signature: that is cheap, and a wrong one may reveal the private key (Boneh, DeMillo and
// Lipton). It verifies each signature of a card, because a person may pull the card in the middle. With other keys, a
// verification takes as long as a fast token takes to sign, and the server verifies the signature anyway. So the agent
// verifies each signature of a slow token. Of a fast token, it verifies the first and some more.
//
// Package operation verifies. The package does no I/O.
package usage

import (
	"sync"
	"sync/atomic"
	"time"

	"p11-agent/token/process"
)

const (
	// The agent verifies each signature that takes this long. A card takes longer, and so do a TPM and an HSM in the
	// network.
	slow = 250 * time.Microsecond
	// Verification takes at most one part in share of the time that a faster token takes for its signatures.
	share = 20
)

// A Usage counts the uses of one key or token. Methods may be called from any goroutine.
type Usage struct {
	signatures atomic.Uint64
	last       atomic.Int64 // nanoseconds since 1970; 0: never

	mu   sync.Mutex
	by   *process.Process // the process that made the last verified signature
	made time.Duration    // the time to make the signatures since, at least
	cost time.Duration    // the time of the last verification
}

// Signed notes a signature.
func (u *Usage) Signed(now time.Time) {
	u.signatures.Add(1)
	u.Used(now)
}

// Used notes a use that is no signature.
func (u *Usage) Used(now time.Time) { u.last.Store(now.UnixNano()) }

// Signatures returns the number of signatures.
func (u *Usage) Signatures() uint64 { return u.signatures.Load() }

// Last returns the time of the last use, or zero.
func (u *Usage) Last() time.Time {
	if n := u.last.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// Verify calls verify for a signature that a process took some time to make, unless the signature can be skipped.
// always means that none can. Verify returns the error of verify.
func (u *Usage) Verify(by *process.Process, took time.Duration, always bool, verify func() error) error {
	if !u.due(by, took) && !always {
		return nil
	}
	start := time.Now()
	if err := verify(); err != nil {
		return err
	}
	u.verified(by, time.Since(start))
	return nil
}

// due reports whether to verify a signature that took this long.
func (u *Usage) due(by *process.Process, took time.Duration) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.made += took
	return u.by != by || took >= slow || u.made >= share*u.cost
}

// verified notes a verification, and the time that it took.
func (u *Usage) verified(by *process.Process, cost time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.by, u.made, u.cost = by, 0, cost
}
