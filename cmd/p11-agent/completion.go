package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/completion"
	"p11-agent/cmd/p11-agent/exit"
)

func newCompletionCommand() *cobra.Command {
	var plain bool
	cmd := &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print a completion script for a shell",
		Long: `Print a completion script for bash, zsh or fish. To use it in this shell:

    bash    source <(p11-agent completion bash)
    zsh     source <(p11-agent completion zsh)
    fish    p11-agent completion fish | source

Packages and "make install" install the scripts.`,
		ValidArgs: completion.Shells,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return exit.Usage(errors.New("one shell has to be given: bash, zsh or fish"))
			}
			if !slices.Contains(completion.Shells, args[0]) {
				return exit.Usage(fmt.Errorf("there is no completion for the shell %q: name bash, zsh or fish", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return completion.Print(cmd.OutOrStdout(), args[0], plain)
		},
	}
	cmd.Flags().BoolVar(&plain, "no-descriptions", false, "leave descriptions out of the completions")
	return cmd
}
