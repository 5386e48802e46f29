package agent

import (
	"slices"
	"testing"

	"p11-agent/agent/request"
)

// ssh-add -e logs out of a token if the list has no key of the token any more.
func TestRemoveTokenLogsOut(t *testing.T) {
	a1, a2, b := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=a;id=2"), edKey("pkcs11:token=b;id=1")
	for _, tt := range []struct {
		name      string
		automatic []request.Selection
		add       []string
		remove    string
		want      []string // the tokens that are logged out of
	}{
		{"the only addition", []request.Selection{}, []string{"pkcs11:token=a"}, "pkcs11:token=a", []string{"out of pkcs11:token=a"}},
		{"all tokens", []request.Selection{}, []string{"pkcs11:"}, "pkcs11:", []string{"out of pkcs11:token=a", "out of pkcs11:token=b"}},
		{"one of two keys", []request.Selection{}, []string{a1.uri, a2.uri}, a1.uri, nil},
		{"one of two tokens", []request.Selection{}, []string{a1.uri, b.uri}, b.uri, []string{"out of pkcs11:token=b"}},
		{"one of two additions of a key", []request.Selection{}, []string{"pkcs11:token=b", b.uri}, "pkcs11:token=b", []string{"out of pkcs11:token=b"}},
		{"an automatic key", nil, nil, "pkcs11:token=b", []string{"out of pkcs11:token=b"}},
		{"one of two automatic keys", nil, nil, a1.uri, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: tt.automatic}}, a1, a2, b)
			for _, provider := range tt.add {
				f.add(t, provider, request.Constraints{})
			}
			if err := f.RemoveToken(t.Context(), local, request.Token{Provider: []byte(tt.remove)}); err != nil {
				t.Fatal(err)
			}
			slices.Sort(f.tokens.logins)
			if !slices.Equal(f.tokens.logins, tt.want) {
				t.Errorf("logged %q, want %q; left: %q", f.tokens.logins, tt.want, f.list(t))
			}
			if err := f.RemoveToken(t.Context(), local, request.Token{Provider: []byte(tt.remove)}); err == nil {
				t.Error("removed twice")
			}
		})
	}
}

// If a connection sees only some keys of a token, it does not log out of the token: see
// RemoveAll.
func TestRemoveTokenKeepsLoginOfOthers(t *testing.T) {
	shown, other := edKey("pkcs11:token=a;id=1"), edKey("pkcs11:token=a;id=2")
	f := newFixture(Options{Rules: Rules{Automatic: []request.Selection{}}}, shown, other)
	f.add(t, shown.uri, request.Constraints{})
	c := &request.Caller{Socket: &request.Socket{Only: []request.Selection{prefix(shown.uri)}}}
	if err := f.RemoveToken(t.Context(), c, request.Token{Provider: []byte(shown.uri)}); err != nil {
		t.Fatal(err)
	}
	if len(f.tokens.logins) > 0 {
		t.Errorf("logged %q", f.tokens.logins)
	}
}
