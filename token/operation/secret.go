package operation

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"fmt"

	"p11-agent/token/wire"
)

// decryption makes the plan for a decryption.
func decryption(key *rsa.PublicKey, op Operation) (Plan, error) {
	if len(op.Data) != key.Size() {
		return Plan{}, fmt.Errorf("%w: a ciphertext of %d bytes, and the key has %d", ErrData, len(op.Data), key.Size())
	}
	m := Method{Mechanism: op.Mechanism, Data: op.Data}
	if o, ok := op.Params.(OAEP); ok {
		h, known := hashOf(o.Hash)
		if !known || !isMGF(o.MGF) || len(o.Source) > MaxSource {
			return Plan{}, fmt.Errorf("%w: OAEP with hash %#x, function %d and %d bytes of source", ErrParams, o.Hash, o.MGF, len(o.Source))
		}
		if key.Size() < 2*h.Size()+2 { // RFC 8017 section 7.1.2
			return Plan{}, fmt.Errorf("%w: the key is too short for OAEP with %v", ErrParams, h)
		}
		m.params = wire.Params{Hash: o.Hash, MGF: o.MGF, Source: o.Source}
	}
	return Plan{Function: Decrypt, Methods: []Method{m}, ResultLen: uint32(key.Size()), public: key}, nil
}

// derivation makes the plan for a derivation.
func derivation(key *ecdsa.PublicKey, op Operation) (Plan, error) {
	e, _ := op.Params.(ECDH1)
	if e.KDF != wire.CKDNull || len(e.Shared) > 0 {
		return Plan{}, fmt.Errorf("%w: ECDH with function %d and %d bytes of shared data; only CKD_NULL is known", ErrParams, e.KDF, len(e.Shared))
	}
	if len(op.Data) > 0 {
		return Plan{}, fmt.Errorf("%w: a derivation takes none", ErrData)
	}
	own, err := key.ECDH()
	if err != nil {
		return Plan{}, fmt.Errorf("%w: %w", ErrMechanism, err)
	}
	size := coordinateSize(key)
	point := bare(e.Public, 1+2*size)
	// A token that computes with a point of another curve reveals its key (invalid-curve attack). NewPublicKey takes
	// only points of this curve, and not the point at infinity.
	if _, err := own.Curve().NewPublicKey(point); err != nil {
		return Plan{}, fmt.Errorf("%w: the point of the other party is not on the curve of the key", ErrParams)
	}
	m := Method{Mechanism: op.Mechanism, Data: point}
	return Plan{Function: Derive, Methods: []Method{m}, ResultLen: uint32(size), public: key}, nil
}

// bare returns a point of n bytes without the DER OCTET STRING that may be around it.
func bare(point []byte, n int) []byte {
	const octetString = 0x04
	der := []byte{octetString, byte(n)}
	if n > 0x7f {
		der = []byte{octetString, 0x81, byte(n)}
	}
	if len(point) == len(der)+n && string(point[:len(der)]) == string(der) {
		return point[len(der):]
	}
	return point
}
