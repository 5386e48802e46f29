// Package keygen describes a new key pair to a token. It also says why a token did not make one.
//
// Package token finds the token, logs in, and sends the request to the module.
package keygen

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"

	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// A Kind is a kind of key that the agent can make on a token.
type Kind string

// The kinds.
const (
	RSA2048   Kind = "rsa-2048"
	RSA3072   Kind = "rsa-3072"
	RSA4096   Kind = "rsa-4096"
	ECDSAP256 Kind = "ecdsa-p256"
	ECDSAP384 Kind = "ecdsa-p384"
	ECDSAP521 Kind = "ecdsa-p521"
	Ed25519   Kind = "ed25519"
)

// Kinds lists all kinds.
var Kinds = []Kind{ECDSAP256, ECDSAP384, ECDSAP521, Ed25519, RSA2048, RSA3072, RSA4096}

// Request returns the request to a module process for a key of this kind. Tokens take the name
// of the curve of Ed25519 in different forms (PKCS#11 v3.0 section 2.3.5, RFC 8410 section 3).
func (k Kind) Request() (*wire.Generate, error) {
	curve := func(mechanism uint64, values ...any) (*wire.Generate, error) {
		r := &wire.Generate{Mechanism: mechanism}
		for _, v := range values {
			der, err := asn1.Marshal(v)
			if err != nil {
				return nil, err
			}
			r.ECParams = append(r.ECParams, wire.Value{Bytes: der})
		}
		return r, nil
	}
	switch k {
	case RSA2048:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 2048}, nil
	case RSA3072:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 3072}, nil
	case RSA4096:
		return &wire.Generate{Mechanism: wire.CKMRSAPKCSKeyPairGen, Bits: 4096}, nil
	case ECDSAP256:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP256)
	case ECDSAP384:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP384)
	case ECDSAP521:
		return curve(wire.CKMECKeyPairGen, pairs.OIDP521)
	case Ed25519:
		name := asn1.RawValue{Tag: asn1.TagPrintableString, Bytes: []byte(pairs.NameEd25519)}
		return curve(wire.CKMECEdwardsKeyPairGen, name, pairs.OIDEd25519, pairs.OIDEdwards25519)
	}
	return nil, fmt.Errorf("there is no kind of key %q", string(k))
}

// An Error says that a token did not make a key. No new key is left on the token.
type Error struct {
	Token  string // label
	Kind   Kind
	Advice string // what to do instead; may be empty
	Err    error
}

func (e *Error) Error() string {
	text := fmt.Sprintf("token %q did not make a key of kind %s: %v", e.Token, e.Kind, e.Err)
	if e.Advice != "" {
		text += "; " + e.Advice
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

// Explain turns the error of a request for a new key into an error for a person. id is the token.
// wrap adds the module to an error that the module did not return.
func Explain(err error, id wire.TokenID, kind Kind, wrap func(error) error) error {
	e, ok := errors.AsType[*wire.Error](err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err // the module did not get the request
	case !ok:
		return fmt.Errorf("make a key on token %q: %w; it may be there nevertheless: look with p11-agent list", id.Label, wrap(err))
	case e.Reason == wire.ReasonExists, e.Reason == wire.ReasonExtractable:
		return fmt.Errorf("token %q: %w", id.Label, err)
	case e.Reason == wire.ReasonUnsupported:
		return &Error{Token: id.Label, Kind: kind, Advice: otherTool(id), Err: err}
	case e.Function == "C_GenerateKeyPair" || e.Function == "C_OpenSession":
		switch e.RV {
		case wire.CKRHostMemory, wire.CKRDeviceMemory, wire.CKRDeviceError, wire.CKRDeviceRemoved, wire.CKRTokenNotPresent,
			wire.CKRSessionCount, wire.CKRFunctionCanceled, wire.CKRFunctionRejected:
		default: // modules have many codes for what they do not support
			return &Error{Token: id.Label, Kind: kind, Advice: otherTool(id), Err: err}
		}
	}
	return &Error{Token: id.Label, Kind: kind, Err: err}
}

// otherTool names a program that makes keys on the token, for a module that does not.
func otherTool(id wire.TokenID) string {
	text := strings.ToLower(id.Manufacturer + " " + id.Model)
	switch {
	case strings.Contains(text, "yubi"):
		return "make the key with ykman piv keys generate, or yubico-piv-tool -a generate"
	case strings.Contains(text, "piv"):
		return "make the key with the card's own program: ykman piv keys generate or yubico-piv-tool -a generate for a YubiKey, piv-tool -G for others"
	case strings.Contains(text, "pkcs#15"), strings.Contains(text, "opensc"):
		return "make the key with pkcs15-init --generate-key"
	}
	return "make the key with the token's own program"
}
