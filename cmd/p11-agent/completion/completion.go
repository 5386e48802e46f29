// Package completion completes command lines in bash, zsh and fish. It has scripts of its own: cobra's neither quote the ";" of
// a URI nor know an open quote. A completion asks for no PIN, and takes at most five seconds.
package completion

import (
	"context"
	"embed"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/token/pkcs11uri"
)

//go:embed bash zsh fish
var scripts embed.FS

// Shells are the shells with a completion script.
var Shells = []string{"bash", "zsh", "fish"}

// Print prints the script for a shell. noDescriptions makes the script show URIs only.
func Print(out io.Writer, shell string, noDescriptions bool) error {
	script, err := scripts.ReadFile(shell)
	if err != nil {
		return err
	}
	text := string(script)
	if noDescriptions {
		text = strings.ReplaceAll(text, cobra.ShellCompRequestCmd+" ", cobra.ShellCompNoDescRequestCmd+" ")
	}
	_, err = io.WriteString(out, text)
	return err
}

// patience is how long a shell waits for completions.
const patience = 5 * time.Second

// Tokens completes the URIs and labels of the running agent's tokens that fit. It completes one argument.
func Tokens(fits func(status.Token) bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return describe(slices.DeleteFunc(tokensOfAgent(cmd), func(t status.Token) bool { return !fits(t) }), false, args, typed),
			cobra.ShellCompDirectiveNoFileComp
	}
}

// URIs completes the URIs of tokens, and with keys those of their keys. It completes up to most arguments, or any number if
// most is 0. It asks the running agent. Without an agent it looks at the modules, by the configuration file that *file names.
func URIs(file *string, keys bool, most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		tokens := tokensOfAgent(cmd)
		if len(tokens) == 0 {
			tokens = tokensThere(cmd.Context(), *file)
		}
		return describe(tokens, keys, args, typed), cobra.ShellCompDirectiveNoFileComp
	}
}

// describe makes completions of tokens and their keys, without those that are given already. It completes a label if a label
// is being typed.
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

// tokensOfAgent returns the tokens of the running agent. Without an agent there are none.
func tokensOfAgent(cmd *cobra.Command) []status.Token {
	ctx, cancel := context.WithTimeout(cmd.Context(), patience)
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
func tokensThere(ctx context.Context, file string) (all []status.Token) {
	c, err := config.Load(file)
	if err != nil {
		return nil
	}
	b := backend.Look(ctx, c, backend.Options{Log: slog.New(slog.DiscardHandler), Timeout: patience})
	defer b.Close()
	for _, m := range b.Store.Modules() {
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			st := status.Token{TokenEntry: status.NewTokenEntry(t, i < len(m.Tokens))}
			for _, k := range t.Keys {
				st.Keys = append(st.Keys, k.URI())
			}
			all = append(all, st)
		}
	}
	return all
}
