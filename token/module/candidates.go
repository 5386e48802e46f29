package module

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha1" // for tokens that hash by themselves
	_ "crypto/sha256"
	_ "crypto/sha512"
	"errors"
	"math/big"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// A token may have several private keys with one ID and label that do not show their
// public half. EC keys seldom show it: CKA_EC_POINT is an attribute of public keys. Then
// each of these keys signs, until the public half verifies a signature.

// maxCandidates bounds the private keys that sign. Each of them may cost a touch.
const maxCandidates = 8

// isAmbiguous tells whether several private keys fit.
func isAmbiguous(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	return ok && e.Reason == wire.ReasonAmbiguous
}

// signWithOneOf makes a signature with the private key that fits, out of several. It uses
// room if the signature fits in there. It remembers which key fits.
func (p *presence) signWithOneOf(ctx context.Context, session pkcs11.SessionHandle, m *wire.Operate, room []byte) ([]byte, error) {
	ambiguous := &wire.Error{Reason: wire.ReasonAmbiguous}
	verify := verifier(m)
	if verify == nil {
		return nil, ambiguous // no signature could be checked
	}
	_, candidates, err := p.searchFor(session, &m.Key)
	if err != nil {
		return nil, err
	}
	if len(candidates) > maxCandidates {
		return nil, ambiguous
	}
	var refused error
	for i, key := range candidates {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		signature, err := p.operateWith(session, key, m, room, i == len(candidates)-1)
		switch {
		case err != nil && !ofTheKey(err):
			return nil, err
		case err != nil:
			refused = err
		case verify(signature):
			p.remember(&m.Key, key)
			return signature, nil
		}
	}
	if refused != nil {
		return nil, refused
	}
	return nil, ambiguous
}

// ofTheKey tells whether the module refused to begin a signature because of the key. Then
// another key may work.
func ofTheKey(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	return ok && e.Function == "C_SignInit" && (e.RV == wire.CKRKeyFunctionNotPermitted || e.RV == wire.CKRKeyTypeInconsistent)
}

// remember notes the handle of a private key.
func (p *presence) remember(id *wire.KeyID, h pkcs11.ObjectHandle) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.keys) >= wire.MaxList {
		clear(p.keys)
	}
	p.keys[string(appendKeyName(nil, id))] = h
}

// verifier returns a function that checks a signature. It returns nil if no check is
// possible, as for a decryption.
func verifier(m *wire.Operate) func(signature []byte) bool {
	if m.Function != wire.Sign {
		return nil
	}
	hash, hashes := hashOf[m.Mechanism]
	digest := func() []byte {
		if !hashes {
			return m.Data
		}
		h := hash.New()
		_, _ = h.Write(m.Data) // hash.Hash never fails
		return h.Sum(nil)
	}
	switch m.Key.KeyType {
	case wire.CKKEC:
		key, err := ecdsa.ParseUncompressedPublicKey(curveOf(m.Key.ECPoint), m.Key.ECPoint)
		if err != nil || m.Mechanism != wire.CKMECDSA && !hashes {
			return nil
		}
		return func(s []byte) bool {
			r, t := new(big.Int).SetBytes(s[:len(s)/2]), new(big.Int).SetBytes(s[len(s)/2:])
			return ecdsa.Verify(key, digest(), r, t)
		}
	case wire.CKKECEdwards:
		if len(m.Key.ECPoint) != ed25519.PublicKeySize || m.Mechanism != wire.CKMEdDSA {
			return nil
		}
		return func(s []byte) bool { return ed25519.Verify(m.Key.ECPoint, m.Data, s) }
	case wire.CKKRSA:
		if len(m.Key.Modulus) == 0 || m.Mechanism != wire.CKMRSAPKCS && !hashes {
			return nil
		}
		// All tokens make keys with this exponent.
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(m.Key.Modulus), E: 65537}
		return func(s []byte) bool {
			if n := key.Size() - len(s); n > 0 {
				s = append(make([]byte, n), s...)
			}
			return rsa.VerifyPKCS1v15(key, hash, digest(), s) == nil
		}
	}
	return nil
}

// curveOf returns the curve of an uncompressed point, by its length.
func curveOf(point []byte) elliptic.Curve {
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		if len(point) == 1+2*((c.Params().BitSize+7)/8) {
			return c
		}
	}
	return elliptic.P521()
}

// hashOf holds the hashes of mechanisms that hash.
var hashOf = map[uint64]crypto.Hash{
	wire.CKMSHA1RSAPKCS: crypto.SHA1, wire.CKMSHA224RSAPKCS: crypto.SHA224, wire.CKMSHA256RSAPKCS: crypto.SHA256,
	wire.CKMSHA384RSAPKCS: crypto.SHA384, wire.CKMSHA512RSAPKCS: crypto.SHA512,
	wire.CKMECDSASHA1: crypto.SHA1, wire.CKMECDSASHA224: crypto.SHA224, wire.CKMECDSASHA256: crypto.SHA256,
	wire.CKMECDSASHA384: crypto.SHA384, wire.CKMECDSASHA512: crypto.SHA512,
}
