package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// completionScripts are not cobra's: those neither quote the ";" of a URI nor know what
// an open quote is.
//
//go:embed completion
var completionScripts embed.FS

// shells are those that there is a completion script for.
var shells = []string{"bash", "zsh", "fish"}

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
		ValidArgs: shells,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return exit.Usage(errors.New("one shell has to be given: bash, zsh or fish"))
			}
			if !slices.Contains(shells, args[0]) {
				return exit.Usage(fmt.Errorf("there is no completion for the shell %q: name bash, zsh or fish", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return printCompletion(cmd.OutOrStdout(), args[0], plain)
		},
	}
	cmd.Flags().BoolVar(&plain, "no-descriptions", false, "leave descriptions out of the completions")
	return cmd
}

func printCompletion(out io.Writer, shell string, plain bool) error {
	script, err := completionScripts.ReadFile("completion/" + shell)
	if err != nil {
		return err
	}
	text := string(script)
	if plain {
		text = strings.ReplaceAll(text, cobra.ShellCompRequestCmd+" ", cobra.ShellCompNoDescRequestCmd+" ")
	}
	_, err = io.WriteString(out, text)
	return err
}

// completionTime is how long a shell waits for completions.
const completionTime = 5 * time.Second

// completeTokens completes the URIs of the running agent's tokens.
func completeTokens(fits func(status.Token) bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return describe(slices.DeleteFunc(tokensOfAgent(cmd), func(t status.Token) bool { return !fits(t) }), false, args, typed),
			cobra.ShellCompDirectiveNoFileComp
	}
}

// completeURIs completes the URIs of tokens, and of their keys if that is wanted: most URIs,
// or 0 for any number. They are those of the running agent, or what is found without one.
func completeURIs(g *globals, keys bool, most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		tokens := tokensOfAgent(cmd)
		if len(tokens) == 0 {
			tokens = tokensThere(cmd.Context(), g)
		}
		return describe(tokens, keys, args, typed), cobra.ShellCompDirectiveNoFileComp
	}
}

// describe makes completions of tokens and their keys, but for those that are given
// already. A label is completed when one is being typed.
func describe(tokens []status.Token, keys bool, given []string, typed string) (all []cobra.Completion) {
	add := func(text, about string) {
		if strings.HasPrefix(text, typed) && !slices.Contains(given, text) {
			all = append(all, cobra.CompletionWithDesc(text, plain.Line(about)))
		}
	}
	for _, t := range tokens {
		add(t.URI, t.Name())
		if _, err := pkcs11uri.ParseNamed([]byte(t.Label)); err == nil && !strings.HasPrefix("pkcs11:", typed) {
			add(t.Label, "the token")
		}
	}
	if keys {
		for _, t := range tokens {
			for _, uri := range t.Keys {
				add(uri, "key on "+t.Name())
			}
		}
	}
	return all
}

// tokensOfAgent returns the tokens of the running agent, or nothing.
func tokensOfAgent(cmd *cobra.Command) []status.Token {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
	defer cancel()
	socket, _ := cmd.Flags().GetString("socket") // empty for a command without it
	a, err := status.Find(ctx, socket, "")
	if err != nil {
		return nil
	}
	defer a.Close()
	return a.Report.Tokens
}

// tokensThere returns the tokens that modules show.
func tokensThere(ctx context.Context, g *globals) (all []status.Token) {
	c, err := config.Load(g.config)
	if err != nil {
		return nil
	}
	b := backend.Look(ctx, c, backend.Options{Log: slog.New(slog.DiscardHandler), Timeout: completionTime})
	defer b.Close()
	for _, m := range b.Store.Modules() {
		for _, t := range slices.Concat(m.Tokens, m.Away) {
			st := status.Token{URI: t.URI, Label: t.ID.Label, Serial: t.ID.Serial, Module: m.Name, LoginNeeded: t.Flags&wire.CKFLoginRequired != 0}
			for _, k := range t.Keys {
				st.Keys = append(st.Keys, k.URI())
			}
			all = append(all, st)
		}
	}
	return all
}
