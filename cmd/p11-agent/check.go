package main

import (
	"cmp"
	"context"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/doctor"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
)

type checkOptions struct {
	json  bool
	color output.Color
}

func newCheckCommand(g *globals) *cobra.Command {
	o := new(checkOptions)
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Read the configuration, and say what the agent would do",
		Long: `Read the configuration as the agent does, start the modules, look at the tokens,
and print what the agent would do with them. The command signs nothing and asks
for no PIN. The exit status is 1 when something is wrong. "doctor" looks at the
rest of the machine as well.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runCheck(cmd.Context(), g, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	output.AddColorFlag(cmd, &o.color)
	return cmd
}

func runCheck(ctx context.Context, g *globals, o *checkOptions, out, stderr io.Writer) error {
	c, err := config.Load(g.config)
	switch {
	case err != nil && o.json:
		return cmp.Or(doctor.Broken(g.config).PrintJSON(out), error(exit.Status(exit.CodeUsage)))
	case err != nil:
		return err
	}
	found := doctor.ExamineConfig(ctx, c, output.NewLog(stderr, slog.LevelError))
	if o.json {
		return printFoundJSON(out, found)
	}
	for _, group := range found {
		if err := group.Print(o.color.Writer(out), true); err != nil {
			return err
		}
	}
	return found.Err()
}
