package homes

import (
	"testing"

	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

var (
	card  = wire.TokenID{Label: "card", Serial: "1"}
	twin  = wire.TokenID{Label: "card", Serial: "1", Twin: 1}
	other = wire.TokenID{Label: "other", Serial: "2"}
)

func parse(t *testing.T, text string) *pkcs11uri.URI {
	t.Helper()
	u, err := pkcs11uri.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// newHomes returns Homes with the modules good and bad. The card belongs to good if known is set.
func newHomes(known bool) *Homes {
	h := New(nil)
	if known {
		h = New(map[wire.TokenID]string{card: "good"})
	}
	h.AddModule(Module{Identity: "good", Name: "good", Path: "/lib/good.so", File: "/lib/good-1.so"})
	h.AddModule(Module{Identity: "bad", Name: "bad", Path: "/lib/bad.so", File: "/lib/bad.so"})
	return h
}

func (h *Homes) want(t *testing.T, id wire.TokenID, module string) {
	t.Helper()
	if got := h.Of(id); got != module {
		t.Errorf("token %v belongs to %q, want %q", id, got, module)
	}
}

func TestClaim(t *testing.T) {
	both := []string{"bad", "good"}
	for _, tt := range []struct {
		name    string
		known   bool
		before  []string // the modules that showed the card before
		settled bool
		claims  []string
		want    int
		home    string
	}{
		{"the first module", false, nil, false, both, 0, "bad"},
		{"a known home", true, nil, true, both, 1, "good"},
		{"a known home that does not show the card", true, nil, true, []string{"bad"}, 0, "good"},
		{"an earlier module comes later, before the first look at all", false, []string{"good"}, false, both, 0, "bad"},
		{"an earlier module comes later, after the first look at all", false, []string{"good"}, true, both, 1, "good"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHomes(tt.known)
			if tt.before != nil {
				h.Claim(card, tt.before, false)
			}
			if got := h.Claim(card, tt.claims, tt.settled); got != tt.want {
				t.Errorf("module %d, want %d", got, tt.want)
			}
			h.want(t, card, tt.home)
		})
	}
}

// A second token with the same texts belongs to the module of the first.
func TestTwinHasTheSameHome(t *testing.T) {
	h := newHomes(true)
	if got := h.Claim(twin, []string{"bad"}, true); got != 0 {
		t.Errorf("module %d", got)
	}
	h.want(t, twin, "good")
	if got := h.Other(twin, "bad"); got != "good" {
		t.Errorf("the home is %q", got)
	}
}

func TestOther(t *testing.T) {
	h := newHomes(true)
	for _, tt := range []struct {
		id           wire.TokenID
		module, want string
	}{{card, "good", ""}, {card, "bad", "good"}, {other, "bad", ""}, {other, "good", "bad"}} {
		if got := h.Other(tt.id, tt.module); got != tt.want {
			t.Errorf("token %v through %s has the home %q, want %q", tt.id, tt.module, got, tt.want)
		}
	}
}

// The home moves only to a module that a person gave the right PIN, when the home is gone.
func TestProved(t *testing.T) {
	for _, tt := range []struct {
		name     string
		home     string
		module   string
		byPerson bool
		want     bool
	}{
		{"the home, again", "good", "good", true, false},
		{"a guest", "good", "bad", true, false},
		{"a guest in place of a module that is gone", "gone", "bad", true, true},
		{"a guest with a configured PIN", "gone", "bad", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := New(map[wire.TokenID]string{card: tt.home})
			h.AddModule(Module{Identity: "good"})
			h.AddModule(Module{Identity: "bad"})
			if got := h.Proved(card, tt.module, tt.byPerson); got != tt.want {
				t.Errorf("changed: %v", got)
			}
			if h.Stays(card, tt.module) != (tt.want || tt.home == tt.module) {
				t.Errorf("homes are %v", h.All())
			}
		})
	}
	h := newHomes(false)
	h.Claim(card, []string{"good"}, true)
	if h.Stays(card, "good") || !h.Proved(card, "good", false) || !h.Stays(card, "good") {
		t.Errorf("a PIN does not prove the home: %v", h.All())
	}
}

// The configuration gives homes for as long as it has the URI.
func TestPrefer(t *testing.T) {
	h := newHomes(true)
	h.Prefer([]*pkcs11uri.URI{parse(t, "pkcs11:?module-name=bad"), parse(t, "pkcs11:token=other")})
	h.want(t, card, "good")
	h.Prefer([]*pkcs11uri.URI{parse(t, "pkcs11:token=card?module-name=missing"), parse(t, "pkcs11:token=card?module-name=bad")})
	h.want(t, card, "bad")
	h.want(t, twin, "bad")
	h.Prefer(nil)
	h.want(t, card, "good")
}

func TestForget(t *testing.T) {
	h := newHomes(true)
	if h.Forget(card, "bad"); len(h.All()) != 1 {
		t.Error("another module makes the agent forget a home")
	}
	if h.Forget(card, "good"); len(h.All()) != 0 {
		t.Errorf("homes are %v", h.All())
	}
}

func TestNames(t *testing.T) {
	h := newHomes(false)
	h.AddModule(Module{Identity: "/tmp/good.so", Name: "good.so", Path: "/tmp/good.so", File: "/tmp/good.so", ByClient: true})
	for text, want := range map[string]string{
		"pkcs11:token=card":                                   "",
		"pkcs11:?module-name=good":                            "good",
		"pkcs11:?module-name=missing":                         "",
		"pkcs11:?module-path=/lib/good.so":                    "good",
		"pkcs11:?module-path=/lib/good-1.so":                  "good",
		"pkcs11:?module-path=/lib":                            "",
		"pkcs11:?module-path=/tmp/good.so":                    "/tmp/good.so",
		"pkcs11:?module-name=good&module-path=/lib/bad.so":    "",
		"pkcs11:?module-name=good&module-path=/tmp/good.so":   "",
		"pkcs11:?module-name=good.so&module-path=/lib/bad.so": "",
	} {
		u := parse(t, text)
		for _, module := range []string{"good", "bad", "/tmp/good.so"} {
			if got := h.Names(u, module); got != (module == want) {
				t.Errorf("%s names %s: %v", text, module, got)
			}
		}
	}
	if h.Names(nil, "good") {
		t.Error("no URI names a module")
	}
}

func TestModuleMatches(t *testing.T) {
	m := Module{Name: "good", Path: "/lib/good.so", File: "/lib/1/good.so"}
	for text, want := range map[string]bool{
		"pkcs11:":                            true,
		"pkcs11:?module-name=good":           true,
		"pkcs11:?module-name=bad":            false,
		"pkcs11:?module-path=/lib/good.so":   true,
		"pkcs11:?module-path=/lib":           true,
		"pkcs11:?module-path=/lib/1":         true,
		"pkcs11:?module-path=/lib/":          true,
		"pkcs11:?module-path=/":              false,
		"pkcs11:?module-path=/lib/1/good.so": true,
	} {
		if got := m.Matches(parse(t, text)); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

// The error of a guest says how to name the module.
func TestGuestError(t *testing.T) {
	for module, want := range map[string]string{"bad": "module-name=bad", "/tmp/bad.so": "module-path=/tmp/bad.so"} {
		err := &GuestError{Token: "card", Module: module, Home: "good"}
		if text := `token "card" belongs to module "good", and module "` + module + `" shows it now: to give the PIN to "` + module + `", add ` + want + ` to the query of the URI`; err.Error() != text {
			t.Errorf("got %v", err)
		}
	}
}
