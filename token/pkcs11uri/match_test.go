package pkcs11uri

import (
	"strings"
	"testing"

	"p11-agent/token/wire"
)

func TestMatch(t *testing.T) {
	module := ModuleInfo{Manufacturer: "Snake Oil", Description: "lib", Version: Version{2, 1}}
	slot := SlotInfo{ID: 3, Manufacturer: "Reader Inc", Description: "Reader 00"}
	token := wire.TokenID{Label: "work", Manufacturer: "Yubico", Model: "YK5", Serial: "123"}
	object := ObjectInfo{Class: ClassPrivate, ID: []byte{1, 2}, Label: "ssh"}
	blank := wire.TokenID{}
	for _, test := range []struct {
		path                        string
		module, slot, token, object bool
	}{
		{"", true, true, true, true},
		{"token=work", true, true, true, true},
		{"token=work;serial=123;manufacturer=Yubico;model=YK5", true, true, true, true},
		{"token=Work", true, true, false, true},
		{"token=wor", true, true, false, true},
		{"token=work%20", true, true, true, true},
		{"token=work%00", true, true, true, true},
		{"token=work%20%20%00%20", true, true, true, true},
		{"token=%20work", true, true, false, true},
		{"token=work%20;model=YK5%20%00%00;manufacturer=Yubico%20;serial=123%20%20", true, true, true, true},
		{"token=wo%20rk", true, true, false, true},
		{"library-manufacturer=Snake%20Oil%20%20;library-description=lib%00", true, true, true, true},
		{"slot-manufacturer=Reader%20Inc%20;slot-description=Reader%2000%20%20", true, true, true, true},
		{"object=ssh%20", true, true, true, false},
		{"object=ssh%00", true, true, true, false},
		{"id=%01%02%20", true, true, true, false},
		{"id=%01%02%00", true, true, true, false},
		{"token=%00", true, true, false, true},
		{"token=", true, true, false, true},
		{"serial=0123", true, true, false, true},
		{"manufacturer=x", true, true, false, true},
		{"model=", true, true, false, true},
		{"library-manufacturer=Snake%20Oil;library-description=lib;library-version=2.1", true, true, true, true},
		{"library-version=2", false, true, true, true},
		{"library-version=2.10", false, true, true, true},
		{"library-version=3.1", false, true, true, true},
		{"library-manufacturer=Snake", false, true, true, true},
		{"library-description=", false, true, true, true},
		{"slot-id=3;slot-manufacturer=Reader%20Inc;slot-description=Reader%2000", true, true, true, true},
		{"slot-id=0", true, false, true, true},
		{"slot-manufacturer=", true, false, true, true},
		{"slot-description=Reader", true, false, true, true},
		{"object=ssh;type=private;id=%01%02", true, true, true, true},
		{"object=", true, true, true, false},
		{"type=public", true, true, true, false},
		{"id=%01", true, true, true, false},
		{"id=", true, true, true, false},
		{"x-vendor=a", false, false, false, false},
		{"objcet=ssh", false, false, false, false},
	} {
		u := mustParse(t, "pkcs11:"+test.path)
		for what, match := range map[string][2]bool{
			"module": {u.MatchModule(module), test.module},
			"slot":   {u.MatchSlot(slot), test.slot},
			"token":  {u.MatchToken(token), test.token},
			"object": {u.MatchObject(object), test.object},
			"name":   {u.MatchModuleName("a", "/b"), !strings.Contains(test.path, "x-") && !strings.Contains(test.path, "objcet")},
		} {
			if match[0] != match[1] {
				t.Errorf("%q matches the %s: %t, want %t", test.path, what, match[0], match[1])
			}
		}
	}
	if !mustParse(t, "pkcs11:token=;serial=").MatchToken(blank) {
		t.Error("an empty attribute does not match an empty text")
	}
	if !mustParse(t, "pkcs11:id=;object=").MatchObject(ObjectInfo{}) {
		t.Error("an empty id does not match an object without")
	}
	if mustParse(t, "pkcs11:type=data").MatchObject(ObjectInfo{}) {
		t.Error("a type matches an object without")
	}
	if !mustParse(t, "pkcs11:token=work?x-a=b&pin-value=1").MatchToken(token) {
		t.Error("the query has an effect on matching")
	}
}

