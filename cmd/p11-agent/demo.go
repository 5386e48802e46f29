package main

import (
	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/demo"
	"p11-agent/cmd/p11-agent/exit"
)

func newDemoCommand() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo [flags]",
		Short: "Show the agent at work with a throw-away token",
		Long: `Show the agent at work. The demo makes a software token with two keys and runs the
agent. It logs in to an sshd on the loopback interface with each key, signs and
verifies git commits, and gives PINs by pinentry and from a file. It prints every
command line before it runs it.

The demo makes everything in a new temporary directory. It stops and removes
everything at the end and on Ctrl-C. It does not touch your home directory, your
agent, your tokens, or your configuration of git and ssh. It needs softhsm2-util,
pkcs11-tool, git and OpenSSH with sshd. With tmux and pinentry-curses it shows a
real prompt.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ok, err := demo.Run(cmd.Context(), cmd.OutOrStdout(), keep)
			if err == nil && !ok {
				err = exit.Status(exit.CodeFailure)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the directory, and print how to use it by hand")
	return cmd
}
