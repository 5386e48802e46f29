package token

import (
	"crypto/rsa"
	"sync"
	"time"

	"p11-agent/token/operation"
	"p11-agent/token/process"
)

// A proof decides which signatures of a fast key to verify.
type proof struct {
	mu   sync.Mutex
	by   *process.Process // the process that made the last verified signature
	made time.Duration    // the time to make the signatures since, at least
	cost time.Duration    // the time of the last verification
}

const (
	// The agent verifies each signature that takes this long. A card takes longer, and so do a TPM
	// and an HSM in the network.
	slow = 250 * time.Microsecond
	// Verification takes at most one part in proofShare of the time that a faster token takes for
	// its signatures.
	proofShare = 20
)

// due reports whether to verify a signature that took this long.
func (v *proof) due(by *process.Process, took time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.made += took
	return v.by != by || took >= slow || v.made >= proofShare*v.cost
}

// given notes a verification, and the time that it took.
func (v *proof) given(by *process.Process, cost time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.by, v.made, v.cost = by, 0, cost
}

// check verifies a signature, unless it can be skipped. It verifies each RSA signature: that is
// cheap, and a wrong one may reveal the private key (Boneh, DeMillo and Lipton). It verifies each
// signature of a card, which can be pulled in the middle. With other keys, verification takes as
// long as a fast token takes to sign, and the server verifies the signature anyway. So check
// verifies each signature of a slow token, and of a fast token the first and some more.
//
// A plaintext or a derived secret cannot be verified with the public key.
func (k *Key) check(plan *operation.Plan, o outcome, result []byte) error {
	if plan.Function != operation.Sign {
		return nil
	}
	_, always := k.pair.Public.(*rsa.PublicKey)
	if !k.use.proof.due(o.by, o.took) && !always && !k.token.removable() {
		return nil
	}
	start := time.Now()
	if err := plan.Verify(result); err != nil {
		return err
	}
	k.use.proof.given(o.by, time.Since(start))
	return nil
}
