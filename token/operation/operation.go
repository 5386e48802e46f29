// Package operation describes signatures to a token and reads the token's answers.
//
// A [Request] holds what a client wants to have signed. [Request.Methods] lists the PKCS#11 mechanisms that can
// make the signature, with the parameters and the data for each. [Encode] turns the token's answer into the
// encoding of the standard library, and [Request.Verify] checks it with the public key.
//
// The package promises that no data of a wrong length reaches a token, and that Verify accepts only the signature
// that the client asked for. Finding the key, logging in and talking to the module are the business of package
// token. The package does no I/O, and every function may be called from any goroutine.
package operation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"p11-agent/token/wire"
)

// ErrWrong means that a token returned something other than the requested signature.
var ErrWrong = errors.New("the token gave a wrong signature")

// A Request holds what a client wants to have signed.
type Request struct {
	// Digest is the hash of the message. For Ed25519 it is the message itself (RFC 8032: PureEdDSA).
	Digest []byte
	// Message is the message, or nil if the client sent its digest only.
	Message []byte
	// Options name the hash and, as *rsa.PSSOptions, the padding.
	Options crypto.SignerOpts
}

// ForDigest makes the request for a digest that the client computed with opts.HashFunc. It fails if the digest has
// the wrong length for that hash.
func ForDigest(digest []byte, opts crypto.SignerOpts) (Request, error) {
	h := opts.HashFunc()
	if _, known := hashes[h]; known && len(digest) != h.Size() {
		return Request{}, fmt.Errorf("sign: the digest has %d bytes, but %v makes %d", len(digest), h, h.Size())
	}
	return Request{Digest: digest, Options: opts}, nil
}

// ForMessage makes the request for a message, and hashes the message with opts.HashFunc. It fails if the program
// does not contain that hash.
func ForMessage(message []byte, opts crypto.SignerOpts) (Request, error) {
	h := opts.HashFunc()
	if h == 0 {
		return Request{Digest: message, Options: opts}, nil
	}
	if !h.Available() {
		return Request{}, fmt.Errorf("sign: hash %v is not available", h)
	}
	w := h.New()
	_, _ = w.Write(message) // hash.Hash never fails
	return Request{Digest: w.Sum(nil), Message: message, Options: opts}, nil
}

// A Method is one way to have a token make a signature: a mechanism, its parameters, and the data to sign.
type Method struct {
	Mechanism uint64 // CKM
	Data      []byte
	pss       pssParams
}

// pssParams is CK_RSA_PKCS_PSS_PARAMS, zero for other mechanisms (PKCS#11 v2.40 section 2.1.9).
type pssParams struct{ hash, mgf, saltLength uint64 }

// Describe writes the method into a request to a module process.
func (m Method) Describe(req *wire.Operate) {
	req.Mechanism, req.Data = m.Mechanism, m.Data
	req.Params = wire.Params{Hash: m.pss.hash, MGF: m.pss.mgf, Salt: m.pss.saltLength}
}

// hashInfo holds what PKCS #1 and PKCS#11 say about a hash.
type hashInfo struct {
	prefix []byte // of DigestInfo (RFC 8017 section 9.2)
	ckm    uint64 // the hash as a parameter
	mgf    uint64 // CKG: the mask generation function that uses it

	// The mechanisms with which the token hashes the message itself. 0: there is no such mechanism.
	rsa, pss, ecdsa uint64
}

