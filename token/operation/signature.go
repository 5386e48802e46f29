package operation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	_ "crypto/sha1" // the hashes of the table
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"p11-agent/token/wire"
)

// A signature says what to sign, and how.
type signature struct {
	// digest is the hash of the message. For Ed25519 it is the message itself (RFC 8032: PureEdDSA). Without a hash, it
	// is what the client wants to have padded.
	digest  []byte
	message []byte // nil if the client gave a digest only
	hash    crypto.Hash

	pss  bool
	salt uint64 // of PSS, in bytes
	// verifySalt is the salt in the terms of rsa.PSSOptions.
	verifySalt int
}

// ForDigest makes the plan to sign a digest that the client computed with opts.HashFunc. It fails if the digest has the
// wrong length for that hash. As *rsa.PSSOptions, opts name the padding.
func ForDigest(pub crypto.PublicKey, digest []byte, opts crypto.SignerOpts) (Plan, error) {
	h := opts.HashFunc()
	if _, known := hashes[h]; known && len(digest) != h.Size() {
		return Plan{}, fmt.Errorf("sign: the digest has %d bytes, but %v makes %d", len(digest), h, h.Size())
	}
	return forOptions(pub, signature{digest: digest}, opts)
}

// ForMessage makes the plan to sign a message, and hashes it with opts.HashFunc. It fails if the program does not
// contain that hash.
func ForMessage(pub crypto.PublicKey, message []byte, opts crypto.SignerOpts) (Plan, error) {
	h := opts.HashFunc()
	if h == 0 {
		return forOptions(pub, signature{digest: message}, opts)
	}
	if !h.Available() {
		return Plan{}, fmt.Errorf("sign: hash %v is not available", h)
	}
	return forOptions(pub, signature{digest: sum(h, message), message: message}, opts)
}

// sum returns the hash of a message.
func sum(h crypto.Hash, message []byte) []byte {
	w := h.New()
	_, _ = w.Write(message) // hash.Hash never fails
	return w.Sum(nil)
}

// forOptions makes the plan for a signature whose hash and padding opts name.
func forOptions(pub crypto.PublicKey, s signature, opts crypto.SignerOpts) (Plan, error) {
	s.hash = opts.HashFunc()
	if _, ok := pub.(ed25519.PublicKey); ok {
		if s.hash != 0 {
			return Plan{}, errors.New("sign: Ed25519 signs messages, not digests")
		}
		if o, ok := opts.(*ed25519.Options); ok && o.Context != "" {
			return Plan{}, errors.New("sign: Ed25519 with a context is not supported")
		}
		return signing(pub, s)
	}
	if _, ok := hashes[s.hash]; !ok {
		return Plan{}, fmt.Errorf("sign: hash %v is not supported", s.hash)
	}
	key, isRSA := pub.(*rsa.PublicKey)
	if o, ok := opts.(*rsa.PSSOptions); ok && isRSA {
		salt, err := saltLength(o, key, s.hash)
		if err != nil {
			return Plan{}, err
		}
		s.pss, s.salt, s.verifySalt = true, salt, o.SaltLength
	}
	return signing(pub, s)
}

// saltLength returns the length of the salt in bytes. PKCS#11 has no value for "as long as possible", so this
// function computes that length.
func saltLength(o *rsa.PSSOptions, key *rsa.PublicKey, h crypto.Hash) (uint64, error) {
	switch n := o.SaltLength; {
	case n == rsa.PSSSaltLengthEqualsHash:
		return uint64(h.Size()), nil
	case n == rsa.PSSSaltLengthAuto:
		return longestSalt(key, h), nil
	case n > 0:
		return uint64(n), nil
	default:
		return 0, fmt.Errorf("sign: invalid salt length %d", n)
	}
}

// longestSalt returns the most bytes of a salt (RFC 8017 section 9.1.1).
func longestSalt(key *rsa.PublicKey, h crypto.Hash) uint64 {
	return uint64(max(0, (key.N.BitLen()-1+7)/8-2-h.Size()))
}

// maxDigest bounds the bytes that CKM_ECDSA takes. No hash is longer, and no curve but P-521, which has 66.
const maxDigest = 66

