package agent

import (
	"slices"
	"testing"

	"p11-agent/agent/request"
)

// Offers returns what a keyring lists before a client changes it: in this order, with these
// homes.
func TestOffers(t *testing.T) {
	one, copied, two, unfit := edKey("pkcs11:token=a;id=%01"), edKey("pkcs11:token=b;id=%01"), edKey("pkcs11:token=a;id=%02"), edKey("pkcs11:token=a;id=%03")
	copied.Signer = one.Signer // the same key on two cards
	unfit.unfit = "an attestation key"
	rules := Rules{
		Name: func(k request.Key) string { return map[request.Key]string{two: "laptop"}[k] }, OfferAway: always,
		Listed: func(k request.Key) string { return k.URI() + " label" },
	}
	f := newFixture(Options{Rules: rules, SoftwareKeys: true})
	f.tokens.setAway([]request.Key{one, two, unfit}, []request.Key{copied})
	want := []string{one.uri + " label", "laptop"}
	check := func(when string) {
		t.Helper()
		var comments []string
		var homes [][]request.Key
		for _, o := range Offers(f.tokens, rules) {
			comments, homes = append(comments, o.Identity.Comment), append(homes, o.Homes)
		}
		if !slices.Equal(comments, want) {
			t.Errorf("%s: offers %q, want %q", when, comments, want)
		}
		if len(homes) != 2 || !slices.Equal(homes[0], []request.Key{one, copied}) || !slices.Equal(homes[1], []request.Key{two}) {
			t.Errorf("%s: the homes are %v", when, homes)
		}
	}
	f.wantList(t, want...)
	check("at first")
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	f.wantList(t)
	check("after a client has removed all keys")
}
