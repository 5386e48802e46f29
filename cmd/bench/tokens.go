package main

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// A kind of key.
type kind struct {
	name    string // for people
	arg     string // for load
	id      int
	blob    string // how the agent calls its type
	bits    int    // RSA only
	flags   uint32 // of a request to sign
	bare    string // the mechanism
	message func(data []byte) []byte
}

// digestInfo is what PKCS#1 puts in front of a SHA-256 digest.
var digestInfo, _ = hex.DecodeString("3031300d060960864801650304020105000420") // a constant

func sum256(data []byte) []byte { d := sha256.Sum256(data); return d[:] }
func sum384(data []byte) []byte { d := sha512.Sum384(data); return d[:] }
func pkcs1(data []byte) []byte  { return append(slices.Clone(digestInfo), sum256(data)...) }
func whole(data []byte) []byte  { return data }

// kinds are what signatures are measured with: CKM_ECDSA, CKM_EDDSA and
// CKM_RSA_PKCS.
var kinds = []kind{
	{"P-256", "p256", 1, "ecdsa-sha2-nistp256", 0, 0, "0x1041", sum256},
	{"P-384", "p384", 2, "ecdsa-sha2-nistp384", 0, 0, "0x1041", sum384},
	{"Ed25519", "ed25519", 3, "ssh-ed25519", 0, 0, "0x1057", whole},
	{"RSA-2048", "rsa2048", 4, "ssh-rsa", 2048, 2, "0x1", pkcs1},
	{"RSA-4096", "rsa4096", 5, "ssh-rsa", 4096, 2, "0x1", pkcs1},
}

// p256 is the kind of keys that all but signatures is measured with.
var p256 = &kinds[0]

// text appends a string as RFC 4251 has it.
func text(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// toSign is what is signed: an SSH signature, which agents sign without asking
// (PROTOCOL.sshsig).
func toSign() []byte {
	b := text([]byte("SSHSIG"), "file")
	b = text(b, "")
	b = text(b, "sha512")
	digest := sha512.Sum512([]byte("p11-agent"))
	return text(b, string(digest[:]))
}

// tokens is a token and its configuration for SoftHSM.
type tokens struct {
	dir  string
	keys []int // their IDs
}

// env is what programs need to use it.
func (t *tokens) env() []string {
	return []string{"SOFTHSM2_CONF=" + filepath.Join(t.dir, "softhsm2.conf")}
}

// newTokens makes an empty token.
func (b *bench) newTokens(ctx context.Context) (*tokens, error) {
	dir, err := b.newDir("token")
	if err != nil {
		return nil, err
	}
	return b.newTokensIn(ctx, dir)
}

// newTokensIn makes an empty token in a directory.
func (b *bench) newTokensIn(ctx context.Context, dir string) (*tokens, error) {
	t := &tokens{dir: dir}
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		return nil, err
	}
	conf := fmt.Sprintf("directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir)
	if err := os.WriteFile(filepath.Join(dir, "softhsm2.conf"), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	cmd := command(ctx, environment(dir, t.env()), b.programs["softhsm2-util"],
		"--init-token", "--free", "--label", tokenLabel, "--pin", tokenPIN, "--so-pin", tokenSOPIN)
	if said, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("softhsm2-util: %w\n%s", err, said)
	}
	return t, nil
}

// add makes keys on a token.
func (b *bench) add(ctx context.Context, t *tokens, k *kind, first, n int) error {
	cmd := command(ctx, environment(t.dir, t.env()), b.load, "make", b.softHSM, tokenLabel, tokenPIN, k.arg, strconv.Itoa(first), strconv.Itoa(n))
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make %d keys: %w\n%s", n, err, said)
	}
	for id := range n {
		t.keys = append(t.keys, first+id)
	}
	return nil
}

// signTokens returns the token to sign with. It has a key of each of these kinds,
// and what others wanted before.
func (b *bench) signTokens(ctx context.Context, wanted ...*kind) (_ *tokens, err error) {
	if b.signing == nil {
		if b.signing, err = b.newTokens(ctx); err != nil {
			return nil, err
		}
	}
	for _, k := range wanted {
		if slices.Contains(b.signing.keys, k.id) {
			continue
		}
		b.say("making a key: %s", k.name)
		if err := b.add(ctx, b.signing, k, k.id, 1); err != nil {
			return nil, err
		}
	}
	return b.signing, nil
}