func TestMatchModuleName(t *testing.T) {
	const registered, file = "softhsm2", "/usr/lib/softhsm/libsofthsm2.so.2"
	for name, want := range map[string]bool{
		"softhsm2":                  true,
		"softhsm2.module":           true,
		"libsofthsm2.so.2":          true,
		"libsofthsm2":               true,
		"softhsm2.so.2":             true,
		"SoftHSM2":                  true,
		"softhsm":                   false,
		"hsm2":                      false,
		"libsofthsm2.so":            false,
		"evil-softhsm2":             false,
		"libsofthsm2.so.2.module":   false,
		".module":                   false,
		"":                          false,
		"lib":                       false,
		".so.2":                     false,
		"/usr/lib/softhsm/softhsm2": false,
		file:                        false,
	} {
		u := &URI{ModuleName: &name}
		if got := u.MatchModuleName(registered, file); got != want {
			t.Errorf("module-name=%s matches: %t, want %t", name, got, want)
		}
	}
	for _, test := range []struct {
		name, registered, file string
		want                   bool
	}{
		{"opensc", "opensc.module", "opensc-pkcs11.so", true},
		{"opensc.module", "opensc.module", "", true},
		{"opensc-pkcs11", "x", "opensc-pkcs11.so", true},
		{"a", "", "/x/a.so.1.20", true},
		{"a", "", "/x/a.so.", false},
		{"a.so.", "", "/x/a.so.", true},
		{"a", "", "/x/a.so.x", false},
		{"a.so", "", "/x/a.so.so", true},
		{"a", "", "", false},
		{".", "", "", false},
		{"", ".module", "/x/lib.so", false},
		{".module", "", "/x/a.so", false},
		{"opensc", "OpenSC.module", "", true},
		{"softhsm2", "evil-softhsm2", "/x/evil-softhsm2.so", false},
	} {
		u := &URI{ModuleName: &test.name}
		if got := u.MatchModuleName(test.registered, test.file); got != test.want {
			t.Errorf("module-name=%s matches %q in %q: %t, want %t", test.name, test.registered, test.file, got, test.want)
		}
	}
}

func TestForKey(t *testing.T) {
	long := strings.Repeat("\x01", maxText+1)
	for _, test := range []struct {
		name  string
		token wire.TokenID
		label string
		id    []byte
		want  string
	}{
		{"whole", wire.TokenID{Label: "work card", Manufacturer: "m", Model: "n", Serial: "00a"}, "ssh", []byte{1, 0xab}, "pkcs11:token=work%20card;serial=00a;object=ssh;id=%01%AB"},
		{"no label", wire.TokenID{Manufacturer: "m", Model: "n", Serial: "1"}, "", []byte{1}, "pkcs11:serial=1;id=%01"},
		{"no serial", wire.TokenID{Label: "l", Manufacturer: "m", Model: "n"}, "o", nil, "pkcs11:token=l;object=o"},
		{"neither label nor serial", wire.TokenID{Manufacturer: "m", Model: "n"}, "o", []byte{}, "pkcs11:manufacturer=m;model=n;object=o"},
		{"nothing at all", wire.TokenID{}, "", nil, "pkcs11:"},
		{"not UTF-8", wire.TokenID{Label: "\xff", Manufacturer: "m"}, "\xff", []byte{0xff}, "pkcs11:manufacturer=m;id=%FF"},
		{"control characters", wire.TokenID{Label: "a\n\x1b[m"}, "", nil, "pkcs11:token=a%0A%1B[m"},
		{"too long", wire.TokenID{Label: long, Serial: "1"}, long, make([]byte, maxID+1), "pkcs11:serial=1"},
		{"looks like a PIN", wire.TokenID{Label: "a?pin-value=1", Serial: "1"}, "", []byte("pin-value="), "pkcs11:serial=1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			u := ForKey(test.token, test.label, test.id)
			if got := u.String(); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if u.Canonical() != u.String() {
				t.Errorf("Canonical() = %q", u.Canonical())
			}
			for i := range test.id {
				test.id[i] = 7
			}
			if got := u.String(); got != test.want {
				t.Errorf("the id is the caller's: %q", got)
			}
		})
	}
}

func TestForKeyAtItsLongest(t *testing.T) {
	text := strings.Repeat("\x01", maxText)
	token := wire.TokenID{Label: text, Manufacturer: text, Model: text, Serial: text}
	mustParse(t, ForKey(token, text, make([]byte, maxID)).Canonical())
	token.Label, token.Serial = "", ""
	mustParse(t, ForKey(token, text, make([]byte, maxID)).Canonical())
}

func TestNamesToken(t *testing.T) {
	for text, want := range map[string]bool{
		"pkcs11:":                           false,
		"pkcs11:manufacturer=m;model=m":     false,
		"pkcs11:token=card":                 true,
		"pkcs11:serial=1":                   true,
		"pkcs11:token=":                     false,
		"pkcs11:token=%20;serial=%20%20":    false,
		"pkcs11:object=one?module-name=bad": false,
	} {
		if got := mustParse(t, text).NamesToken(); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
