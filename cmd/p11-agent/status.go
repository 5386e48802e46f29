package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
)

type statusOptions struct {
	json   bool
	color  output.Color
	socket string
}

func newStatusCommand() *cobra.Command {
	o := new(statusOptions)
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the agent, and its last requests",
		Long: `Show the keys, tokens and modules of the running agent, its last requests, and why
it refused some of them. The command asks the agent of SSH_AUTH_SOCK. When that is
not p11-agent, it asks the agent at $XDG_RUNTIME_DIR/p11-agent/agent.sock.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runStatus(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "print JSON")
	output.AddColorFlag(cmd, &o.color)
	addSocketFlag(cmd, &o.socket)
	return cmd
}

func addSocketFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVarP(socket, "socket", "a", "", "ask the agent at the socket `PATH`")
}

func runStatus(ctx context.Context, o *statusOptions, out, stderr io.Writer) error {
	a, err := status.Find(ctx, o.socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
	if o.json {
		var b bytes.Buffer
		if err := json.Indent(&b, a.JSON, "", "  "); err != nil {
			return err
		}
		b.WriteByte('\n')
		_, err := b.WriteTo(out)
		return err
	}
	if a.Note != "" {
		fmt.Fprintln(stderr, a.Note)
	}
	return a.Report.Print(o.color.Writer(out))
}
