// Package listing says which tokens and keys there are, whether the agent offers them, and why it does not. It looks at a
// store of its own, and needs no running agent. In JSON, package status describes tokens, keys and modules.
package listing

import (
	"cmp"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
)

// A Token is a token with the keys that are listed.
type Token struct {
	status.TokenEntry
	Keys []Key `json:"keys"`
}

// A Key is a key of a token, and whether the agent offers it.
type Key struct {
	status.KeyEntry
	Name      string `json:"name,omitempty"`
	Label     string `json:"label"`
	Bits      int    `json:"bits,omitempty"`
	PublicKey string `json:"public_key"`
	Offered   bool   `json:"offered"`
	Reason    string `json:"reason,omitempty"` // why it is not
	EachUse   bool   `json:"pin_each_use"`
	// The agent offers the key once, and signs with the first home that is present.
	Homes []Home `json:"same_key,omitempty"` // the others

	comment string // of a line for authorized_keys, unless it has a name
}

// A Home is another place of a key: another token, or the same token through another module.
type Home struct {
	URI    string `json:"uri"`
	Module string `json:"module"`
	First  bool   `json:"used_first"`
}

// A Listing is what the command list prints.
type Listing struct {
	Tokens  []Token  `json:"tokens"`
	Modules []Module `json:"modules"`

	Offered int `json:"keys_offered"` // by the agent, of all tokens
	Shown   int `json:"keys_shown"`   // to clients

	named bool // the command line names keys
}

// A Module is a module process, as it was during the look.
type Module struct {
	status.ModuleEntry
	Running bool   `json:"running"`
	Waits   bool   `json:"waits"` // it tells of cards that come and go; else its slots are polled
	Error   string `json:"error,omitempty"`
	Empty   string `json:"empty,omitempty"` // why it shows no token
}

// state says how a module works.
func (m Module) state() string {
	text := cmp.Or(m.Error, "it works")
	if m.Error == "" && m.Empty != "" {
		text += ", and shows no token; " + m.Empty
	}
	if m.Restarts > 0 {
		text += fmt.Sprintf("; it was started again %s", output.Times(m.Restarts))
	}
	switch {
	case m.Error != "":
	case m.Waits:
		text += "; it tells of cards that come and go"
	default:
		text += "; it is asked again and again for cards that come and go"
	}
	if m.Sandbox != "" {
		text += "; sandbox: " + m.Sandbox
	}
	return text
}

// NoteUncertain says that it is unknown which key a URI selects, as the tokens hide the names of private keys before a login.
func NoteUncertain(stderr io.Writer, store *token.Store, sel *selection.Selector) {
	u, maybe := sel.URI(), false
	for _, k := range slices.Concat(store.Keys(), store.Away()) {
		if k.Matches(u) {
			return
		}
		maybe = maybe || sel.Match(k)
	}
	if !maybe {
		return
	}
	fmt.Fprintln(stderr, "note: before a login no key is known to be this one: the login shows whether one of those listed is")
	meant, there := named.Suggest(store, u)
	for _, line := range append(meant, there) {
		if line != "" {
			fmt.Fprintf(stderr, "note: %s\n", line)
		}
	}
}

// CheckNamed returns an error when the URI of sel selects no known key and no token that is present. It also returns an
// error when several modules show the token and none is its home. The error suggests what the URI means.
func CheckNamed(ctx context.Context, store *token.Store, sel *selection.Selector) error {
	_, err := store.Select(ctx, sel)
	if _, ambiguous := errors.AsType[*token.AmbiguousError](err); err == nil ||
		!ambiguous && (matchesToken(store, sel.URI()) || slices.ContainsFunc(store.Away(), func(k *token.Key) bool { return sel.Match(k) })) {
		return nil
	}
	return named.WithSuggestions(err, store, sel.URI())
}

// matchesToken tells whether a URI selects a token that is present. The token may have no keys.
func matchesToken(store *token.Store, u *pkcs11uri.URI) bool {
	for _, m := range store.Modules() {
		for _, t := range m.Tokens {
			if u.ID == nil && u.Object == nil && u.MatchToken(t.ID) {
				return true
			}
		}
	}
	return false
}

// Collect lists the keys that sel selects. onlyNamed leaves out the tokens that it does not select.
func Collect(c *config.File, b *backend.Modules, sel *selection.Selector, onlyNamed bool) Listing {
	l := Listing{named: onlyNamed, Tokens: []Token{}, Modules: []Module{}}
	auto := c.Automatic()
	offers := make(map[*token.Key]backend.Offer)
	for _, o := range b.Offers(c) {
		l.Offered++
		if o.Shown {
			l.Shown++
		}
		for _, k := range slices.Concat(o.Present, o.Away) {
			offers[k] = o
		}
	}
	for _, m := range b.Store.Modules() {
		lm := Module{ModuleEntry: status.NewModuleEntry(m), Running: m.Running, Waits: m.Waits, Empty: m.Empty}
		lm.Error, lm.Next = advice.Trouble(m)
		l.Modules = append(l.Modules, lm)
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			lt := Token{TokenEntry: status.NewTokenEntry(t, i < len(m.Tokens)), Keys: []Key{}}
			for _, k := range t.Keys {
				if !sel.Match(k) {
					continue
				}
				pub, err := ssh.NewPublicKey(k.Public())
				if err != nil {
					continue // token offers only types that SSH has
				}
				lk := Key{
					KeyEntry: status.KeyEntry{URI: k.URI(), Type: pub.Type(), Fingerprint: ssh.FingerprintSHA256(pub)},
					Name:     c.KeyName(k), Label: k.Label(), Bits: bits(k), EachUse: k.AlwaysAuthenticate(),
					PublicKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))), comment: backend.Comment(k),
				}
				lk.Offered, lk.Reason = config.Offered(k, auto, t.Shadowed)
				if o, ok := offers[k]; ok {
					lk.offered(k, o)
				} else if lk.Offered {
					lk.Offered, lk.Reason = false, "its token is not there"
					if lt.Present {
						lk.Reason = backend.Unreadable
					}
				}
				lt.Keys = append(lt.Keys, lk)
			}
			if len(lt.Keys) > 0 || lt.Present && (!onlyNamed || sel.URI().MatchToken(t.ID)) {
				l.Tokens = append(l.Tokens, lt)
			}
		}
	}
	return l
}

// offered notes what the agent does with a key that it offers. k is the key.
func (lk *Key) offered(k *token.Key, o backend.Offer) {
	lk.NotShown = !o.Shown
	if !slices.Contains(o.Present, k) {
		return
	}
	for i, h := range o.Present {
		if h != k {
			lk.Homes = append(lk.Homes, Home{URI: h.URI(), Module: h.Module(), First: i == 0})
		}
	}
}

// first returns the home that the agent uses before this one.
func (k Key) first() (Home, bool) {
	i := slices.IndexFunc(k.Homes, func(h Home) bool { return h.First })
	if i < 0 {
		return Home{}, false
	}
	return k.Homes[i], true
}

func bits(k *token.Key) int {
	if r, ok := k.Public().(*rsa.PublicKey); ok {
		return r.N.BitLen()
	}
	return 0
}

// Unanswered notes the modules that did not answer in time.
func (l *Listing) Unanswered(patience time.Duration) {
	for i, m := range l.Modules {
		if !m.Running && m.Error == "" {
			l.Modules[i].Error = fmt.Sprintf("it has not answered within %v", patience)
		}
	}
}

// Empty tells whether no token is present.
func (l Listing) Empty() bool {
	return !slices.ContainsFunc(l.Tokens, func(t Token) bool { return t.Present })
}
