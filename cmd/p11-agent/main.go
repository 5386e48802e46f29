// Command p11-agent is an SSH agent whose private keys stay on smart cards, TPMs
// and HSMs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/daemon"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/pinentry"
	"p11-agent/token"
	"p11-agent/token/module"
	"p11-agent/token/module/undumpable"
)

// version is set by the linker.
var version = "development"

func main() {
	// First of all: see package undumpable.
	if err := undumpable.Enforce(); err != nil {
		os.Exit(exitCode(err, os.Stderr))
	}
	if len(os.Args) > 1 && os.Args[1] == backend.ModuleCommand {
		// What lives in a module process is a fraction of the 4 MiB that its heap is
		// let grow to before garbage is collected. Now it is 2 MiB.
		debug.SetGCPercent(50)
		daemon.NameProcess(probe.ModuleProgram)
		os.Exit(module.Main())
	}
	if len(os.Args) > 1 && os.Args[1] == prompt.LinePromptCommand {
		os.Exit(pinentry.LinePrompt())
	}
	// Half a MiB lives in an agent. Less than 3 MiB would have garbage collected so
	// often that signatures take longer.
	debug.SetGCPercent(75)
	args := os.Args[1:]
	if calledSSHAgent() {
		// Called as the program that it stands in for.
		args = append([]string{"agent"}, args...)
	}
	root := newRootCommand()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	code := exitCode(err, os.Stderr)
	if code == exit.CodeUsage && cmd.Name() == "agent" {
		code = exit.CodeFailure // as ssh-agent, whose flags these are
	}
	os.Exit(code)
}

// calledSSHAgent tells whether the program is called by the name of the one that it
// stands in for.
func calledSSHAgent() bool { return filepath.Base(os.Args[0]) == "ssh-agent" }

// exitCode prints the error of a command, with its next steps, and returns how the
// program ends.
func exitCode(err error, stderr io.Writer) int {
	if _, ok := errors.AsType[exit.Status](err); err == nil || ok {
		return exit.Code(err)
	}
	for _, e := range advice.WithoutTPM(exit.Each(err)) {
		fmt.Fprintf(stderr, "p11-agent: error: %v\n", e)
		if hint := exit.Hint(e); hint != "" {
			fmt.Fprintf(stderr, "p11-agent: hint: %s\n", hint)
		} else if m, ok := errors.AsType[*token.ModuleError](e); ok {
			output.Steps(stderr, "p11-agent: hint: ", advice.Failure(m))
		}
	}
	return exit.Code(err)
}

// globals are the flags that every command has.
type globals struct {
	config string
}

func newRootCommand() *cobra.Command {
	g := new(globals)
	var showVersion bool
	root := &cobra.Command{
		Use:   "p11-agent",
		Short: "SSH agent for keys on smart cards, TPMs and HSMs",
		Long: `p11-agent is an SSH agent whose private keys stay on PKCS#11 tokens: smart
cards, TPMs and HSMs. Keys are named by pkcs11: URIs, modules come from p11-kit's
registry, and PINs are asked for with pinentry.

Exit status: 0 it worked; 1 it did not, or "check" or "doctor" found a problem;
2 the command line or the configuration is wrong.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          knownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if showVersion {
				return printVersion(cmd.OutOrStdout())
			}
			return cmd.Help()
		},

		SuggestionsMinimumDistance: 2,
	}
	root.PersistentFlags().StringVar(&g.config, "config", "", "read the configuration from `FILE` (default ~/.config/p11-agent/config.toml)")
	// Not cobra's: its words can only be changed by a template, and a program with
	// text/template in it keeps every method that there is, called or not. TestProgram.
	root.Flags().BoolVarP(&showVersion, "version", "v", false, "print the version")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exit.Usage(err) })
	cobra.EnableCommandSorting = false // for all commands of the process: they are in the order of this list
	addCommands(root, "run", "Starting it:",
		newSetupCommand(g), newAgentCommand(g), newInstallCommand(g), newUninstallCommand(g))
	addCommands(root, "keys", "Keys:",
		newListCommand(g), newGenerateCommand(g), newExportCommand(g))
	addCommands(root, "running", "The running agent:",
		newStatusCommand(), newLoginCommand(), newLogoutCommand(), newLockCommand(), newUnlockCommand())
	addCommands(root, "wrong", "When it does not work:",
		newDoctorCommand(g), newCheckCommand(g))
	addCommands(root, "other", "Others:",
		newDemoCommand(), newVersionCommand(), newCompletionCommand())
	root.SetHelpCommand(newHelpCommand())
	root.SetHelpCommandGroupID("other")
	root.InitDefaultHelpCmd()
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}

// addCommands adds commands that the help shows together, in this order.
func addCommands(root *cobra.Command, id, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: id, Title: title})
	for _, c := range commands {
		c.GroupID = id
		root.AddCommand(c)
	}
}

// knownCommand makes a command that does not exist a usage error.
func knownCommand(root *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("unknown command %q", args[0])
	if near := root.SuggestionsFor(args[0]); len(near) > 0 {
		text += fmt.Sprintf(": did you mean %q?", near[0])
	}
	return exit.Usage(errors.New(text))
}

// newHelpCommand returns a help command that refuses commands that there are not.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Print help for a command",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, typed string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
			for _, c := range cmd.Root().Commands() {
				if len(args) == 0 && c.IsAvailableCommand() && strings.HasPrefix(c.Name(), typed) {
					names = append(names, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			switch {
			case err != nil:
				return exit.Usage(err)
			case about == cmd.Root() && len(args) > 0:
				return knownCommand(about, args)
			case len(rest) > 0:
				return noArgs(about, rest)
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

// noArgs makes an argument too many a usage error.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return exit.Usage(fmt.Errorf("unexpected argument %q", args[0]))
	}
	return nil
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return printVersion(cmd.OutOrStdout())
		},
	}
}

func printVersion(w io.Writer) error {
	_, err := fmt.Fprintf(w, "p11-agent %s\n", version)
	return err
}
