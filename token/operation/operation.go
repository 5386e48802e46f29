// Package operation describes operations with a private key to a token, and reads the token's answers.
//
// [For] takes an operation in the terms of PKCS#11, [ForDigest] and [ForMessage] take a signature in the terms of
// Go's package crypto. Each returns a [Plan]: the ways in which a token can do the operation. [Plan.Result] turns the
// token's answer into what the client wants, and [Plan.Verify] checks a signature with the public key.
//
// The package promises that nothing reaches a token that the table of mechanisms does not list: no unknown mechanism
// or parameter, no data of a wrong length, and no point that is not on the curve of the key. Verify accepts only the
// signature that the client asked for. The package keeps no copy of a result. Finding the key, logging in and talking
// to the module are the business of package token. The package does no I/O, and every function may be called from any
// goroutine.
package operation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"

	"p11-agent/token/wire"
)

// The errors of [For]. They name what a client can do better, and come before the token is asked for anything.
var (
	// ErrMechanism means that no key of this type does the function with this mechanism here.
	ErrMechanism = errors.New("the mechanism is not known for this function and this type of key")
	// ErrParams means that the mechanism has other parameters.
	ErrParams = errors.New("the parameters do not fit the mechanism")
	// ErrData means that the data have another form or length than the mechanism takes.
	ErrData = errors.New("the data do not fit the mechanism")
)

// ErrNotPermitted means that the token says that the key may not do the function.
var ErrNotPermitted = errors.New("the key may not be used for this")

// ErrCiphertext means that the token did not decrypt the data. It is the same for every reason, because a client that
// learns that the padding was wrong can decrypt data without the key.
var ErrCiphertext = errors.New("the token does not decrypt this")

// ErrWrong means that a token returned something other than the requested signature.
var ErrWrong = errors.New("the token gave a wrong signature")

// A Function is what a token does with a private key.
type Function = wire.Function

// The Functions.
const (
	Sign    = wire.Sign    // C_Sign, PKCS#11 v2.40 section 5.11
	Decrypt = wire.Decrypt // C_Decrypt, section 5.9
	Derive  = wire.Derive  // C_DeriveKey, section 5.13
)

// Bounds of an Operation, in bytes.
const (
	MaxData   = 256 << 10
	MaxSource = 4 << 10
)

// An Operation is work with a private key, in the terms of PKCS#11 v2.40.
type Operation struct {
	Function  Function
	Mechanism uint64 // CKM
	Params    Params // nil if the mechanism has none
	// Data are what to sign or to decrypt. A mechanism that hashes takes the message. For Derive, Data are empty: the
	// parameters hold everything.
	Data []byte
}

// Params are the parameters of a mechanism: a [PSS], an [OAEP] or an [ECDH1].
type Params interface{ params() }

// PSS are the parameters of CKM_RSA_PKCS_PSS and of the mechanisms that hash for it (CK_RSA_PKCS_PSS_PARAMS, PKCS#11
// Mechanisms v2.40 section 2.1.9). MGF has to use the same hash: no other signature can be verified here.
type PSS struct {
	Hash, MGF  uint64 // CKM, CKG
	SaltLength uint64 // bytes
}

// OAEP are the parameters of CKM_RSA_PKCS_OAEP (CK_RSA_PKCS_OAEP_PARAMS, PKCS#11 Mechanisms v2.40 section 2.1.7).
type OAEP struct {
	Hash, MGF uint64 // CKM, CKG
	Source    []byte // the label of CKZ_DATA_SPECIFIED, up to MaxSource bytes; usually empty
}

// ECDH1 are the parameters of CKM_ECDH1_DERIVE (CK_ECDH1_DERIVE_PARAMS, PKCS#11 Mechanisms v2.40 section 2.3.8).
type ECDH1 struct {
	KDF    uint64 // CKD_NULL; no other function is known here
	Shared []byte // empty, as CKD_NULL wants it
	// Public is the point of the other party: uncompressed, bare or in a DER OCTET STRING.
	Public []byte
}

