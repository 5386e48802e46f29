package backend

import (
	"os"
	"slices"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/token"
	"p11-agent/token/tokentest"
)

func TestMain(m *testing.M) {
	tokentest.Main()
	os.Exit(terminaltest.Without(m).Run())
}

// A key whose token is pulled stays an offer, when the configuration says so.
func TestOffers(t *testing.T) {
	f := tokentest.NewFake(t)
	card, stays := f.AddToken("card", tokentest.PIN), f.AddToken("stays", tokentest.PIN)
	card.AddKey(tokentest.P256, 1, "one", nil)
	stays.AddKey(tokentest.P256, 2, "two", nil)
	b := &Modules{Store: tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{{Name: "fake", Path: "/nowhere/fake.so", Env: f.Env()}}, Command: []string{"/proc/self/exe"},
		StateDir: tokentest.TempDir(t), Known: token.KnownKept,
	})}
	labels := func(c *config.File) (present, away []string) {
		for _, o := range b.Offers(c) {
			if !o.Shown {
				t.Error("clients have room for two keys")
			}
			for _, k := range o.Present {
				present = append(present, k.Label())
			}
			for _, k := range o.Away {
				away = append(away, k.Label())
			}
		}
		return present, away
	}
	if present, away := labels(new(config.File)); !slices.Equal(present, []string{"one", "two"}) || away != nil {
		t.Errorf("got %q and %q", present, away)
	}
	card.Remove()
	tokentest.Until(t, "the store notices", func() bool { return len(b.Store.Keys()) == 1 })
	for absent, want := range map[string]string{"offer": "one", "hide": ""} {
		if present, away := labels(&config.File{Absent: absent}); !slices.Equal(present, []string{"two"}) || strings.Join(away, " ") != want {
			t.Errorf("absent = %q: got %q and %q", absent, present, away)
		}
	}
}
