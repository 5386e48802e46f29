package pkcs11uri

import (
	"strings"
	"testing"
)

func TestMeantID(t *testing.T) {
	for id, want := range map[string]string{
		"01": "%01", "1": "%01", "0A": "%0A", "0x01": "%01", "0x1f2e": "%1F%2E", "meb": "%6D%EB", "6d:eb": "%6D%EB", "6d eb": "%6D%EB",
		"": "", "\x01": "", "x": "", "key": "", "0x": "", "\x01\x02": "", "012": "%30%12",
	} {
		got := ""
		if meant := MeantID([]byte(id)); meant != nil {
			got = FormatID(meant)
		}
		if got != want {
			t.Errorf("%q was meant as %q, want %q", id, got, want)
		}
	}
}

func TestSpellsID(t *testing.T) {
	for text, want := range map[string]bool{
		"pkcs11:id=01": false, "pkcs11:id=%30%31": true, "pkcs11:id=%30%31;token=a": true, "pkcs11:id=%301": false,
	} {
		u, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := SpellsID(text, u.ID); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

// ParseNamed accepts a URI, or a label that stands for "pkcs11:token=" and that label.
// The error for any other text quotes nothing of the text.
func FuzzParseNamed(f *testing.F) {
	for _, s := range append(seeds(f), "card", "PIV Card II", "a;b", "token=a", "pksc11:token=Zq9137", "card?pin-vlaue=Zq9137", "Zq9137=") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := ParseNamed([]byte(text))
		if err != nil {
			if strings.Contains(text, "Zq9137") && strings.Contains(err.Error(), "Zq9137") {
				t.Fatalf("%q gives %v", text, err)
			}
			return
		}
		defer u.Wipe()
		if IsURI([]byte(text)) {
			return // FuzzParse tests URIs
		}
		if u.Token == nil || *u.Token != text || u.Canonical() != "pkcs11:token="+escapePath(text) {
			t.Fatalf("%q is %q", text, u.Canonical())
		}
		again, err := Parse(u.Canonical())
		if err != nil || again.Canonical() != u.Canonical() {
			t.Fatalf("%q became %v, %v", text, again, err)
		}
		if again.PIN() != nil || again.PINSource != nil || again.ModulePath != nil || again.ModuleName != nil {
			t.Fatalf("%q says more than the label of a token: %v", text, again)
		}
	})
}
