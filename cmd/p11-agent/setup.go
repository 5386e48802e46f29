package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/setup"
)

type setupOptions struct {
	print bool
}

func newSetupCommand(g *globals) *cobra.Command {
	o := new(setupOptions)
	cmd := &cobra.Command{
		Use:   "setup [flags]",
		Short: "Lead to the first login, in one conversation",
		Long: `Lead from a token, or from nothing, to the first login. It looks for tokens and
keys, makes a key where there is none, on a new token if need be, starts the agent,
has ssh ask the agent, shows the line for authorized_keys, copies it to a host, and
has git sign.

Each step says what it does, and asks first: no leaves everything as it is. A step
that is done already is not done again. Ctrl-C ends the conversation, and leaves
nothing half done. The PIN is typed once.

Without a terminal it says what is left to do, and changes nothing. The exit status
is 1 then, unless all is done.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runSetup(cmd.Context(), g, o, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&o.print, "print", false, "only tell what would be done")
	return cmd
}

func runSetup(ctx context.Context, g *globals, o *setupOptions, in io.Reader, out, stderr io.Writer) error {
	if g.config != "" {
		return exit.Usage(errors.New("--config means nothing here: setup is about the agent that reads the usual file"))
	}
	return setup.Run(ctx, setup.Options{Print: o.print, Target: installTarget("")}, in, out, stderr)
}
