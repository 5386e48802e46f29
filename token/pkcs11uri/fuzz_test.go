package pkcs11uri

import (
	"bytes"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"p11-agent/token/wire"
)

// accepted holds seeds that Parse accepts. refused holds the seeds that Parse refuses.
var accepted = []string{
	"pkcs11:",
	"PKCS11:?",
	"pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=?pin-source=file:/etc/token_pin",
	"pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;library-version=1.23",
	"pkcs11:slot-description=Sun%20Metaslot;slot-manufacturer=a;slot-id=327680",
	"pkcs11:object=my-sign-key;type=private?pin-source=|/usr/lib/pinomatic&module-name=mypkcs11&module-path=/usr/lib/p.so",
	"pkcs11:x-vendor=a;other=%ff?x-a=1&x-a=2&pin-value=the-pin",
	"pkcs11:?pin-source=file:///a%2520b%253f",
	"pkcs11:?pin-source=//a",
	"pkcs11:token=?pin-value=",
}

func seeds(t testing.TB) []string {
	all := accepted
	for _, r := range refused {
		all = append(all[:len(all):len(all)], r.text)
	}
	if len(accepted) == 0 || len(refused) == 0 {
		t.Fatal("no seeds")
	}
	return all
}

func FuzzParse(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add([]byte(s))
	}
	for _, s := range accepted {
		if u, err := Parse(s); err != nil {
			f.Errorf("Parse(%q): %v", s, err)
		} else {
			u.Wipe()
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		before := bytes.Clone(text)
		u, err := ParseBytes(text)
		if !bytes.Equal(text, before) {
			t.Fatal("the text was changed")
		}
		if err != nil {
			if e, ok := err.(*SyntaxError); !ok || e.Offset < 0 || e.Offset > len(text) {
				t.Fatalf("%#v", err)
			}
			return
		}
		defer u.Wipe()
		clear(text) // the URI must not point into text
		if again, err := ParseBytes(before); err != nil || !reflect.DeepEqual(again.parts(), u.parts()) || !again.PIN().Equal(u.PIN()) {
			t.Fatalf("%q read twice: %v", before, err)
		} else {
			again.Wipe()
		}

		canonical := u.Canonical()
		again, err := Parse(canonical)
		if len(canonical) > MaxLength {
			return // percent-encoding may make it longer
		}
		if err != nil {
			t.Fatalf("Parse(%q): %v", canonical, err)
		}
		defer again.Wipe()
		if again.Canonical() != canonical || again.String() != u.String() || again.PIN() != nil || !reflect.DeepEqual(again.parts(), u.parts()) {
			t.Fatalf("%q became %q", canonical, again.Canonical())
		}

		if own := len(u.Unrecognized()) == 0; u.MatchModule(u.module()) != own || u.MatchSlot(u.slot()) != own || u.MatchToken(u.token()) != own || u.MatchObject(u.object()) != own {
			t.Fatalf("%q does not match itself", canonical)
		}
	})
}

// parts returns the URI without its PIN.
func (u *URI) parts() any {
	return [...]any{
		u.Token, u.Manufacturer, u.Serial, u.Model, u.LibraryManufacturer, u.LibraryVersion, u.LibraryDescription, u.Object, u.Type, u.ID,
		u.SlotID, u.SlotManufacturer, u.SlotDescription, u.PINSource, u.ModuleName, u.ModulePath, u.pathVendor, u.queryVendor,
	}
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func (u *URI) module() ModuleInfo {
	return ModuleInfo{Manufacturer: value(u.LibraryManufacturer), Description: value(u.LibraryDescription), Version: value(u.LibraryVersion)}
}

func (u *URI) slot() SlotInfo {
	return SlotInfo{ID: value(u.SlotID), Manufacturer: value(u.SlotManufacturer), Description: value(u.SlotDescription)}
}

func (u *URI) token() wire.TokenID {
	return wire.TokenID{Label: value(u.Token), Manufacturer: value(u.Manufacturer), Serial: value(u.Serial), Model: value(u.Model)}
}

func (u *URI) object() ObjectInfo {
	return ObjectInfo{Class: u.Type, ID: u.ID, Label: value(u.Object)}
}

// FuzzPIN writes a pin-value into the middle of a text, at any place. Neither the URI nor
// the error may show the PIN.
func FuzzPIN(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s, 7)
		f.Add(s, len(s))
		f.Add(s, len(s)/2)
		f.Add(s+"&", len(s)+1)
		f.Add(s+"?", len(s)+1)
	}
	const pin = "Zq9137"
	f.Fuzz(func(t *testing.T, text string, at int) {
		if at < 0 || at > len(text) || strings.Contains(text, pin) {
			return
		}
		text = text[:at] + "pin-value=" + pin + text[at:]
		u, err := Parse(text)
		if err != nil {
			if strings.Contains(err.Error(), pin) {
				t.Fatalf("Parse(%q): %v", text, err)
			}
			return
		}
		defer u.Wipe()
		type nested struct{ u URI }
		shown := u.String() + fmt.Sprintf("%v %+v %#v %s %q %x", u, *u, u, *u, u, u) + fmt.Sprintf("%v %+v", nested{*u}, &nested{*u}) +
			slog.AnyValue(u).Resolve().String() + strings.Join(u.Unrecognized(), " ")
		if strings.Contains(shown, pin) || strings.Contains(shown, fmt.Sprintf("%x", pin)) {
			t.Fatalf("%q shows as %q", text, shown)
		}
		if bytes.Contains(u.PIN().Bytes(), []byte(pin)) && strings.Contains(u.Canonical(), pin) {
			t.Fatalf("%q has the canonical form %q", text, u.Canonical())
		}
	})
}

func FuzzForKey(f *testing.F) {
	f.Add("work", "Yubico", "YubiKey", "123", "PIV AUTH key", []byte{1})
	f.Add("", "Yubico", "YubiKey", "", "", []byte{})
	f.Add("\xff", "a;b", "a?b", "%", "pin-value=", []byte("pin-value="))
	f.Fuzz(func(t *testing.T, label, manufacturer, model, serial, object string, id []byte) {
		token := wire.TokenID{Label: label, Manufacturer: manufacturer, Model: model, Serial: serial}
		u := ForKey(token, object, id)
		text := u.String()
		again, err := Parse(text)
		if err != nil {
			t.Fatalf("Parse(%q): %v", text, err)
		}
		if again.String() != text || again.Canonical() != text {
			t.Fatalf("%q became %q", text, again.Canonical())
		}
		if !again.MatchToken(token) || !again.MatchObject(ObjectInfo{Class: ClassPrivate, ID: id, Label: object}) {
			t.Fatalf("%q does not match its key", text)
		}
		for _, c := range []byte(text) {
			if c <= ' ' || c >= 0x7f {
				t.Fatalf("%q is not fit to be printed", text)
			}
		}
		if u.Token != nil && !utf8.ValidString(*u.Token) {
			t.Fatal("a label that is not UTF-8")
		}
	})
}
