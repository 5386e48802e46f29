package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/doctor"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
)

type doctorOptions struct {
	json, verbose bool
	color         output.Color
}

func newDoctorCommand(g *globals) *cobra.Command {
	o := new(doctorOptions)
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out why it does not work, and say what to do",
		Long: `Look at everything that a signature needs: the configuration, the agent that ssh
asks, ssh, pcscd and its readers, modules, tokens, keys, prompts for the PIN, the
units of systemd, certificates, and the machine. Each warning and each problem
comes with what to type next.

The command needs no running agent. It never asks for a PIN, never logs in, and
changes nothing. The exit status is 1 when there is a problem.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDoctor(cmd.Context(), g, o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "show also what is well")
	output.AddColorFlag(cmd, &o.color)
	return cmd
}

func runDoctor(ctx context.Context, g *globals, o *doctorOptions, out io.Writer) error {
	found := doctor.Examine(ctx, g.config)
	if o.json {
		return printFoundJSON(out, found)
	}
	if err := found.Print(o.color.Writer(out), o.verbose); err != nil {
		return err
	}
	return found.Err()
}

// printFoundJSON prints findings. Problems are in the JSON, and end the program with
// CodeFailure.
func printFoundJSON(out io.Writer, found doctor.Groups) error {
	if err := found.PrintJSON(out); err != nil {
		return err
	}
	if found.Err() != nil {
		return exit.Status(exit.CodeFailure)
	}
	return nil
}