func (PSS) params()   {}
func (OAEP) params()  {}
func (ECDH1) params() {}

// A use is a row of the table: a function with a mechanism and a key of some type.
type use struct {
	function  Function
	mechanism uint64 // CKM
	keyType   uint64 // CKK
}

// A scheme is what a mechanism does.
type scheme struct {
	hash   crypto.Hash // the mechanism hashes the data; 0: it takes them as they are
	params paramsKind
}

// paramsKind names a type of Params.
type paramsKind int

const (
	noParams paramsKind = iota
	pss
	oaep
	ecdh1
)

// table lists every operation that For accepts.
//
// CKM_RSA_X_509 is not in it. A raw signature is a raw decryption: a client that may only sign could decrypt.
var table = map[use]scheme{
	{Sign, wire.CKMRSAPKCS, wire.CKKRSA}:       {},
	{Sign, wire.CKMSHA1RSAPKCS, wire.CKKRSA}:   {hash: crypto.SHA1},
	{Sign, wire.CKMSHA224RSAPKCS, wire.CKKRSA}: {hash: crypto.SHA224},
	{Sign, wire.CKMSHA256RSAPKCS, wire.CKKRSA}: {hash: crypto.SHA256},
	{Sign, wire.CKMSHA384RSAPKCS, wire.CKKRSA}: {hash: crypto.SHA384},
	{Sign, wire.CKMSHA512RSAPKCS, wire.CKKRSA}: {hash: crypto.SHA512},

	{Sign, wire.CKMRSAPKCSPSS, wire.CKKRSA}:   {params: pss},
	{Sign, wire.CKMSHA1RSAPSS, wire.CKKRSA}:   {hash: crypto.SHA1, params: pss},
	{Sign, wire.CKMSHA224RSAPSS, wire.CKKRSA}: {hash: crypto.SHA224, params: pss},
	{Sign, wire.CKMSHA256RSAPSS, wire.CKKRSA}: {hash: crypto.SHA256, params: pss},
	{Sign, wire.CKMSHA384RSAPSS, wire.CKKRSA}: {hash: crypto.SHA384, params: pss},
	{Sign, wire.CKMSHA512RSAPSS, wire.CKKRSA}: {hash: crypto.SHA512, params: pss},

	{Sign, wire.CKMECDSA, wire.CKKEC}:       {},
	{Sign, wire.CKMECDSASHA1, wire.CKKEC}:   {hash: crypto.SHA1},
	{Sign, wire.CKMECDSASHA224, wire.CKKEC}: {hash: crypto.SHA224},
	{Sign, wire.CKMECDSASHA256, wire.CKKEC}: {hash: crypto.SHA256},
	{Sign, wire.CKMECDSASHA384, wire.CKKEC}: {hash: crypto.SHA384},
	{Sign, wire.CKMECDSASHA512, wire.CKKEC}: {hash: crypto.SHA512},

	{Sign, wire.CKMEdDSA, wire.CKKECEdwards}: {},

	{Decrypt, wire.CKMRSAPKCS, wire.CKKRSA}:     {},
	{Decrypt, wire.CKMRSAPKCSOAEP, wire.CKKRSA}: {params: oaep},

	{Derive, wire.CKMECDH1Derive, wire.CKKEC}: {params: ecdh1},
}

// mechanisms is the set of all mechanisms of the table.
var mechanisms = func() map[uint64]bool {
	all := make(map[uint64]bool)
	for u := range table {
		all[u.mechanism] = true
	}
	return all
}()

// Uses reports whether a Plan can have a mechanism (CKM).
func Uses(mechanism uint64) bool { return mechanisms[mechanism] }

// Ways returns the mechanisms (CKM) of which a token needs one, for a client to use a mechanism with a key. There are
// none if [For] refuses it.
func Ways(pub crypto.PublicKey, f Function, mechanism uint64) []uint64 {
	how, ok := table[use{f, mechanism, keyType(pub)}]
	switch _, isRSA := pub.(*rsa.PublicKey); {
	case !ok:
		return nil
	case how.hash == 0:
		return []uint64{mechanism}
	case how.params == pss:
		return []uint64{wire.CKMRSAPKCSPSS, mechanism}
	case isRSA:
		return []uint64{wire.CKMRSAPKCS, mechanism}
	default:
		return []uint64{wire.CKMECDSA, mechanism}
	}
}