var hashes = map[crypto.Hash]hashInfo{
	crypto.SHA1: {
		prefix: []byte{0x30, 0x21, 0x30, 0x09, 0x06, 0x05, 0x2b, 0x0e, 0x03, 0x02, 0x1a, 0x05, 0x00, 0x04, 0x14},
		ckm:    wire.CKMSHA1, mgf: wire.CKGMGF1SHA1,
		rsa: wire.CKMSHA1RSAPKCS, ecdsa: wire.CKMECDSASHA1,
	},
	crypto.SHA256: {
		prefix: []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
		ckm:    wire.CKMSHA256, mgf: wire.CKGMGF1SHA256,
		rsa: wire.CKMSHA256RSAPKCS, pss: wire.CKMSHA256RSAPSS, ecdsa: wire.CKMECDSASHA256,
	},
	crypto.SHA384: {
		prefix: []byte{0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
		ckm:    wire.CKMSHA384, mgf: wire.CKGMGF1SHA384,
		rsa: wire.CKMSHA384RSAPKCS, pss: wire.CKMSHA384RSAPSS, ecdsa: wire.CKMECDSASHA384,
	},
	crypto.SHA512: {
		prefix: []byte{0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
		ckm:    wire.CKMSHA512, mgf: wire.CKGMGF1SHA512,
		rsa: wire.CKMSHA512RSAPKCS, pss: wire.CKMSHA512RSAPSS, ecdsa: wire.CKMECDSASHA512,
	},
}

// mechanisms is the set of all mechanisms that Methods can return.
var mechanisms = func() map[uint64]bool {
	all := map[uint64]bool{wire.CKMRSAPKCS: true, wire.CKMRSAPKCSPSS: true, wire.CKMECDSA: true, wire.CKMEdDSA: true}
	for _, h := range hashes {
		for _, m := range []uint64{h.rsa, h.pss, h.ecdsa} {
			if m != 0 {
				all[m] = true
			}
		}
	}
	return all
}()

// Uses reports whether Methods can return a mechanism (CKM).
func Uses(mechanism uint64) bool { return mechanisms[mechanism] }

// Methods returns the ways to make the signature with a key, best first. The digest comes first, because it keeps
// the request small. The message, which the token hashes, comes second.
func (r Request) Methods(pub crypto.PublicKey) ([]Method, error) {
	if _, ok := pub.(ed25519.PublicKey); ok {
		return r.ed25519Methods()
	}
	hash, ok := hashes[r.Options.HashFunc()]
	if !ok {
		return nil, fmt.Errorf("sign: hash %v is not supported", r.Options.HashFunc())
	}
	var digest Method
	var message uint64 // the mechanism, 0 if the token cannot hash it
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if pss, ok := r.Options.(*rsa.PSSOptions); ok {
			salt, err := saltLength(pss, key, r.Options.HashFunc())
			if err != nil {
				return nil, err
			}
			digest = Method{wire.CKMRSAPKCSPSS, r.Digest, pssParams{hash.ckm, hash.mgf, salt}}
			message = hash.pss
			break
		}
		digest = Method{Mechanism: wire.CKMRSAPKCS, Data: slices.Concat(hash.prefix, r.Digest)}
		message = hash.rsa
	case *ecdsa.PublicKey:
		// Of a longer digest, only as many bits count as the curve has (FIPS 186-5 section 6.4.1). libykcs11 2.2
		// refuses a longer digest.
		size := coordinateSize(key)
		digest = Method{Mechanism: wire.CKMECDSA, Data: r.Digest[:min(len(r.Digest), size)]}
		message = hash.ecdsa
	default:
		return nil, nil
	}
	all := []Method{digest}
	if r.Message != nil && message != 0 {
		all = append(all, Method{message, r.Message, digest.pss})
	}
	return all, nil
}

func (r Request) ed25519Methods() ([]Method, error) {
	if r.Options.HashFunc() != 0 {
		return nil, errors.New("sign: Ed25519 signs messages, not digests")
	}
	if o, ok := r.Options.(*ed25519.Options); ok && o.Context != "" {
		return nil, errors.New("sign: Ed25519 with a context is not supported")
	}
	return []Method{{Mechanism: wire.CKMEdDSA, Data: r.Digest}}, nil
}

// Prefer returns the methods in another order: those whose mechanism the token refuses come last.
func Prefer(methods []Method, refused func(mechanism uint64) bool) []Method {
	var good, bad []Method
	for _, m := range methods {
		if refused(m.Mechanism) {
			bad = append(bad, m)
		} else {
			good = append(good, m)
		}
	}
	return append(good, bad...)
}

// saltLength returns the length of the salt in bytes. PKCS#11 has no value for "as long as possible", so this
// function computes that length (RFC 8017 section 9.1.1).
func saltLength(o *rsa.PSSOptions, key *rsa.PublicKey, h crypto.Hash) (uint64, error) {
	switch n := o.SaltLength; {
	case n == rsa.PSSSaltLengthEqualsHash:
		return uint64(h.Size()), nil
	case n == rsa.PSSSaltLengthAuto:
		return uint64((key.N.BitLen()-1+7)/8 - 2 - h.Size()), nil
	case n > 0:
		return uint64(n), nil
	default:
		return 0, fmt.Errorf("sign: invalid salt length %d", n)
	}
}

// coordinateSize returns the length in bytes of one number of an ECDSA signature.
func coordinateSize(key *ecdsa.PublicKey) int { return (key.Params().BitSize + 7) / 8 }

// Length returns the length in bytes of the signatures that a token makes with a key, before Encode. The module
// process then need not ask the module for it.
func Length(pub crypto.PublicKey) uint32 {
	switch key := pub.(type) {
	case *rsa.PublicKey:
		return uint32(key.Size())
	case *ecdsa.PublicKey:
		return uint32(2 * coordinateSize(key))
	default:
		return ed25519.SignatureSize
	}
}

// Encode turns the signature that a token returned (PKCS#11 v2.40 sections 2.1.5 and 2.3.1) into what the standard
// library and SSH expect: ASN.1 for ECDSA, fixed length for the other keys. It returns [ErrWrong] for bytes that
// cannot be a signature of the key.
func Encode(pub crypto.PublicKey, raw []byte) ([]byte, error) {
	switch key := pub.(type) {
	case *rsa.PublicKey:
		// Some tokens drop leading zeros.
		if n := key.Size() - len(raw); n > 0 && len(raw) > 0 {
			raw = append(make([]byte, n), raw...)
		}
		if len(raw) == key.Size() {
			return raw, nil
		}
	case *ecdsa.PublicKey:
		order, half := key.Params().N, len(raw)/2
		r, s := new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])
		if len(raw)%2 == 0 && r.Sign() > 0 && s.Sign() > 0 && r.Cmp(order) < 0 && s.Cmp(order) < 0 {
			return asn1.Marshal(struct{ R, S *big.Int }{r, s})
		}
	case ed25519.PublicKey:
		if len(raw) == ed25519.SignatureSize {
			return raw, nil
		}
	}
	return nil, ErrWrong
}

// Verify checks a signature that Encode returned. It returns [ErrWrong] if the signature does not belong to the
// key and the request.
func (r Request) Verify(pub crypto.PublicKey, sig []byte) error {
	ok := false
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if pss, isPSS := r.Options.(*rsa.PSSOptions); isPSS {
			ok = rsa.VerifyPSS(key, r.Options.HashFunc(), r.Digest, sig, &rsa.PSSOptions{SaltLength: pss.SaltLength}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(key, r.Options.HashFunc(), r.Digest, sig) == nil
		}
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(key, r.Digest, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(key, r.Digest, sig)
	}
	if !ok {
		return ErrWrong
	}
	return nil
}
