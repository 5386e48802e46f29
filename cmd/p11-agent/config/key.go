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
)

// KeyTable attaches a name to the keys that a URI matches, and a public half
// to one whose token shows none.
type KeyTable struct {
	URI    *KeyURI         `toml:"uri"`
	Name   string          `toml:"name"`
	Public string          `toml:"public-key"` // a file
	Absent string          `toml:"absent"`
	Allow  *[]request.Kind `toml:"allow"` // nil: the usual

	PINCache    string    `toml:"pin-cache"`
	PINIdle     Duration  `toml:"pin-idle"`
	PINMax      Duration  `toml:"pin-max"`
	PINRemember *bool     `toml:"pin-remember"`
	PINReuse    *bool     `toml:"pin-reuse"`
	PINPad      *bool     `toml:"pin-pad"`
	ForgetOn    *ForgetOn `toml:"forget-on"` // nil: what there is for all keys

	Confirm approval.Confirm `toml:"confirm"`
	Rules   []RuleTable      `toml:"rule"`
}

// checkAllow finds kinds that there are not.
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

// aboutPIN tells whether the table has any word about the PIN.
func (k KeyTable) aboutPIN() bool {
	return k.PINCache == cacheNever || k.PINIdle.Duration != 0 || k.PINMax.Duration != 0 ||
		k.PINRemember != nil || k.PINReuse != nil || k.PINPad != nil || k.ForgetOn != nil
}

// checkPIN finds words about the PIN that do not go together.
func (k KeyTable) checkPIN() error {
	yes := func(b *bool) bool { return b != nil && *b }
	switch k.PINCache {
	case "", cacheNever, cacheUntilRemoval:
	default:
		return fmt.Errorf("pin-cache of %v is %q, and can be %q or %q", k.URI, k.PINCache, cacheNever, cacheUntilRemoval)
	}
	switch {
	case (yes(k.PINRemember) || yes(k.PINReuse)) && k.PINCache == cacheNever:
		return fmt.Errorf("%v: pin-remember and pin-reuse keep the PIN, and pin-cache = %q forgets it: one of them has to go", k.URI, cacheNever)
	case (yes(k.PINRemember) || yes(k.PINReuse)) && yes(k.PINPad):
		return fmt.Errorf("%v: a PIN that is typed on the reader (pin-pad) cannot be kept (pin-remember, pin-reuse)", k.URI)
	}
	return nil
}

// What pin-cache may be.
const (
	cacheNever        = "never"
	cacheUntilRemoval = "until-removal"
)

// What absent may be.
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

// OfferAway tells whether a key is offered while its token is away: what its table
// says, or the whole configuration, or else whether keys names it.
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

// Policy returns what the tables of keys say about PINs, or nil when none says
// anything. Of how long a login lasts the strictest word counts, of everything
// else the first.
func (c *File) Policy() func(*token.Key) token.Policy {
	tables := slices.DeleteFunc(slices.Clone(c.KeyTables), func(k KeyTable) bool { return !k.aboutPIN() })
	if len(tables) == 0 && len(c.ForgetOn) == 0 {
		return nil
	}
	return func(k *token.Key) (p token.Policy) {
		var remember, reuse *bool
		own := false // it has a forget-on of its own
		for _, table := range tables {
			if !k.MayMatch(table.URI.URI) {
				continue
			}
			p.Retention = p.Stricter(token.Retention{
				Never: table.PINCache == cacheNever, Idle: table.PINIdle.Duration, Max: table.PINMax.Duration,
			})
			if !k.Matches(table.URI.URI) {
				continue // only a login shows whether the key is the one that is named
			}
			if table.ForgetOn != nil {
				own = true
				p.Retention = p.Stricter(table.ForgetOn.Retention())
			}
			remember, reuse, p.Pad = cmp.Or(remember, table.PINRemember), cmp.Or(reuse, table.PINReuse), cmp.Or(p.Pad, table.PINPad)
		}
		if !own {
			p.Retention = p.Stricter(c.ForgetOn.Retention())
		}
		p.Reuse = reuse != nil && *reuse
		p.Remember = p.Reuse || remember != nil && *remember
		return p
	}
}

// Allows returns what keys sign besides logins and SSH signatures: what the first
// table says that says anything, or else, for the system, the exchanges of sshd.
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

// readPublicKey reads a file such as ssh-keygen writes: one line, of type, base64
// and comment.
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
		return nil, fmt.Errorf("%s is no OpenSSH public key", file)
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
