package known

import (
	"crypto/x509"
	"errors"
	"fmt"

	"p11-agent/token/pairs"
	"p11-agent/token/wire"
)

// Key is a key pair, with what the agent needs to offer the key while its token is away.
type Key struct {
	ID     []byte `json:"id"`    // CKA_ID, may be empty
	Label  string `json:"label"` // may be empty
	Shown  string `json:"public_label,omitempty"`
	Public []byte `json:"public"`                 // SubjectPublicKeyInfo, RFC 5280 section 4.1
	Always bool   `json:"pin_each_use,omitempty"` // the key wants its PIN for each signature
	Unfit  string `json:"unfit,omitempty"`        // why the agent offers the key only by name; empty: it offers the key
	// Private tells that the token has shown the private key: ID and Label are those of the
	// private key.
	Private bool `json:"private,omitempty"`
}

// Add adds a key pair to the entry of a token. It leaves out a pair that the agent would not read
// again.
func (t *Token) Add(p *pairs.Pair) {
	der, err := x509.MarshalPKIXPublicKey(p.Public)
	if err != nil {
		return // the agent parses no such key
	}
	k := Key{ID: p.ID, Label: p.Label, Public: der, Always: p.Always, Unfit: p.Unfit, Private: p.Private != nil}
	if shown := p.PublicLabel(); shown != k.Label {
		k.Shown = shown
	}
	if _, err := k.pair(); err == nil {
		t.Keys = append(t.Keys, k)
	}
}

// Pairs returns the key pairs of a token.
func (t *Token) Pairs() (all []*pairs.Pair) {
	for i := range t.Keys {
		if p, err := t.Keys[i].pair(); err == nil { // Load has checked the key
			all = append(all, p)
		}
	}
	return all
}

// pair returns the key pair of an entry. It fails when the agent cannot offer the key.
func (k *Key) pair() (*pairs.Pair, error) {
	if max(len(k.ID), len(k.Label), len(k.Shown), len(k.Unfit), len(k.Public)) > pairs.MaxText {
		return nil, fmt.Errorf("an entry of a key is longer than %d bytes", pairs.MaxText)
	}
	pub, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		return nil, fmt.Errorf("read a public key: %w", err)
	}
	keyType, ok := pairs.KeyType(pub)
	if !ok {
		return nil, errors.New("SSH has no public keys of the type of an entry")
	}
	if err := pairs.Usable(pub); err != nil {
		return nil, err
	}
	p := &pairs.Pair{
		ID: k.ID, Label: k.Label, KeyType: keyType, Public: pub, Sum: pairs.Digest(pub), Always: k.Always, Unfit: k.Unfit,
	}
	if k.Shown != "" {
		p.AddMember(pairs.Member{Class: wire.CKOPublicKey, Name: pairs.Name{ID: k.ID, Label: k.Shown}})
	}
	p.AddMember(pairs.Member{Class: wire.CKOPublicKey, Name: pairs.Name{ID: k.ID, Label: k.Label}})
	p.Modulus, p.Point = pairs.Attributes(pub)
	if k.Private {
		p.Private = &pairs.Name{ID: k.ID, Label: k.Label}
	}
	return p, nil
}
