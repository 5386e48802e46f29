package agent

import (
	"bytes"
	"crypto"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"golang.org/x/crypto/ssh"
)

// algorithmFor returns the signature algorithm and hash that a request for a
// key means (RFC 9987 section 5.6.1). OpenSSH prefers SHA-256 when both are
// asked for (ssh-agent.c, agent_decode_alg).
func algorithmFor(key ssh.PublicKey, flags SignatureFlags) (string, crypto.Hash, error) {
	switch t := key.Type(); t {
	case ssh.KeyAlgoRSA:
		switch {
		case flags&SignatureRSASHA2256 != 0:
			return ssh.KeyAlgoRSASHA256, crypto.SHA256, nil
		case flags&SignatureRSASHA2512 != 0:
			return ssh.KeyAlgoRSASHA512, crypto.SHA512, nil
		default:
			return ssh.KeyAlgoRSA, crypto.SHA1, nil
		}
	case ssh.KeyAlgoECDSA256:
		return t, crypto.SHA256, nil
	case ssh.KeyAlgoECDSA384:
		return t, crypto.SHA384, nil
	case ssh.KeyAlgoECDSA521:
		return t, crypto.SHA512, nil
	case ssh.KeyAlgoED25519:
		return t, 0, nil
	default:
		return "", 0, fmt.Errorf("no signature algorithm is known for a key of type %s", t)
	}
}

// signature gives a signature as a token or the standard library makes it the
// form it has in SSH.
func signature(key ssh.PublicKey, algorithm string, raw []byte) (*ssh.Signature, error) {
	blob, err := signatureBlob(key, raw)
	if err != nil {
		return nil, err
	}
	return &ssh.Signature{Format: algorithm, Blob: blob}, nil
}

// signatureBlob turns a signature into the form it has in SSH (RFC 5656 section
// 3.1.2 for ECDSA; the others stay as they are).
func signatureBlob(key ssh.PublicKey, sig []byte) ([]byte, error) {
	switch key.Type() {
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		r, s, err := parseECDSA(sig)
		if err != nil {
			return nil, err
		}
		return ssh.Marshal(struct{ R, S *big.Int }{r, s}), nil
	}
	return bytes.Clone(sig), nil
}

func parseECDSA(sig []byte) (r, s *big.Int, err error) {
	var v struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(sig, &v)
	if err != nil || len(rest) > 0 {
		return nil, nil, errors.New("the token gave a malformed ECDSA signature")
	}
	return v.R, v.S, nil
}
