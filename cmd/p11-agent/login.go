package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/completion"
	"p11-agent/cmd/p11-agent/control"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/status"
)

func newLoginCommand() *cobra.Command {
	var stdin bool
	var socket string
	cmd := &cobra.Command{
		Use:   "login [flags] [URI]",
		Short: "Log in to a token, at this terminal",
		Long: `Log in to the token that a pkcs11: URI or its label names, so that its keys sign
without asking. The PIN is asked for at this terminal, which works where no pinentry
can show anything. The URI can be left out when one token only needs a login.

A wrong PIN is not asked for again. When one try is left, the agent asks whether to
use it, and for the PIN, with pinentry: on the desktop, or else at this terminal.`,
		Args:              optionalURI,
		ValidArgsFunction: completion.Tokens(func(t status.Token) bool { return t.Present && t.LoginNeeded && !t.LoggedIn }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLogin(cmd.Context(), socket, stdin, argument(args), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&stdin, "stdin", false, "read the PIN from standard input, one line")
	addSocketFlag(cmd, &socket)
	return cmd
}

func newLogoutCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "logout [flags] [URI]",
		Short: "Log out of a token, or of all",
		Long: `Log out of the token that a pkcs11: URI or its label names, or of all, and forget the PIN if it
is kept: the next signature asks for it.`,
		Args:              optionalURI,
		ValidArgsFunction: completion.Tokens(func(t status.Token) bool { return t.LoggedIn || t.PINKept }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLogout(cmd.Context(), socket, argument(args), cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func optionalURI(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return exit.Usage(errors.New("only one URI can be given"))
	}
	return control.CheckURI(argument(args))
}

func argument(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

func runLogin(ctx context.Context, socket string, stdin bool, uri string, out, stderr io.Writer) error {
	a, err := status.Find(ctx, socket, uri)
	if err != nil {
		return err
	}
	defer a.Close()
	if a.Note != "" {
		fmt.Fprintln(stderr, a.Note)
	}
	return control.Login(ctx, a, uri, stdin, out, stderr)
}

func runLogout(ctx context.Context, socket, uri string, out io.Writer) error {
	a, err := status.Find(ctx, socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
	return control.Logout(ctx, a, uri, out)
}
