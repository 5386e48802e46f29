package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/systemd"
	"p11-agent/token"
)

// agentOptions are the flags of the agent command: ssh-agent's own.
type agentOptions struct {
	foreground bool
	debug      bool
	kill       bool
	csh        bool
	sh         bool
	socket     string
	lifetime   lifetimeValue
	allow      patternsValue
	hash       string
	options    []string
	system     bool
}

func newAgentCommand(g *globals) *cobra.Command {
	o := new(agentOptions)
	cmd := &cobra.Command{
		Use:   "agent [flags] [COMMAND [ARG...]]",
		Short: "Run the agent",
		Long: `Run the agent. Without flags it goes into the background and prints the
commands that tell a shell where it is:

    eval "$(p11-agent agent -s)"

With a COMMAND it runs for as long as the command does. Under systemd it takes
the socket it is given and stays in the foreground. SIGHUP reads the
configuration again and looks at the tokens again.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runAgent(cmd.Context(), g, o, args, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the COMMAND is the command's
	f.BoolVarP(&o.foreground, "foreground", "D", false, "stay in the foreground")
	f.BoolVarP(&o.debug, "debug", "d", false, "stay in the foreground and log what happens")
	f.BoolVarP(&o.kill, "kill", "k", false, "end the agent that SSH_AGENT_PID names")
	f.BoolVarP(&o.csh, "csh", "c", false, "print commands for csh")
	f.BoolVarP(&o.sh, "sh", "s", false, "print commands for sh")
	f.StringVarP(&o.socket, "socket", "a", "", "listen on the socket `PATH` (default $XDG_RUNTIME_DIR/p11-agent/agent.sock)")
	f.VarP(&o.lifetime, "lifetime", "t", "keep added keys for `TIME`: seconds, or as 1h30m (default for ever)")
	f.VarP(&o.allow, "allow", "P", "modules that ssh-add -s may name: comma-separated `PATTERNS` (default allow-modules, or /usr/lib*/*,/usr/local/lib*/*)")
	f.StringVarP(&o.hash, "fingerprint", "E", "sha256", "name keys by this `HASH` of them: sha256 or md5")
	f.StringArrayVarP(&o.options, "option", "O", nil, "one of ssh-agent's `OPTIONS`: allow-remote-pkcs11 or no-restrict-websafe; may be repeated")
	f.BoolVar(&o.system, "system", false, "serve the system, such as sshd's host keys: "+paths.SystemConfig+", "+paths.SystemSocket+", no prompts, no keys in memory")
	return cmd
}

// fingerprints returns how keys are named to people, as ssh-agent's -E says.
func fingerprints(hash string) (func(ssh.PublicKey) string, error) {
	switch strings.ToLower(hash) {
	case "sha256":
		return ssh.FingerprintSHA256, nil
	case "md5":
		return func(k ssh.PublicKey) string { return "MD5:" + ssh.FingerprintLegacyMD5(k) }, nil
	}
	return nil, fmt.Errorf("%q is no fingerprint hash: sha256 and md5 are", hash)
}

func runAgent(ctx context.Context, g *globals, o *agentOptions, command []string, out io.Writer) (err error) {
	if o.csh && o.sh {
		return exit.Usage(errors.New("-c and -s exclude each other"))
	}
	shell := bourne
	if o.csh || !o.sh && strings.HasSuffix(os.Getenv("SHELL"), "csh") {
		shell = cshell
	}
	if o.kill {
		if len(command) > 0 {
			return exit.Usage(errors.New("-k takes no command"))
		}
		return killAgent(shell, out)
	}
	if g.config != "" {
		// The agent leaves the directory it was started in, and reads it again.
		if g.config, err = filepath.Abs(g.config); err != nil {
			return err
		}
	}
	foreground := o.foreground || o.debug
	switch {
	case o.foreground && o.debug:
		return exit.Usage(errors.New("-D and -d exclude each other"))
	case len(command) > 0 && (foreground || o.csh || o.sh):
		return exit.Usage(errors.New("-c, -D, -d and -s take no command"))
	}
	l := &launch{options: daemonOptions{lifetime: o.lifetime.Duration, system: o.system, version: version}, warn: warn}
	if o.allow.given {
		allow := token.ParseAllowList(o.allow.patterns)
		l.options.allow = &allow
	}
	// Scripts start ssh-agent where another one runs, and expect it to have a socket.
	l.elsewhere = calledSSHAgent() && o.socket == "" && !o.system
	if l.options.nameKey, err = fingerprints(o.hash); err != nil {
		return exit.Usage(err)
	}
	for _, option := range o.options {
		switch option {
		case "allow-remote-pkcs11":
			l.options.remoteTokens = true
		case "no-restrict-websafe":
			// It is about keys of FIDO devices, of which there are none here.
		default:
			if strings.HasPrefix(option, "websafe-allow=") {
				continue // of OpenSSH 10.5, about the same keys
			}
			return exit.Usage(fmt.Errorf("-O %s: there is no such option", option))
		}
	}
	if o.system {
		if g.config == "" {
			g.config = paths.SystemConfig
		}
		if o.socket == "" {
			o.socket = paths.SystemSocket
		}
	}
	l.options.configFile = g.config
	level := slog.LevelInfo
	if o.debug {
		level = slog.LevelDebug
	}

	if foreground || os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		// One in the background is started so.
		if err := withoutTraces(); err != nil {
			return err
		}
	}
	inherited, err := systemd.Listeners()
	if err != nil {
		return err
	}
	child := backgroundChild()
	if child != nil || foreground || len(inherited) > 0 {
		// It is the agent.
		nameProcess(filepath.Base(os.Args[0]))
		if err := closeInherited(child.reportFD()); err != nil {
			return err
		}
	}
	if child != nil {
		return l.inBackground(ctx, child)
	}
	if len(inherited) > 0 {
		return l.onInherited(ctx, inherited, output.NewLog(os.Stderr, level))
	}
	path, err := paths.AgentSocket(o.socket, len(command) > 0, warn)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			paths.RemovePrivateDir(path)
		}
	}()
	// Found here, mistakes of the configuration reach the person who starts it.
	if _, err := config.Load(g.config); err != nil {
		return err
	}
	if foreground {
		return l.inForeground(ctx, path, output.NewLog(os.Stderr, level), func(path string) error {
			_, err := io.WriteString(out, shell.foreground(path, os.Getpid()))
			return err
		})
	}
	return startInBackground(path, shell, command, out)
}

// warn tells a person of what is not as it should be and ends nothing.
func warn(err error) { fmt.Fprintf(os.Stderr, "p11-agent: warning: %v\n", err) }
