package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/completion"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/newkey"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/token/keygen"
)

type generateOptions struct {
	kind, label, id string
}

func newGenerateCommand(g *globals) *cobra.Command {
	o := new(generateOptions)
	cmd := &cobra.Command{
		Use:   "generate [flags] URI",
		Short: "Make a new key on a token",
		Long: `Make a new key pair on the token that a pkcs11: URI or a label names, and print its URI
and its public key as a line for authorized_keys. The private key can neither be read nor
leave the token. Nothing on the token is ever replaced.

It needs no running agent. The PIN is asked for with pinentry, or comes from a
pin-source of the configuration.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return exit.Usage(errors.New("one URI has to be given, which names the token, such as pkcs11:token=Work, or the label of the token"))
			}
			return nil
		},
		ValidArgsFunction: completion.URIs(&g.config, false, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runGenerate(cmd.Context(), g, o, args[0], cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.kind, "type", string(keygen.ECDSAP256), "make a key of this `KIND`: "+kindNames())
	f.StringVar(&o.label, "label", "", "call the key `TEXT`; the same as object in the URI")
	f.StringVar(&o.id, "id", "", "give it this ID, in `HEX`; the same as id in the URI (default one that is free)")
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(kindList(), cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	return cmd
}

func kindList() []string {
	var all []string
	for _, k := range keygen.Kinds {
		all = append(all, string(k))
	}
	return all
}

func kindNames() string { return strings.Join(kindList(), ", ") }

func runGenerate(ctx context.Context, g *globals, o *generateOptions, text string, out, stderr io.Writer) error {
	kind := keygen.Kind(o.kind)
	if !slices.Contains(keygen.Kinds, kind) {
		return exit.Usage(fmt.Errorf("unknown type of key %q: use %s", o.kind, kindNames()))
	}
	u, err := newkey.URI(text, o.label, o.id)
	if err != nil {
		return exit.Usage(err)
	}
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	named.NoteUnquoted(stderr, text)
	// The first interrupt takes a half-made key away again. The second ends the program at once.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()

	log := output.NewLog(stderr, slog.LevelError)
	show := newkey.NewProgress(ctx, stderr, kind)
	// A module that does not answer may be another one than that of the token.
	b := backend.Look(ctx, c, backend.Options{
		Log: log, PINs: prompt.WithTerminal(prompt.New(c, prompt.Options{Log: log}), advice.Install("pinentry-curses", "pinentry")), Generating: show.Begin,
	})
	defer b.Close()
	k, err := newkey.Make(ctx, b.Store, u, kind, nil)
	//nolint:errorlint // wrapped, it says what became of the key
	if err == context.Canceled {
		err = errors.New("interrupted: no key was made")
	}
	if err != nil {
		return named.WithSuggestions(err, b.Store, u)
	}
	tellAgent(ctx, k.URI())
	return newkey.Print(out, stderr, k)
}

// tellAgent makes the running agent look for a new key. Without an agent it does nothing.
func tellAgent(ctx context.Context, uri string) {
	if a, err := status.Find(ctx, "", uri); err == nil {
		_ = a.Close() // the key is made in any case
	}
}
