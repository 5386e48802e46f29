// Package listing says which tokens and keys there are, whether the agent offers them, and why it does not. It looks at a
// store of its own, and needs no running agent. The names of the JSON fields stay as they are: scripts read them.
package listing

import (
	"cmp"
	"crypto/rsa"
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
	"p11-agent/token/wire"
)

// A Token is a token with the keys that are listed. JSON has the names of its fields.
type Token struct {
	URI          string     `json:"uri"`
	Label        string     `json:"label"`
	Serial       string     `json:"serial"`
	Manufacturer string     `json:"manufacturer"`
	Model        string     `json:"model"`
	Module       string     `json:"module"`
	Slot         string     `json:"slot"`
	Reader       string     `json:"reader,omitempty"` // where another token of the same name is there
	LoginNeeded  bool       `json:"login_required"`
	PIN          status.PIN `json:"pin"`
	Shadowed     string     `json:"used_through,omitempty"`
	Home         string     `json:"belongs_to,omitempty"`
	Present      bool       `json:"present"`
	LastSeen     *time.Time `json:"last_seen,omitempty"` // when it is not
	Keys         []Key      `json:"keys"`
	LeftOut      []string   `json:"left_out,omitempty"` // because of a bound, and why
}

// A Key is a key of a token, and whether the agent offers it.
type Key struct {
	URI         string `json:"uri"`
	Name        string `json:"name,omitempty"`
	Label       string `json:"label"`
	Type        string `json:"type"`
	Bits        int    `json:"bits,omitempty"`
	Fingerprint string `json:"fingerprint"`
	PublicKey   string `json:"public_key"`
	Offered     bool   `json:"offered"`
	Reason      string `json:"reason,omitempty"`    // why it is not
	NotShown    bool   `json:"not_shown,omitempty"` // it is offered, and clients have no room for it in their list
	EachUse     bool   `json:"pin_each_use"`
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
	Name     string   `json:"name"`
	Path     string   `json:"path"`
	Running  bool     `json:"running"`
	Restarts int      `json:"restarts"`          // since it was started for this list
	Waits    bool     `json:"waits"`             // it tells of cards that come and go; else its slots are polled
	Sandbox  string   `json:"sandbox,omitempty"` // what its process may not do
	Error    string   `json:"error,omitempty"`
	Empty    string   `json:"empty,omitempty"`    // why it shows no token
	Next     []string `json:"next,omitempty"`     // what helps against the error
	LeftOut  []string `json:"left_out,omitempty"` // because of a bound, and why
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
func NoteUncertain(stderr io.Writer, store *token.Store, sel *token.Selector) {
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

// MatchesToken tells whether a URI selects a token that is present. The token may have no keys.
func MatchesToken(store *token.Store, u *pkcs11uri.URI) bool {
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
func Collect(c *config.File, store *token.Store, sel *token.Selector, onlyNamed bool) Listing {
	l := Listing{named: onlyNamed, Tokens: []Token{}, Modules: []Module{}}
	auto, name := c.Automatic(), c.KeyName
	homes := config.Homes(store.Keys(), auto)
	hidden, all := status.NotShown(c, store)
	l.Offered, l.Shown = all, all-len(hidden)
	for _, m := range store.Modules() {
		lm := Module{Name: m.Name, Path: m.Path, Running: m.Running, Restarts: m.Restarts, Waits: m.Waits, Sandbox: m.Sandbox, LeftOut: m.LeftOut}
		lm.Error, lm.Next = advice.Trouble(m)
		lm.Empty = m.Empty
		l.Modules = append(l.Modules, lm)
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			present := i < len(m.Tokens)
			lt := Token{
				URI: t.URI, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model,
				Module: t.Module, Slot: t.Slot, Reader: t.Reader, LoginNeeded: t.Flags&wire.CKFLoginRequired != 0, PIN: status.PINOf(t.Tries),
				Shadowed: t.Shadowed, Home: t.Home, Present: present, Keys: []Key{}, LeftOut: t.LeftOut,
			}
			if !present {
				lt.LastSeen = &t.Seen
			}
			for _, k := range t.Keys {
				if !sel.Match(k) {
					continue
				}
				pub, err := ssh.NewPublicKey(k.Public())
				if err != nil {
					continue // token offers only types that SSH has
				}
				lk := Key{
					URI: k.URI(), Name: name(k), Label: k.Label(), Type: pub.Type(), Bits: bits(k),
					Fingerprint: ssh.FingerprintSHA256(pub), EachUse: k.AlwaysAuthenticate(),
					PublicKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))), comment: backend.Comment(k),
				}
				lk.Offered, lk.Reason = config.Offered(k, auto, t.Shadowed)
				if lk.Offered && !present {
					if lk.Offered = c.OfferAway(k, auto != nil); !lk.Offered {
						lk.Reason = "its token is not there"
					}
				}
				lk.NotShown = lk.Offered && hidden[string(pub.Marshal())]
				if all := homes[string(pub.Marshal())]; slices.Contains(all, k) {
					for i, h := range all {
						if h != k {
							lk.Homes = append(lk.Homes, Home{URI: h.URI(), Module: h.Module(), First: i == 0})
						}
					}
				}
				lt.Keys = append(lt.Keys, lk)
			}
			if len(lt.Keys) > 0 || present && (!onlyNamed || sel.URI().MatchToken(t.ID)) {
				l.Tokens = append(l.Tokens, lt)
			}
		}
	}
	return l
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
