package main

import (
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

type listOptions struct {
	public, json, verbose bool
	color                 output.Color
}

func newListCommand(g *globals) *cobra.Command {
	o := new(listOptions)
	cmd := &cobra.Command{
		Use:   "list [flags] [URI]",
		Short: "List tokens and keys",
		Long: `List the tokens that are present and their keys, or those that a pkcs11: URI or the
label of a token names. It looks at the tokens itself, needs no running agent, and never asks for
a PIN: keys that a token shows only after a login appear when they have a public
key or a certificate.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return exit.Usage(errors.New("only one URI can be given"))
			}
			return nil
		},
		ValidArgsFunction: completeURIs(g, true, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runList(cmd.Context(), g, o, args, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.public, "public", false, "print public keys as lines for authorized_keys")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "tell what is looked at, and what is left out and why")
	output.AddColorFlag(cmd, &o.color)
	return cmd
}

// listedToken and listedKey are what --json prints.
type listedToken struct {
	URI          string      `json:"uri"`
	Label        string      `json:"label"`
	Serial       string      `json:"serial"`
	Manufacturer string      `json:"manufacturer"`
	Model        string      `json:"model"`
	Module       string      `json:"module"`
	Slot         string      `json:"slot"`
	Reader       string      `json:"reader,omitempty"` // where another token of the same name is there
	LoginNeeded  bool        `json:"login_required"`
	PIN          status.PIN  `json:"pin"`
	Shadowed     string      `json:"used_through,omitempty"`
	Home         string      `json:"belongs_to,omitempty"`
	Present      bool        `json:"present"`
	LastSeen     *time.Time  `json:"last_seen,omitempty"` // when it is not
	Keys         []listedKey `json:"keys"`
	LeftOut      []string    `json:"left_out,omitempty"` // because of a bound, and why
}

type listedKey struct {
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
	Homes []listedHome `json:"same_key,omitempty"` // the others

	comment string // of a line for authorized_keys, unless it has a name
}

// listedHome is where else a key is: on another token, or on the same one through
// another module.
type listedHome struct {
	URI    string `json:"uri"`
	Module string `json:"module"`
	First  bool   `json:"used_first"`
}

type listing struct {
	Tokens  []listedToken  `json:"tokens"`
	Modules []listedModule `json:"modules"`

	Offered int `json:"keys_offered"` // by the agent, of all tokens
	Shown   int `json:"keys_shown"`   // to clients

	named bool // by a URI on the command line
}

type listedModule struct {
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

// state says how a module fares.
func (m listedModule) state() string {
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

func runList(ctx context.Context, g *globals, o *listOptions, args []string, out, stderr io.Writer) error {
	if o.public && o.json {
		return exit.Usage(errors.New("--public and --json exclude each other"))
	}
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	// Without an argument the configuration says what is offered.
	uri := new(pkcs11uri.URI)
	if len(args) > 0 {
		if uri, err = named.Parse(args[0]); err != nil {
			return err
		}
		defer uri.Wipe()
		named.NoteUnquoted(stderr, args[0])
	}
	level := slog.LevelError
	log := output.NewLater(stderr)
	if o.verbose {
		level = slog.LevelDebug
	} else {
		log.Flush()
	}
	defer log.Flush() // the list comes before what was looked at for it
	ctx, cancel := context.WithTimeout(ctx, backend.LookTimeout)
	defer cancel()
	b := backend.Look(ctx, c, backend.Options{Log: output.NewLog(log, level)})
	defer b.Close()
	settled := b.Settled()

	sel := token.NewSelector(uri)
	if len(args) > 0 && settled {
		if _, err := b.Store.Select(ctx, sel); err != nil {
			if _, ok := errors.AsType[*token.AmbiguousError](err); ok || !matchesToken(b.Store, uri) && !slices.ContainsFunc(b.Store.Away(), sel.Match) {
				return named.WithSuggestions(err, b.Store, uri)
			}
		}
	}
	l := collect(c, b.Store, sel, len(args) > 0)
	if len(args) > 0 {
		noteUncertain(stderr, b.Store, sel)
	}
	for i, m := range l.Modules {
		if !settled && !m.Running && m.Error == "" {
			l.Modules[i].Error = fmt.Sprintf("it has not answered within %v", backend.LookTimeout)
		}
	}
	switch {
	case o.json:
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(l)
	case o.public:
		return printPublic(out, l)
	}
	if err := printList(o.color.Writer(out), stderr, l, o.verbose); err != nil {
		return err
	}
	if !slices.ContainsFunc(l.Tokens, func(t listedToken) bool { return t.Present }) {
		for _, step := range advice.FirstSteps(b.Store.Modules()) {
			fmt.Fprintf(stderr, "next: %s\n", step)
		}
	}
	return nil
}

// noteUncertain says that a URI selects keys only because their tokens hide the private
// halves, and so their names, before a login.
func noteUncertain(stderr io.Writer, store *token.Store, sel *token.Selector) {
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

// matchesToken tells whether a URI selects a token that is present, be it one
// without keys.
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

// collect puts together what is to be printed of the keys that sel selects.
func collect(c *config.File, store *token.Store, sel *token.Selector, onlyNamed bool) listing {
	l := listing{named: onlyNamed, Tokens: []listedToken{}, Modules: []listedModule{}}
	auto, name := c.Automatic(), c.KeyName
	homes := homesOf(store.Keys(), auto)
	hidden, all := status.NotShown(c, store)
	l.Offered, l.Shown = all, all-len(hidden)
	for _, m := range store.Modules() {
		lm := listedModule{Name: m.Name, Path: m.Path, Running: m.Running, Restarts: m.Restarts, Waits: m.Waits, Sandbox: m.Sandbox, LeftOut: m.LeftOut}
		lm.Error, lm.Next = advice.Trouble(m)
		lm.Empty = m.Empty
		l.Modules = append(l.Modules, lm)
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			present := i < len(m.Tokens)
			lt := listedToken{
				URI: t.URI, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model,
				Module: t.Module, Slot: t.Slot, Reader: t.Reader, LoginNeeded: t.Flags&wire.CKFLoginRequired != 0, PIN: status.PINOf(t.Tries),
				Shadowed: t.Shadowed, Home: t.Home, Present: present, Keys: []listedKey{}, LeftOut: t.LeftOut,
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
				lk := listedKey{
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
							lk.Homes = append(lk.Homes, listedHome{URI: h.URI(), Module: h.Module(), First: i == 0})
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

// homesOf returns the keys that the agent offers, by public key: those of one are
// one identity. They are in the order in which the keyring tries them.
func homesOf(keys []*token.Key, auto []request.Selection) map[string][]*token.Key {
	homes := make(map[string][]*token.Key)
	add := func(fits func(*token.Key) bool) {
		for _, k := range keys {
			pub, err := ssh.NewPublicKey(k.Public())
			if err != nil || !fits(k) {
				continue
			}
			wire := string(pub.Marshal())
			if !slices.Contains(homes[wire], k) {
				homes[wire] = append(homes[wire], k)
			}
		}
	}
	if auto == nil {
		add(func(k *token.Key) bool { return k.Unfit() == "" })
	}
	for _, s := range auto {
		add(func(k *token.Key) bool { ok, _ := config.Offered(k, []request.Selection{s}, ""); return ok })
	}
	return homes
}

// first returns the home that is used before this one, if there is one.
func (k listedKey) first() (listedHome, bool) {
	i := slices.IndexFunc(k.Homes, func(h listedHome) bool { return h.First })
	if i < 0 {
		return listedHome{}, false
	}
	return k.Homes[i], true
}

func bits(k *token.Key) int {
	if r, ok := k.Public().(*rsa.PublicKey); ok {
		return r.N.BitLen()
	}
	return 0
}

func printPublic(out io.Writer, l listing) error {
	for _, t := range l.Tokens {
		for _, k := range t.Keys {
			// Who names a key wants it, whether it is offered or not.
			if !k.Offered && !l.named || t.Shadowed != "" {
				continue
			}
			if _, behind := k.first(); behind && !l.named {
				continue
			}
			if _, err := fmt.Fprintf(out, "%s %s\n", k.PublicKey, cmp.Or(k.Name, k.comment)); err != nil {
				return err
			}
		}
	}
	return nil
}

func printList(out, stderr io.Writer, l listing, verbose bool) error {
	var b strings.Builder
	for _, t := range l.Tokens {
		fmt.Fprintf(&b, "%s\n", output.Paint(out, output.Strong, t.URI))
		fmt.Fprintf(&b, "    token %s, %s %s, module %s", strconv.Quote(t.Label), plain.Line(t.Manufacturer), plain.Line(t.Model), t.Module)
		switch {
		case !t.Present:
			fmt.Fprintf(&b, ", %s, last seen %s", output.Paint(out, output.Caution, "NOT THERE"), t.LastSeen.Local().Format("2006-01-02 15:04"))
		case t.PIN == status.PINLocked:
			b.WriteString(", " + output.Paint(out, output.Bad, "PIN LOCKED"))
		case t.PIN == status.PINLast:
			b.WriteString(", " + output.Paint(out, output.Bad, "ONE PIN TRY LEFT"))
		case t.PIN == status.PINLow:
			b.WriteString(", " + output.Paint(out, output.Caution, "fewer PIN tries left"))
		case !t.LoginNeeded:
			b.WriteString(", no PIN needed")
		}
		if t.Reader != "" {
			fmt.Fprintf(&b, ", the one in reader %s", strconv.Quote(t.Reader))
		}
		if t.Shadowed != "" {
			fmt.Fprintf(&b, ", used through module %s", t.Shadowed)
		}
		if t.Home != "" {
			b.WriteString(", " + output.Paint(out, output.Caution, "BELONGS TO MODULE "+t.Home))
		}
		b.WriteString("\n")
		if verbose {
			for _, reason := range t.LeftOut {
				fmt.Fprintf(&b, "    left out: %s\n", reason)
			}
		}
		for _, k := range t.Keys {
			kind := k.Type
			if k.Bits > 0 {
				kind = fmt.Sprintf("%s (%d bits)", kind, k.Bits)
			}
			fmt.Fprintf(&b, "  %s\n    %s %s", k.URI, kind, k.Fingerprint)
			if n := cmp.Or(k.Name, k.Label); n != "" {
				fmt.Fprintf(&b, " %s", strconv.Quote(n))
			}
			b.WriteString("\n")
			switch {
			case !k.Offered:
				fmt.Fprintf(&b, "    %s: %s\n", output.Paint(out, output.Caution, "not offered"), plain.Line(k.Reason))
			case !t.Present:
				b.WriteString("    can sign once its token is inserted\n")
			case k.EachUse:
				b.WriteString("    " + output.Paint(out, output.Good, "can sign") + ", and asks for the PIN each time\n")
			default:
				b.WriteString("    " + output.Paint(out, output.Good, "can sign") + "\n")
			}
			if verbose && k.NotShown {
				b.WriteString("    clients are not shown it: there are too many keys\n")
			}
			if h, behind := k.first(); behind {
				fmt.Fprintf(&b, "    same key as %s (module %s), which is used first\n", h.URI, h.Module)
			} else {
				for _, h := range k.Homes {
					fmt.Fprintf(&b, "    used before the same key %s (module %s)\n", h.URI, h.Module)
				}
			}
		}
		if len(t.Keys) == 0 {
			b.WriteString("    no key that can be used with SSH\n")
		}
	}
	_, err := io.WriteString(out, b.String())
	if !slices.ContainsFunc(l.Tokens, func(t listedToken) bool { return t.Present }) {
		fmt.Fprintln(stderr, "no token is present")
	}
	for _, m := range l.Modules {
		if m.Error != "" || m.Empty != "" || m.Restarts > 0 || verbose {
			fmt.Fprintf(stderr, "module %s: %s\n", m.Name, plain.Line(m.state()))
			output.Steps(stderr, "  next: ", m.Next)
		}
		if verbose {
			for _, reason := range m.LeftOut {
				fmt.Fprintf(stderr, "module %s: left out: %s\n", m.Name, reason)
			}
		}
	}
	if verbose && l.Shown < l.Offered {
		fmt.Fprintln(stderr, status.FewShown(l.Shown, l.Offered))
	}
	return err
}