// A Plan is an operation with one key that a token can do.
type Plan struct {
	Function Function
	// Methods are the ways to do it, best first. There is at least one.
	Methods []Method
	// ResultLen is the most bytes of the token's answer. The module process then need not ask the module for it.
	ResultLen uint32
	// DigestOnly means that the client gave a digest. So no mechanism that hashes the message can stand in.
	DigestOnly bool

	public    crypto.PublicKey
	signature signature
	raw       bool // Result keeps the encoding of PKCS#11
}

// A Method is one way to have a token do an operation: a mechanism, its parameters, and the data.
type Method struct {
	Mechanism uint64 // CKM
	Data      []byte
	params    wire.Params
}

// Describe writes the method into a request to a module process.
func (m Method) Describe(req *wire.Operate) {
	req.Mechanism, req.Data, req.Params = m.Mechanism, m.Data, m.params
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

// For makes the plan for an operation with the private key of pub. It returns [ErrMechanism], [ErrParams] or
// [ErrData] for an operation that no token is to see.
//
// Result then has the encoding of PKCS#11: of an ECDSA signature, the numbers r and s, each with the bytes of the
// curve.
func For(pub crypto.PublicKey, op Operation) (Plan, error) {
	how, ok := table[use{op.Function, op.Mechanism, keyType(pub)}]
	if !ok {
		return Plan{}, fmt.Errorf("%w: %v with mechanism %#x and %T", ErrMechanism, op.Function, op.Mechanism, pub)
	}
	if paramsOf(op.Params) != how.params {
		return Plan{}, fmt.Errorf("%w: mechanism %#x with %T", ErrParams, op.Mechanism, op.Params)
	}
	if len(op.Data) > MaxData {
		return Plan{}, fmt.Errorf("%w: %d bytes, and the limit is %d", ErrData, len(op.Data), MaxData)
	}
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if op.Function == Decrypt {
			return decryption(key, op)
		}
	case *ecdsa.PublicKey:
		if op.Function == Derive {
			return derivation(key, op)
		}
	}
	s, err := signatureOf(pub, op, how)
	if err != nil {
		return Plan{}, err
	}
	p, err := signing(pub, s)
	p.raw = true
	return p, err
}

// keyType returns the type (CKK) of a key. For an unknown key it returns a type that is not in the table.
func keyType(pub crypto.PublicKey) uint64 {
	switch pub.(type) {
	case *rsa.PublicKey:
		return wire.CKKRSA
	case *ecdsa.PublicKey:
		return wire.CKKEC
	case ed25519.PublicKey:
		return wire.CKKECEdwards
	}
	return ^uint64(0)
}

func paramsOf(p Params) paramsKind {
	switch p.(type) {
	case nil:
		return noParams
	case PSS:
		return pss
	case OAEP:
		return oaep
	case ECDH1:
		return ecdh1
	}
	return -1
}

// Result turns the answer of a token into what the client wants. A signature of [ForDigest] or [ForMessage] gets the
// encoding that the standard library and SSH expect. Result returns [ErrWrong] for bytes that cannot be a signature of
// the key. A plaintext or a derived secret is the answer itself, not a copy.
func (p *Plan) Result(answer []byte) ([]byte, error) {
	switch p.Function {
	case Sign:
		if p.raw {
			return fixed(p.public, answer)
		}
		return encode(p.public, answer)
	case Decrypt:
		if len(answer) > int(p.ResultLen) {
			return nil, fmt.Errorf("the token gave a plaintext of %d bytes", len(answer))
		}
	case Derive:
		if len(answer) != int(p.ResultLen) {
			return nil, fmt.Errorf("the token gave a secret of %d bytes in place of %d", len(answer), p.ResultLen)
		}
	}
	return answer, nil
}
