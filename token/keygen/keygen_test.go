package keygen

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"
	"testing"

	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// Each kind has a request with the size of an RSA key, or with the names of a curve.
func TestRequest(t *testing.T) {
	for _, k := range Kinds {
		r, err := k.Request()
		if err != nil {
			t.Errorf("%s: %v", k, err)
			continue
		}
		if rsa := strings.HasPrefix(string(k), "rsa-"); rsa != (len(r.ECParams) == 0) || rsa != (string(k) == fmt.Sprintf("rsa-%d", r.Bits)) {
			t.Errorf("%s: %+v", k, r)
		}
		for _, v := range r.ECParams {
			var oid asn1.ObjectIdentifier
			var name string
			rest, err := asn1.Unmarshal(v.Bytes, &oid)
			if err != nil {
				rest, err = asn1.Unmarshal(v.Bytes, &name)
			}
			if err != nil || len(rest) > 0 || name != "" && name != pairs.NameEd25519 {
				t.Errorf("%s: %x is %v %q: %v", k, v.Bytes, oid, name, err)
			}
		}
	}
	if _, err := Kind("dsa").Request(); err == nil {
		t.Error("there is a request for an unknown kind")
	}
}

func TestExplain(t *testing.T) {
	gone := errors.New("the module process ended")
	piv := wire.TokenID{Label: "card", Manufacturer: "piv_II", Model: "PKCS#15 emulated"}
	for _, tt := range []struct {
		name string
		err  error
		id   wire.TokenID
		want string // of the text
		kind bool   // an Error
	}{
		{"not sent", fmt.Errorf("wait: %w", context.Canceled), piv, "wait: context canceled", false},
		{"no answer", gone, piv, `token "card": module m: the module process ended; it may be there nevertheless`, false},
		{"a key is there", &wire.Error{Reason: wire.ReasonExists}, piv, `token "card": `, false},
		{"it could leave the token", &wire.Error{Reason: wire.ReasonExtractable}, piv, `token "card": `, false},
		{"no such kind", &wire.Error{Reason: wire.ReasonUnsupported}, piv, "; make the key with the card's own program", true},
		{"YubiKey", &wire.Error{Reason: wire.ReasonUnsupported}, wire.TokenID{Manufacturer: "Yubico (www.yubico.com)"}, "; make the key with ykman", true},
		{"OpenSC", &wire.Error{Reason: wire.ReasonUnsupported}, wire.TokenID{Manufacturer: "OpenSC Project"}, "; make the key with pkcs15-init", true},
		{"unknown card", &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRFunctionNotSupported}, wire.TokenID{}, "; make the key with the token's own program", true},
		{"another time", &wire.Error{Function: "C_GenerateKeyPair", RV: wire.CKRDeviceMemory}, piv, `token "card" did not make a key of kind ed25519`, true},
		{"later", &wire.Error{Function: "C_Sign", RV: wire.CKRGeneralError}, piv, `token "card" did not make a key of kind ed25519`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Explain(tt.err, tt.id, Ed25519, func(err error) error { return fmt.Errorf("module m: %w", err) })
			if !strings.Contains(err.Error(), tt.want) || !errors.Is(err, tt.err) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			e, ok := errors.AsType[*Error](err)
			if ok != tt.kind || ok && (e.Advice != "") != strings.HasPrefix(tt.want, "; ") {
				t.Errorf("got %#v", err)
			}
		})
	}
}
