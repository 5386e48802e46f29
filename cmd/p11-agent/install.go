package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/systemd/install"
)

// installOptions are the flags of install and uninstall.
type installOptions struct {
	user   bool
	system string
	now    bool
	print  bool
	force  bool
}

func (o *installOptions) addFlags(cmd *cobra.Command, what string) {
	f := cmd.Flags()
	f.BoolVar(&o.user, "user", false, what+" the units of this user's agent")
	f.StringVar(&o.system, "system", "", what+" the units of an agent for the system, which reads /etc/p11-agent/`NAME`.toml")
}

func newInstallCommand(g *globals) *cobra.Command {
	o := new(installOptions)
	cmd := &cobra.Command{
		Use:   "install --user|--system NAME",
		Short: "Have systemd start the agent",
		Long: `Write units with which systemd starts this program as the agent when the first
client connects. Also write a setting of SSH_AUTH_SOCK and a piece of ssh_config
that name the agent. Then print what to type next; --now does that instead.

The command changes no file that it has not written. It does not change
~/.ssh/config.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runInstall(cmd.Context(), g, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.addFlags(cmd, "write")
	f := cmd.Flags()
	f.BoolVar(&o.now, "now", false, "have systemd read, enable and start the units, too")
	f.BoolVar(&o.print, "print", false, "show the files, and write nothing")
	f.BoolVar(&o.force, "force", false, "replace files that install has not written, too")
	return cmd
}

func newUninstallCommand(g *globals) *cobra.Command {
	o := new(installOptions)
	cmd := &cobra.Command{
		Use:   "uninstall --user|--system NAME",
		Short: "Take back what install has done",
		Long: `Stop and disable the agent, and remove the files that install has written. The
configuration of the agent stays.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, err := o.open(cmd.Context(), g, cmd.OutOrStdout(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return in.Remove()
		},
	}
	o.addFlags(cmd, "remove")
	return cmd
}

// open finds the installation that the flags name.
func (o *installOptions) open(ctx context.Context, g *globals, out, stderr io.Writer) (*install.Installation, error) {
	switch {
	case g.config != "":
		return nil, exit.Usage(errors.New("--config does nothing here: to have the agent read another file, write a drop-in for its unit"))
	case o.user == (o.system != ""):
		return nil, exit.Usage(errors.New("say which agent: --user for yours, --system NAME for an agent of the system, such as one with the host keys of sshd"))
	case o.system != "" && !install.ValidName(o.system):
		return nil, exit.Usage(fmt.Errorf("%q cannot be the name of an agent: use letters, digits, dots and underscores", o.system))
	}
	return install.New(ctx, installTarget(o.system), out, stderr)
}

// installTarget is the agent of the system that has this name, or this user's.
func installTarget(system string) install.Target {
	t := install.Target{
		System:     system,
		ConfigHome: paths.ConfigHome(),
		Socket:     paths.RuntimeSocket(paths.AgentName),
		Answers:    func(ctx context.Context, socket string) bool { return sshagent.Ping(ctx, socket) == nil },
	}
	return t
}

func runInstall(ctx context.Context, g *globals, o *installOptions, out, stderr io.Writer) error {
	in, err := o.open(ctx, g, out, stderr)
	if err != nil {
		return err
	}
	if o.print {
		in.Print()
		return nil
	}
	return in.Install(ctx, install.Options{Start: o.now, Force: o.force})
}