// signatureOf returns the signature that an operation asks for.
func signatureOf(pub crypto.PublicKey, op Operation, how scheme) (signature, error) {
	s := signature{digest: op.Data, hash: how.hash}
	if how.hash != 0 {
		s.digest, s.message = sum(how.hash, op.Data), op.Data
		if s.message == nil {
			s.message = []byte{} // the empty message
		}
	}
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if how.params == pss {
			return signatureOfPSS(key, s, op.Params.(PSS))
		}
		// RFC 8017 section 8.2.1: the padding takes 11 bytes.
		if how.hash == 0 && (len(op.Data) == 0 || len(op.Data) > key.Size()-11) {
			return s, fmt.Errorf("%w: %d bytes, and the key takes 1 to %d", ErrData, len(op.Data), key.Size()-11)
		}
	case *ecdsa.PublicKey:
		if how.hash == 0 && (len(op.Data) == 0 || len(op.Data) > maxDigest) {
			return s, fmt.Errorf("%w: a digest of %d bytes", ErrData, len(op.Data))
		}
	}
	return s, nil
}

func signatureOfPSS(key *rsa.PublicKey, s signature, p PSS) (signature, error) {
	h, known := hashOf(p.Hash)
	switch {
	case !known || p.MGF != hashes[h].mgf:
		return s, fmt.Errorf("%w: PSS with hash %#x and function %d", ErrParams, p.Hash, p.MGF)
	case s.hash != 0 && s.hash != h:
		return s, fmt.Errorf("%w: PSS with hash %#x, and the mechanism has another one", ErrParams, p.Hash)
	case p.SaltLength > longestSalt(key, h):
		return s, fmt.Errorf("%w: PSS with a salt of %d bytes", ErrParams, p.SaltLength)
	case len(s.digest) != h.Size():
		return s, fmt.Errorf("%w: the digest has %d bytes, but %v makes %d", ErrData, len(s.digest), h, h.Size())
	}
	// For package rsa, 0 stands for a salt of any length. A signature with another salt is as good.
	s.hash, s.pss, s.salt, s.verifySalt = h, true, p.SaltLength, int(p.SaltLength)
	return s, nil
}

// hashInfo holds what PKCS #1 and PKCS#11 say about a hash.
type hashInfo struct {
	prefix []byte // of DigestInfo (RFC 8017 section 9.2)
	ckm    uint64 // the hash as a parameter
	mgf    uint64 // CKG: the mask generation function that uses it

	// The mechanisms with which the token hashes the message itself.
	rsa, pss, ecdsa uint64
}

