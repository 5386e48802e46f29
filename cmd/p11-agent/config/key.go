package config

import (
	"cmp"
	"crypto"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/objects"
	"p11-agent/token/retention"
)

// A KeyTable sets what the agent does with the keys that a URI matches.
type KeyTable struct {
	URI    *KeyURI         `toml:"uri"`
	Name   string          `toml:"name"`
	Public string          `toml:"public-key"` // a file
	Absent string          `toml:"absent"`
	Allow  *[]request.Kind `toml:"allow"` // nil: logins and SSH signatures

	PINCache    string    `toml:"pin-cache"`
	PINIdle     Duration  `toml:"pin-idle"`
	PINMax      Duration  `toml:"pin-max"`
	PINRemember *bool     `toml:"pin-remember"`
	PINReuse    *bool     `toml:"pin-reuse"`
	PINPad      *bool     `toml:"pin-pad"`
	ForgetOn    *ForgetOn `toml:"forget-on"` // nil: that of the file

	Confirm approval.Confirm `toml:"confirm"`
	Rules   []RuleTable      `toml:"rule"`
}

// checkKeys finds mistakes in the [[key]] tables, and reads the public keys that they name.
func (c *File) checkKeys() error {
	for i, k := range c.KeyTables {
		if k.URI == nil {
			return fmt.Errorf("[[key]] table %d has no uri", i+1)
		}
		if err := cmp.Or(k.checkPIN(), checkAbsent(k.Absent), k.checkAllow()); err != nil {
			return err
		}
		if k.ForgetOn != nil {
			if err := k.ForgetOn.check(); err != nil {
				return fmt.Errorf("%v: %w", k.URI, err)
			}
		}
		if k.Public == "" {
			continue
		}
		pub, err := readPublicKey(k.Public)
		p := objects.PublicKey{URI: k.URI.URI, Key: pub}
		if err == nil {
			err = p.Check()
		}
		if err != nil {
			return fmt.Errorf("public-key of %v: %w", k.URI, err)
		}
		c.publicKeys = append(c.publicKeys, p)
	}
	return nil
}

// checkAllow finds unknown kinds.
func (k KeyTable) checkAllow() error {
	if k.Allow == nil {
		return nil
	}
	for _, kind := range *k.Allow {
		if !slices.Contains(request.Kinds(), kind) {
			return fmt.Errorf("allow of %v has %q, and can have %q (logins and SSH signatures are always allowed)", k.URI, kind, request.Kinds())
		}
	}
	return nil
}

// aboutPIN tells whether the table says anything about the PIN.
func (k KeyTable) aboutPIN() bool {
	return k.PINCache == cacheNever || k.PINIdle.Duration != 0 || k.PINMax.Duration != 0 ||
		k.PINRemember != nil || k.PINReuse != nil || k.PINPad != nil || k.ForgetOn != nil
}

// checkPIN finds values about the PIN that contradict each other.
func (k KeyTable) checkPIN() error {
	yes := func(b *bool) bool { return b != nil && *b }
	switch k.PINCache {
	case "", cacheNever, cacheUntilRemoval:
	default:
		return fmt.Errorf("pin-cache of %v is %q, and can be %q or %q", k.URI, k.PINCache, cacheNever, cacheUntilRemoval)
	}
	switch {
	case (yes(k.PINRemember) || yes(k.PINReuse)) && k.PINCache == cacheNever:
		return fmt.Errorf("%v: pin-remember and pin-reuse keep the PIN, and pin-cache = %q forgets it: remove one of them", k.URI, cacheNever)
	case (yes(k.PINRemember) || yes(k.PINReuse)) && yes(k.PINPad):
		return fmt.Errorf("%v: a PIN that is typed on the reader (pin-pad) cannot be kept (pin-remember, pin-reuse)", k.URI)
	}
	return nil
}

// The values of pin-cache.
const (
	cacheNever        = "never"
	cacheUntilRemoval = "until-removal"
)

