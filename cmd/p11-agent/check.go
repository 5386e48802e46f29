package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

func newCheckCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Read the configuration as the agent would, and say what it would do",
		Long: `Read the configuration as the agent would, start the modules, look at the tokens,
and say what the agent would do with them. Nothing is signed and no PIN is asked
for. The exit status is 1 when something is wrong.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runCheck(cmd.Context(), g, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
}

// checker prints findings and counts those that are wrong.
type checker struct {
	out   io.Writer
	wrong int
}

func (c *checker) ok(format string, args ...any) { fmt.Fprintf(c.out, "ok: "+format+"\n", args...) }

func (c *checker) bad(format string, args ...any) {
	c.wrong++
	fmt.Fprintf(c.out, "problem: "+format+"\n", args...)
}

func (c *checker) hint(text string) { fmt.Fprintln(c.out, "  hint: "+text) }

func runCheck(ctx context.Context, g *globals, out, stderr io.Writer) error {
	c, err := loadConfig(g.config)
	if err != nil {
		return err
	}
	ch := &checker{out: out}
	ch.ok("configuration: %s", cmp.Or(c.file, "none, so everything is as usual"))
	reg := registry.Load(registry.Options{Dirs: registry.DefaultDirs(os.LookupEnv, os.Geteuid()), Program: registry.Program})
	for _, w := range reg.Warnings {
		ch.bad("module configuration: %v", w)
	}
	b := openBackend(c, nil, nil, stateDir(), token.KnownRead, newLog(stderr, slog.LevelError))
	defer b.stop()
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	select {
	case <-b.store.Settled():
	case <-ctx.Done():
		ch.bad("the modules do not answer")
	}
	ch.modules(b)
	ch.tokens(b.store)
	ch.keys(ctx, c, b.store)
	ch.pinentry(c)
	if ch.wrong > 0 {
		return fmt.Errorf("%s found", plural(ch.wrong, "problem"))
	}
	return nil
}

// plural counts things.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func (c *checker) modules(b *backend) {
	for _, m := range b.store.Modules() {
		if m.Err != nil {
			c.bad("module %s (%s): %v", m.Name, m.Path, m.Err)
			if e, ok := errors.AsType[*wire.Error](m.Err); ok && e.RV == wire.CKRGeneralError {
				c.hint("many modules answer so when they cannot read their own configuration or directory of tokens (SoftHSM: SOFTHSM2_CONF, and a group that may read the directory; a TPM: the group that may use /dev/tpmrm0)")
			}
		} else {
			c.ok("module %s (%s): %s, %s", m.Name, m.Path, cmp.Or(m.Library, "works"), plural(len(m.Tokens), "token"))
		}
	}
	for _, m := range b.broken {
		c.bad("module %s is not started: %s", m.Name, m.Skip)
	}
	for _, m := range b.skipped {
		c.ok("module %s is not started: %s", m.Name, m.Skip)
	}
	if len(b.store.Modules()) == 0 {
		c.bad("no PKCS#11 module is registered: install one (for smart cards: opensc-pkcs11), or name it in a [[module]] table")
	}
}

func (c *checker) tokens(store *token.Store) {
	for _, m := range store.Modules() {
		for _, t := range m.Tokens {
			switch {
			case t.Shadowed != "":
				c.bad("token %q (serial %s) is seen through the modules %s and %s, and is used through %s: switch one off with a [[module]] table",
					t.ID.Label, t.ID.Serial, t.Shadowed, t.Module, t.Shadowed)
			case t.Tries == token.TriesNone:
				c.bad("the PIN of token %q (serial %s) is locked: unlock it with its PUK or SO PIN", t.ID.Label, t.ID.Serial)
			case t.Tries == token.TriesLast:
				c.bad("token %q (serial %s) has one try left for its PIN", t.ID.Label, t.ID.Serial)
			default:
				c.ok("token %q (serial %s): %s", t.ID.Label, t.ID.Serial, plural(len(t.Keys), "key"))
			}
		}
	}
}

func (c *checker) keys(ctx context.Context, conf *config, store *token.Store) {
	auto := automatic(conf)
	if conf.Keys != nil {
		for _, u := range *conf.Keys {
			c.uri(ctx, store, "keys", u.URI)
		}
	}
	for _, k := range conf.KeyTables {
		c.uri(ctx, store, "[[key]]", k.URI.URI)
	}
	homes := homesOf(store.Keys(), auto)
	first := make(map[*token.Key]*token.Key)
	for _, all := range homes {
		for _, k := range all {
			first[k] = all[0]
		}
	}
	for _, k := range store.Keys() {
		switch f := first[k]; f {
		case k:
			c.ok("offers %v", k)
		case nil:
			_, reason := offered(k, auto, "")
			c.ok("does not offer %v: %s", k, reason)
		default:
			c.ok("%v, through module %s, is the same key as %v, through module %s, which is used first", k, k.Module(), f, f.Module())
		}
	}
	if n := len(homes); n > 5 {
		c.bad("%d keys are offered, and many servers hang up after six: name those you use with keys = [...]", n)
	}
}

func (c *checker) uri(ctx context.Context, store *token.Store, where string, u *pkcs11uri.URI) {
	keys, err := store.Select(ctx, token.NewSelector(u))
	switch {
	case errors.Is(err, token.ErrNoMatch):
		c.bad("%s: %v: %v", where, u, err)
	case err != nil:
		c.bad("%s: %v: %v", where, u, err)
	default:
		c.ok("%s: %v matches %s", where, u, plural(len(keys), "key"))
	}
	if names := u.Ignored(); len(names) > 0 {
		c.bad("%s: %v: the query attributes %q mean nothing here", where, u, names)
	}
	if u.PINSource != nil || u.PIN() != nil {
		if err := token.CheckSource(u); err != nil {
			c.bad("%s: %v: %v", where, u, err)
		}
	}
}

func (c *checker) pinentry(conf *config) {
	name := cmp.Or(conf.Pinentry.Program, "pinentry")
	path, err := exec.LookPath(name)
	askpass := os.Getenv("SSH_ASKPASS")
	switch {
	case err == nil:
		c.ok("PINs are asked for by %s", path)
	case askpass != "":
		c.ok("PINs are asked for by SSH_ASKPASS, %s: there is no %s", askpass, name)
	default:
		c.bad("no PIN can be asked for: there is no %s: install one (pinentry-curses, pinentry-gnome3), or set pinentry.program", strings.TrimSpace(name))
	}
}
