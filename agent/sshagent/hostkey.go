package sshagent

import (
	"bytes"
	"fmt"
	"slices"

	"golang.org/x/crypto/ssh"
)

// An unknownKey is the wire form of a public key whose type is unknown here. It can be compared,
// and verifies no signature.
type unknownKey struct {
	kind string
	wire []byte
}

func (k *unknownKey) Type() string { return k.kind }

func (k *unknownKey) Marshal() []byte { return k.wire }

func (k *unknownKey) Verify([]byte, *ssh.Signature) error {
	return fmt.Errorf("signatures of keys of type %q cannot be verified", k.kind)
}

// knownTypes are the types of keys, and of certificates, that this package reads. It writes the
// names of DSA out, as x/crypto/ssh deprecates its constants.
var knownTypes = []string{
	ssh.KeyAlgoRSA, "ssh-dss", ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoSKED25519,
	ssh.CertAlgoRSAv01, "ssh-dss-cert-v01@openssh.com", ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
	ssh.CertAlgoED25519v01, ssh.CertAlgoSKECDSA256v01, ssh.CertAlgoSKED25519v01,
}

// parseAnyKey reads a public key to compare it with others. The key may have a type of a newer
// OpenSSH. The key shares no memory with blob.
func parseAnyKey(blob []byte, limit int) (ssh.PublicKey, error) {
	key, err := parseKey(blob, limit)
	if err == nil || len(blob) > limit {
		return key, err
	}
	in := reader{rest: blob}
	kind := in.bytes()
	// A name has up to 64 letters, digits and signs (RFC 4251 section 6).
	named := len(kind) > 0 && len(kind) <= 64 && !bytes.ContainsFunc(kind, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ',' })
	if !named || slices.Contains(knownTypes, string(kind)) || len(in.rest) == 0 {
		return nil, err
	}
	return &unknownKey{kind: string(kind), wire: bytes.Clone(blob)}, nil
}
