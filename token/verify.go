package token

import (
	"crypto/rsa"
	"sync"
	"time"

	"p11-agent/token/process"
	"p11-agent/token/signing"
)

// proof is when signatures of a key are verified that are verified now and then.
type proof struct {
	mu   sync.Mutex
	by   *process.Process // the last that was verified came from this one
	made time.Duration    // what those that have come since have taken to make, at least
	cost time.Duration    // what it took to verify the last one
}

const (
	// slow is what a signature takes at least that is verified in any case. A card
	// takes longer, and so do a TPM and an HSM in the network.
	slow = 250 * time.Microsecond
	// proofShare is what part of the time that a faster token takes for its signatures
	// goes into verifying them.
	proofShare = 20
)

// due tells whether a signature is to be verified, which has taken so long.
func (v *proof) due(by *process.Process, took time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.made += took
	return v.by != by || took >= slow || v.made >= proofShare*v.cost
}

// given notes that one was verified, and what that took.
func (v *proof) given(by *process.Process, cost time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.by, v.made, v.cost = by, 0, cost
}

// check verifies a signature, if it is its turn. It verifies each one of RSA: that is
// cheap, and a wrong one may tell the private key (Boneh, DeMillo and Lipton). It verifies
// each one of a card as well, which can be pulled in the middle. With other algorithms
// and tokens it takes as long as a fast token takes to sign, and the server verifies the
// signature anyway. So check verifies each one of a slow token, and of a fast token the
// first and some.
func (k *Key) check(r signing.Request, m made, sig []byte) error {
	_, always := k.pair.Public.(*rsa.PublicKey)
	if !k.use.proof.due(m.by, m.took) && !always && !k.token.removable() {
		return nil
	}
	start := time.Now()
	if err := r.Verify(k.pair.Public, sig); err != nil {
		return err
	}
	k.use.proof.given(m.by, time.Since(start))
	return nil
}
