package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/completion"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/listing"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
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
		ValidArgsFunction: completion.URIs(&g.config, true, 1),
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
	defer log.Flush() // the log of the look comes after the list
	ctx, cancel := context.WithTimeout(ctx, backend.LookTimeout)
	defer cancel()
	b := backend.Look(ctx, c, backend.Options{Log: output.NewLog(log, level)})
	defer b.Close()
	settled := b.Settled()

	sel := selection.New(uri)
	if len(args) > 0 && settled {
		if err := listing.CheckNamed(ctx, b.Store, sel); err != nil {
			return err
		}
	}
	l := listing.Collect(c, b, sel, len(args) > 0)
	if len(args) > 0 {
		listing.NoteUncertain(stderr, b.Store, sel)
	}
	if !settled {
		l.Unanswered(backend.LookTimeout)
	}
	switch {
	case o.json:
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(l)
	case o.public:
		return listing.PrintPublic(out, l)
	}
	if err := listing.Print(o.color.Writer(out), stderr, l, o.verbose); err != nil {
		return err
	}
	if l.Empty() {
		for _, step := range advice.FirstSteps(b.Store.Modules()) {
			fmt.Fprintf(stderr, "next: %s\n", step)
		}
	}
	return nil
}
