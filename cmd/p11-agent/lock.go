package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/control"
	"p11-agent/cmd/p11-agent/status"
)

func newLockCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "lock",
		Short: "Lock the agent with a passphrase",
		Long: `Lock the running agent, as ssh-add -x does: it shows nothing, signs nothing and is
logged out of every token until it is unlocked with the same passphrase.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runLock(cmd.Context(), socket, control.Lock, cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func newUnlockCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Unlock the agent",
		Long:  `Unlock the running agent with the passphrase that it was locked with.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runLock(cmd.Context(), socket, control.Unlock, cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func runLock(ctx context.Context, socket string, do func(context.Context, *status.Agent, io.Writer) error, out io.Writer) error {
	a, err := status.Find(ctx, socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
	return do(ctx, a, out)
}
