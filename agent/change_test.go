package agent

import (
	"slices"
	"testing"
)

// ssh-add -e logs out of the tokens of which nothing is listed any more, and of no other.
func TestRemoveTokenLogsOut(t *testing.T) {
	a1, a2, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=a;id=2"), edKey("pkcs11:token=b;id=1")
	for _, tt := range []struct {
		name      string
		automatic []Selection
		add       []string
		remove    string
		want      []string // the tokens that are logged out of
	}{
		{"the only addition", []Selection{}, []string{"pkcs11:token=a"}, "pkcs11:token=a", []string{"out of pkcs11:token=a"}},
		{"all tokens", []Selection{}, []string{"pkcs11:"}, "pkcs11:", []string{"out of pkcs11:token=a", "out of pkcs11:token=b"}},
		{"one of two keys", []Selection{}, []string{a1.uri, a2.uri}, a1.uri, nil},
		{"one of two tokens", []Selection{}, []string{a1.uri, b.uri}, b.uri, []string{"out of pkcs11:token=b"}},
		{"one of two additions of a key", []Selection{}, []string{"pkcs11:token=b", b.uri}, "pkcs11:token=b", []string{"out of pkcs11:token=b"}},
		{"an automatic key", nil, nil, "pkcs11:token=b", []string{"out of pkcs11:token=b"}},
		{"one of two automatic keys", nil, nil, a1.uri, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: tt.automatic}}, a1, a2, b)
			for _, provider := range tt.add {
				f.add(t, provider, Constraints{})
			}
			if err := f.RemoveToken(t.Context(), local, TokenRequest{Provider: []byte(tt.remove)}); err != nil {
				t.Fatal(err)
			}
			slices.Sort(f.tokens.logins)
			if !slices.Equal(f.tokens.logins, tt.want) {
				t.Errorf("logged %q, want %q; left: %q", f.tokens.logins, tt.want, f.list(t))
			}
			if err := f.RemoveToken(t.Context(), local, TokenRequest{Provider: []byte(tt.remove)}); err == nil {
				t.Error("removed twice")
			}
		})
	}
}

// A connection that sees some of the keys of a token does not log out of it while there
// are others: see RemoveAll.
func TestRemoveTokenKeepsLoginOfOthers(t *testing.T) {
	shown, other := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=a;id=2")
	f := newFixture(Options{Rules: Rules{Automatic: []Selection{}}}, shown, other)
	f.add(t, shown.uri, Constraints{})
	c := &Caller{Socket: &Socket{Only: []Selection{prefix(shown.uri)}}}
	if err := f.RemoveToken(t.Context(), c, TokenRequest{Provider: []byte(shown.uri)}); err != nil {
		t.Fatal(err)
	}
	if len(f.tokens.logins) > 0 {
		t.Errorf("logged %q", f.tokens.logins)
	}
}
