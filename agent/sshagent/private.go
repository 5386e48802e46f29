package sshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/door"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey"
	"p11-agent/pinentry/plain"
)

const (
	// maxRSABits bounds the numbers of RSA keys, as ssh-keygen does. The keyring has
	// narrower bounds.
	maxRSABits = 16384
	maxComment = 4096 // bytes
)

var errPrivate = errors.New("the private key is incomplete or wrong")

// add answers SSH_AGENTC_ADD_IDENTITY and SSH_AGENTC_ADD_ID_CONSTRAINED (RFC 9987 section 5.2).
// Upstream agents get keys of FIDO devices, as this agent cannot sign with them.
func (c *handler) add(ctx context.Context, message []byte) {
	in := reader{rest: message[1:]}
	kind := string(in.bytes())
	if strings.HasPrefix(kind, "sk-") {
		c.pass(ctx, message, "a key of a FIDO device ("+plain.Quoted(kind, maxQuoted)+")")
		return
	}
	r, err := parsePrivate(kind, &in)
	if err == nil && message[0] == msgAddIdentityConstraint {
		r.Constraints, err = parseConstraints(&in, false)
	}
	if err == nil {
		err = in.end()
	}
	if err != nil {
		c.reject(request.ActionAdd, err)
		return
	}
	size := r.Constraints.Size()
	if err := c.Keep(door.Memory, size); err != nil {
		c.reject(request.ActionAdd, err)
		return
	}
	defer c.Release(door.Memory, size)
	c.status(c.server.Keyring.Add(ctx, c.caller, r))
}

// parsePrivate reads a private key of a type and its comment (RFC 9987 sections 5.2.1 to 5.2.4, and
// OpenSSH's PROTOCOL.certkeys for keys with a certificate). The key shares no memory with the
// message.
func parsePrivate(kind string, in *reader) (r request.AddKey, err error) {
	keyType, certified := strings.CutSuffix(kind, "-cert-v01@openssh.com")
	var cert ssh.PublicKey
	if certified {
		blob := in.bytes()
		if in.failed {
			return r, errMalformed
		}
		if cert, err = parseKey(blob, maxCertificate); err != nil {
			return r, err
		}
		if _, ok := cert.(*ssh.Certificate); !ok || cert.Type() != kind {
			return r, errors.New("a certificate is expected, but there is a key of another type")
		}
	}
	switch keyType {
	case ssh.KeyAlgoRSA:
		r.Private, err = parseRSA(in, cert)
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		r.Private, err = parseECDSA(keyType, in, certified)
	case ssh.KeyAlgoED25519:
		r.Private, err = parseEd25519(in)
	default:
		return r, fmt.Errorf("a key of type %s cannot be used", plain.Quoted(kind, maxQuoted))
	}
	if err != nil {
		return r, err
	}
	comment := in.bytes()
	switch {
	case in.failed:
		return r, errMalformed
	case len(comment) > maxComment:
		return r, fmt.Errorf("the comment is longer than %d bytes", maxComment)
	case !sshkey.ReadableText(comment):
		return r, errNUL
	}
	r.Comment = strings.TrimSuffix(string(comment), "\x00") // a C string to ssh-agent
	if r.Public = cert; !certified {
		r.Public, err = ssh.NewPublicKey(r.Private.Public())
	}
	return r, err
}

// integer reads an mpint that is not negative (RFC 4251 section 5).
func (r *reader) integer() *big.Int {
	b := r.bytes()
	if len(b) > 0 && b[0]&0x80 != 0 || len(b) > maxRSABits/8+1 {
		r.failed = true
		return new(big.Int)
	}
	return new(big.Int).SetBytes(b)
}

// parseRSA reads an RSA key. The keyring checks whether the numbers belong together, which takes as
// long as a signature.
func parseRSA(in *reader, cert ssh.PublicKey) (crypto.Signer, error) {
	key := new(rsa.PrivateKey)
	if cert == nil {
		n, e := in.integer(), in.integer()
		if in.failed || !e.IsInt64() || e.Int64() > 1<<31-1 {
			return nil, errPrivate
		}
		key.N, key.E = n, int(e.Int64())
	} else {
		public, ok := cert.(*ssh.Certificate).Key.(ssh.CryptoPublicKey)
		if !ok {
			return nil, errPrivate
		}
		pub, ok := public.CryptoPublicKey().(*rsa.PublicKey)
		if !ok {
			return nil, errPrivate
		}
		key.PublicKey = *pub
	}
	key.D = in.integer()
	in.integer() // q⁻¹ mod p, which the keyring computes again
	key.Primes = []*big.Int{in.integer(), in.integer()}
	if in.failed {
		return nil, errPrivate
	}
	return key, nil
}

func parseECDSA(kind string, in *reader, certified bool) (crypto.Signer, error) {
	curve := map[string]elliptic.Curve{
		ssh.KeyAlgoECDSA256: elliptic.P256(), ssh.KeyAlgoECDSA384: elliptic.P384(), ssh.KeyAlgoECDSA521: elliptic.P521(),
	}[kind]
	var name, point []byte
	if !certified {
		name, point = in.bytes(), in.bytes()
	}
	d := in.integer()
	if in.failed || d.BitLen() > curve.Params().BitSize {
		return nil, errPrivate
	}
	key, err := ecdsa.ParseRawPrivateKey(curve, d.FillBytes(make([]byte, (curve.Params().BitSize+7)/8)))
	if err != nil {
		return nil, errPrivate
	}
	if !certified {
		want, err := key.PublicKey.Bytes()
		if err != nil || !bytes.Equal(point, want) || kind != "ecdsa-sha2-"+string(name) {
			return nil, errPrivate
		}
	}
	return key, nil
}

func parseEd25519(in *reader) (crypto.Signer, error) {
	public, private := in.bytes(), in.bytes()
	if in.failed || len(private) != ed25519.PrivateKeySize {
		return nil, errPrivate
	}
	key := ed25519.NewKeyFromSeed(private[:ed25519.SeedSize])
	if !bytes.Equal(private, key) || !bytes.Equal(public, private[ed25519.SeedSize:]) {
		return nil, errPrivate
	}
	return key, nil
}
