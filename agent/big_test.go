package agent

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"log/slog"
	"testing"

	"p11-agent/agent/request"
)

// bigKeys makes so many keys of one token.
func bigKeys(n int) (keys []request.Key) {
	for i := range n {
		seed := make([]byte, ed25519.SeedSize)
		binary.BigEndian.PutUint64(seed, uint64(i))
		keys = append(keys, &fakeKey{
			Signer: ed25519.NewKeyFromSeed(seed), uri: fmt.Sprintf("pkcs11:token=big;id=%%%02X%%%02X", i/256, i%256), insertions: 1,
		})
	}
	return keys
}

// TestListGrowsLinearly counts the allocations of a new list of n keys, and of twice as many.
func TestListGrowsLinearly(t *testing.T) {
	allocs := func(n int) float64 {
		tokens := newFakeTokens(bigKeys(n)...)
		k := NewKeyring(Options{
			Tokens: tokens, Rules: Rules{Name: func(request.Key) string { return "" }}, Log: slog.New(slog.DiscardHandler),
		})
		return testing.AllocsPerRun(5, func() {
			k.change.Add(1)
			list, err := k.List(t.Context(), new(request.Caller))
			if err != nil || len(list.Identities) != n {
				t.Fatalf("%d keys are listed, %v", len(list.Identities), err)
			}
		})
	}
	const n = 1000
	if one, two := allocs(n), allocs(2*n); two > 2.2*one {
		t.Errorf("%v allocations for %d keys, %v for %d", one, n, two, 2*n)
	}
}