var hashes = map[crypto.Hash]hashInfo{
	crypto.SHA1: {
		prefix: []byte{0x30, 0x21, 0x30, 0x09, 0x06, 0x05, 0x2b, 0x0e, 0x03, 0x02, 0x1a, 0x05, 0x00, 0x04, 0x14},
		ckm:    wire.CKMSHA1, mgf: wire.CKGMGF1SHA1,
		rsa: wire.CKMSHA1RSAPKCS, pss: wire.CKMSHA1RSAPSS, ecdsa: wire.CKMECDSASHA1,
	},
	crypto.SHA224: {
		prefix: []byte{0x30, 0x2d, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x04, 0x05, 0x00, 0x04, 0x1c},
		ckm:    wire.CKMSHA224, mgf: wire.CKGMGF1SHA224,
		rsa: wire.CKMSHA224RSAPKCS, pss: wire.CKMSHA224RSAPSS, ecdsa: wire.CKMECDSASHA224,
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

// hashOf returns the hash that a parameter (CKM) names.
func hashOf(ckm uint64) (crypto.Hash, bool) {
	for h, info := range hashes {
		if info.ckm == ckm {
			return h, true
		}
	}
	return 0, false
}

// isMGF reports whether a mask generation function (CKG) is known.
func isMGF(ckg uint64) bool {
	for _, info := range hashes {
		if info.mgf == ckg {
			return true
		}
	}
	return false
}

// signing makes the plan for a signature. The digest comes first, because it keeps the request small. The message,
// which the token hashes, comes second.
func signing(pub crypto.PublicKey, s signature) (Plan, error) {
	p := Plan{Function: Sign, ResultLen: length(pub), DigestOnly: s.message == nil, public: pub, signature: s}
	hash := hashes[s.hash]
	var digest Method
	var message uint64 // the mechanism, 0 if the token cannot hash
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if s.pss {
			digest = Method{wire.CKMRSAPKCSPSS, s.digest, wire.Params{Hash: hash.ckm, MGF: hash.mgf, Salt: s.salt}}
			message = hash.pss
			break
		}
		digest = Method{Mechanism: wire.CKMRSAPKCS, Data: slices.Concat(hash.prefix, s.digest)}
		message = hash.rsa
	case *ecdsa.PublicKey:
		// Of a longer digest, only as many bits count as the curve has (FIPS 186-5 section 6.4.1). libykcs11 2.2
		// refuses a longer digest.
		digest = Method{Mechanism: wire.CKMECDSA, Data: s.digest[:min(len(s.digest), coordinateSize(key))]}
		message = hash.ecdsa
	case ed25519.PublicKey:
		digest = Method{Mechanism: wire.CKMEdDSA, Data: s.digest}
	default:
		return Plan{}, fmt.Errorf("sign: a key of type %T is not supported", pub)
	}
	p.Methods = []Method{digest}
	if s.message != nil && message != 0 {
		p.Methods = append(p.Methods, Method{message, s.message, digest.params})
	}
	return p, nil
}

// coordinateSize returns the length in bytes of one number of an ECDSA signature.
func coordinateSize(key *ecdsa.PublicKey) int { return (key.Params().BitSize + 7) / 8 }

// length returns the length in bytes of the signatures that a token makes with a key.
func length(pub crypto.PublicKey) uint32 {
	switch key := pub.(type) {
	case *rsa.PublicKey:
		return uint32(key.Size())
	case *ecdsa.PublicKey:
		return uint32(2 * coordinateSize(key))
	default:
		return ed25519.SignatureSize
	}
}

// encode turns the signature that a token returned (PKCS#11 Mechanisms v2.40 sections 2.1.5 and 2.3.1) into what the
// standard library and SSH expect: ASN.1 for ECDSA, fixed length for the other keys.
func encode(pub crypto.PublicKey, raw []byte) ([]byte, error) {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return fixed(pub, raw)
	}
	r, s, ok := numbers(key, raw)
	if !ok {
		return nil, ErrWrong
	}
	return asn1.Marshal(struct{ R, S *big.Int }{r, s})
}

// fixed returns the signature that a token returned with the length that PKCS#11 wants.
func fixed(pub crypto.PublicKey, raw []byte) ([]byte, error) {
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
		r, s, ok := numbers(key, raw)
		if n := coordinateSize(key); ok && len(raw) != 2*n {
			raw = make([]byte, 2*n)
			r.FillBytes(raw[:n])
			s.FillBytes(raw[n:])
		}
		if ok {
			return raw, nil
		}
	case ed25519.PublicKey:
		if len(raw) == ed25519.SignatureSize {
			return raw, nil
		}
	}
	return nil, ErrWrong
}

// numbers returns the numbers of an ECDSA signature. It reports false if they are not in the range of the curve.
func numbers(key *ecdsa.PublicKey, raw []byte) (r, s *big.Int, ok bool) {
	order, half := key.Params().N, len(raw)/2
	r, s = new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])
	return r, s, len(raw)%2 == 0 && r.Sign() > 0 && s.Sign() > 0 && r.Cmp(order) < 0 && s.Cmp(order) < 0
}

// Verify checks a signature that Result returned. It returns [ErrWrong] if the signature does not belong to the key
// and the operation. Results of other functions cannot be verified.
func (p *Plan) Verify(result []byte) error {
	ok := false
	s := &p.signature
	switch key := p.public.(type) {
	case *rsa.PublicKey:
		if s.pss {
			ok = rsa.VerifyPSS(key, s.hash, s.digest, result, &rsa.PSSOptions{SaltLength: s.verifySalt}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(key, s.hash, s.digest, result) == nil
		}
	case *ecdsa.PublicKey:
		if p.raw {
			n := len(result) / 2
			ok = ecdsa.Verify(key, s.digest, new(big.Int).SetBytes(result[:n]), new(big.Int).SetBytes(result[n:]))
		} else {
			ok = ecdsa.VerifyASN1(key, s.digest, result)
		}
	case ed25519.PublicKey:
		ok = ed25519.Verify(key, s.digest, result)
	}
	if !ok {
		return ErrWrong
	}
	return nil
}
