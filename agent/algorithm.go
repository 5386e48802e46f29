package agent

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

// algorithmFor returns the signature algorithm and the hash for a request with these flags
// (RFC 9987 section 5.6.1). If both RSA flags are set, it takes SHA-256, as OpenSSH does
// (ssh-agent.c, agent_decode_alg).
func algorithmFor(key ssh.PublicKey, flags request.SignatureFlags) (string, crypto.Hash, error) {
	switch t := key.Type(); t {
	case ssh.KeyAlgoRSA:
		switch {
		case flags&request.SignatureRSASHA2256 != 0:
			return ssh.KeyAlgoRSASHA256, crypto.SHA256, nil
		case flags&request.SignatureRSASHA2512 != 0:
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

// signature turns a signature of a token or of the standard library into the form that SSH
// has.
func signature(key ssh.PublicKey, algorithm string, raw []byte) (*ssh.Signature, error) {
	blob, err := signatureBlob(key, raw)
	if err != nil {
		return nil, err
	}
	return &ssh.Signature{Format: algorithm, Blob: blob}, nil
}

// signatureBlob returns the blob of a signature in SSH. An ECDSA signature gets another
// form (RFC 5656 section 3.1.2). Other signatures stay as they are.
func signatureBlob(key ssh.PublicKey, sig []byte) ([]byte, error) {
	switch key.Type() {
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		r, s, ok := parseECDSA(sig)
		if !ok {
			return nil, errors.New("the token gave a malformed ECDSA signature")
		}
		blob := make([]byte, 0, 4+len(r)+4+len(s))
		for _, n := range [...][]byte{r, s} {
			blob = append(binary.BigEndian.AppendUint32(blob, uint32(len(n))), n...)
		}
		return blob, nil
	}
	return bytes.Clone(sig), nil
}

// parseECDSA returns the two numbers of a signature in DER (RFC 3279 section 2.2.3). Each
// has as few bytes as possible, with the highest bit clear. SSH has the same form of
// positive numbers.
func parseECDSA(sig []byte) (r, s []byte, ok bool) {
	in, rest, ok := element(sig, 0x30)
	if !ok || len(rest) > 0 {
		return nil, nil, false
	}
	if r, in, ok = positive(in); !ok {
		return nil, nil, false
	}
	s, in, ok = positive(in)
	return r, s, ok && len(in) == 0
}

// positive takes a number above 0 from the front of in.
func positive(in []byte) (number, rest []byte, ok bool) {
	n, rest, ok := element(in, 0x02)
	ok = ok && len(n) > 0 && n[0] < 0x80 && (n[0] != 0 || len(n) > 1 && n[1] >= 0x80)
	return n, rest, ok
}

// element takes an element with this tag, of up to 255 bytes, from the front of in.
func element(in []byte, tag byte) (content, rest []byte, ok bool) {
	if len(in) < 2 || in[0] != tag {
		return nil, nil, false
	}
	size, in := int(in[1]), in[2:]
	if size == 0x81 && len(in) > 0 && in[0] >= 0x80 {
		size, in = int(in[0]), in[1:]
	} else if size >= 0x80 {
		return nil, nil, false
	}
	if size > len(in) {
		return nil, nil, false
	}
	return in[:size], in[size:], true
}
