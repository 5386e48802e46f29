package token

import (
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"p11-agent/token/pairs"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// bareToken returns a token of a Store that runs no module.
func bareToken(uris ...*pkcs11uri.URI) *Token {
	s := &Store{log: slog.New(slog.DiscardHandler), wanted: uris}
	m := &module{store: s, log: s.log, spec: ModuleSpec{Name: "bare"}}
	return &Token{ID: wire.TokenID{Label: "bare"}, module: m}
}

// If there is no room for all keys, named keys come first, and certificates give way.
func TestFit(t *testing.T) {
	named, err := pkcs11uri.Parse("pkcs11:token=bare;object=named")
	if err != nil {
		t.Fatal(err)
	}
	some := func(n, certificate int) (all []*pairs.Pair) {
		for i := range n {
			all = append(all, &pairs.Pair{
				ID: fmt.Append(nil, i), Members: []pairs.Member{{Name: pairs.Name{Label: fmt.Sprint(i)}}}, Public: ed25519.PublicKey{}, Certificates: [][]byte{make([]byte, certificate)},
			})
		}
		all[n-1].Members = []pairs.Member{{Name: pairs.Name{Label: "other"}}, {Name: pairs.Name{Label: "named"}}}
		return all
	}
	t.Run("keys", func(t *testing.T) {
		var left leftOut
		all := some(maxModuleKeys+10, 0)
		got := bareToken(named).fit(all, nil, &left)
		if len(got) != maxModuleKeys || left.keys != 10 || got[len(got)-1] != all[len(all)-1] {
			t.Errorf("%d keys are used, %d are left out", len(got), left.keys)
		}
	})
	t.Run("certificates", func(t *testing.T) {
		var left leftOut
		got := bareToken().fit(some(100, 400<<10), nil, &left)
		if len(got) != 100 || left.keys != 0 || left.certificates != 60 || weight(got) > maxKeyBytes {
			t.Errorf("%d keys are used, %d and %d certificates are left out, %d bytes", len(got), left.keys, left.certificates, weight(got))
		}
	})
}

// The status says what the agent leaves out, and names the bound.
func TestLeftOut(t *testing.T) {
	if got := new(leftOut).reasons(); len(got) > 0 {
		t.Errorf("nothing is left out, and told is %q", got)
	}
	left := leftOut{objects: true, long: 1, keys: 2, certificates: 3}
	left.skipped(fmt.Errorf("token: %w", pairs.ErrLongText))
	left.skipped(fmt.Errorf("another reason"))
	all := strings.Join(append(left.reasons(), (&tokensLeftOut{tokens: 2, unread: 1}).reasons()...), "\n")
	for _, want := range []string{
		"objects of the token: 32768 of them", "2 keys: of one module 8192", "1 certificate: 1 MiB", "1 object: an ID or a label has 4096",
		"3 certificates of keys", "2 tokens: 256", "the objects of 1 token: 64 MiB",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not told:\n%s", want, all)
		}
	}
}