// The values of absent.
const (
	absentOffer = "offer"
	absentHide  = "hide"
)

func checkAbsent(value string) error {
	switch value {
	case "", absentOffer, absentHide:
		return nil
	}
	return fmt.Errorf("absent is %q, and can be %q or %q", value, absentOffer, absentHide)
}

// OfferAway tells whether the agent offers a key while its token is away. The first [[key]]
// table with absent decides, or else absent of the file. Without absent, the agent offers the
// key if keys names it; named tells that.
func (c *File) OfferAway(k request.Key, named bool) bool {
	if key, ok := k.(*token.Key); ok {
		for _, table := range c.KeyTables {
			if table.Absent != "" && key.Matches(table.URI.URI) {
				return table.Absent == absentOffer
			}
		}
	}
	if c.Absent != "" {
		return c.Absent == absentOffer
	}
	return named
}

// Policy returns what the [[key]] tables say about PINs, or nil when they say nothing. For how
// long a login lasts, the strictest value counts; for the rest, the first value counts.
func (c *File) Policy() func(*token.Key) token.Policy {
	tables := slices.DeleteFunc(slices.Clone(c.KeyTables), func(k KeyTable) bool { return !k.aboutPIN() })
	if len(tables) == 0 && len(c.ForgetOn) == 0 {
		return nil
	}
	return func(k *token.Key) (p token.Policy) {
		var remember, reuse *bool
		own := false // a table of the key has forget-on
		for _, table := range tables {
			if !k.MayMatch(table.URI.URI) {
				continue
			}
			p.Retention = p.Retention.Stricter(retention.Rule{
				Never: table.PINCache == cacheNever, Idle: table.PINIdle.Duration, Max: table.PINMax.Duration,
			})
			if !k.Matches(table.URI.URI) {
				continue // only a login shows whether the URI means this key
			}
			if table.ForgetOn != nil {
				own = true
				p.Retention = p.Retention.Stricter(table.ForgetOn.Retention())
			}
			remember, reuse, p.Pad = cmp.Or(remember, table.PINRemember), cmp.Or(reuse, table.PINReuse), cmp.Or(p.Pad, table.PINPad)
		}
		if !own {
			p.Retention = p.Retention.Stricter(c.ForgetOn.Retention())
		}
		p.Reuse = reuse != nil && *reuse
		p.Remember = p.Reuse || remember != nil && *remember
		return p
	}
}

// Allows returns what a key signs besides logins and SSH signatures. The first [[key]] table
// with allow decides. Without one, a key of an agent for the system signs the exchanges of sshd.
func (c *File) Allows(system bool) func(request.Key) []request.Kind {
	return func(k request.Key) []request.Kind {
		if key, ok := k.(*token.Key); ok {
			for _, table := range c.KeyTables {
				if table.Allow != nil && key.Matches(table.URI.URI) {
					return *table.Allow
				}
			}
		}
		if system {
			return []request.Kind{request.KindHostKey}
		}
		return nil
	}
}

// KeyName returns the configured name of a key, or "" when the key has none.
func (c *File) KeyName(k request.Key) string {
	key, ok := k.(*token.Key)
	if !ok {
		return ""
	}
	for _, table := range c.KeyTables {
		if table.Name != "" && key.Matches(table.URI.URI) {
			return table.Name
		}
	}
	return ""
}

// readPublicKey reads a file that ssh-keygen writes: one line of type, base64 and comment. For a
// certificate it returns the key in it.
func readPublicKey(file string) (crypto.PublicKey, error) {
	file = paths.ExpandHome(file)
	if !filepath.IsAbs(file) {
		return nil, fmt.Errorf("%q is not an absolute path", file)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s is not an OpenSSH public key", file)
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	public, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a key of type %s, which no token can sign with", file, key.Type())
	}
	return public.CryptoPublicKey(), nil
}
