package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/daemon"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/systemd"
	"p11-agent/token/selection"
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

// lifetimeValue is the time of -t.
type lifetimeValue struct{ time.Duration }

func (v *lifetimeValue) Set(s string) (err error) {
	v.Duration, err = daemon.ParseLifetime(s)
	return err
}

func (v *lifetimeValue) String() string { return "" } // the help names no default
func (v *lifetimeValue) Type() string   { return "time" }

// patternsValue is the list of -P. An empty list allows no module.
type patternsValue struct {
	patterns string
	given    bool
}

func (v *patternsValue) Set(s string) error {
	if v.given {
		// It is unknown which list counts, and one may allow less than the other.
		return errors.New("only one list of patterns can be given")
	}
	v.patterns, v.given = s, true
	return nil
}

func (v *patternsValue) String() string { return "" }
func (v *patternsValue) Type() string   { return "patterns" }

func runAgent(ctx context.Context, g *globals, o *agentOptions, command []string, out io.Writer) (err error) {
	if err := o.check(command); err != nil {
		return exit.Usage(err)
	}
	if o.kill {
		return killAgent(o.shell(), out)
	}
	if g.config != "" {
		// The agent leaves the directory it was started in, and reads the file again.
		if g.config, err = filepath.Abs(g.config); err != nil {
			return err
		}
	}
	if o.system {
		g.config, o.socket = cmp.Or(g.config, paths.SystemConfig), cmp.Or(o.socket, paths.SystemSocket)
	}
	l, err := o.launch(g)
	if err != nil {
		return exit.Usage(err)
	}
	if o.foreground || o.debug || os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		// An agent in the background is started without traces.
		if err := daemon.WithoutTraces(); err != nil {
			return err
		}
	}
	inherited, err := systemd.Listeners()
	if err != nil {
		return err
	}
	child := daemon.BackgroundChild()
	if child != nil || o.foreground || o.debug || len(inherited) > 0 {
		// This process is the agent.
		daemon.NameProcess(filepath.Base(os.Args[0]))
		if err := daemon.CloseInherited(child.ReportFD()); err != nil {
			return err
		}
	}
	switch {
	case child != nil:
		return l.InBackground(ctx, child)
	case len(inherited) > 0:
		return l.OnInherited(ctx, inherited, o.log())
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
	// Mistakes of the configuration reach the person who starts the agent.
	if _, err := config.Load(g.config); err != nil {
		return err
	}
	if o.foreground || o.debug {
		return l.InForeground(ctx, path, o.log(), func(path string) error {
			_, err := io.WriteString(out, o.shell().Export(paths.SocketVariable, path)+fmt.Sprintf("echo Agent pid %d;\n", os.Getpid()))
			return err
		})
	}
	if len(command) > 0 {
		return runWithAgent(path, command)
	}
	b, err := daemon.Start(path, false, warn)
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, o.shell().Export(paths.SocketVariable, b.Socket)+o.shell().Export(paths.PIDVariable, strconv.Itoa(b.PID))+
		fmt.Sprintf("echo Agent pid %d;\n", b.PID))
	return err
}

// check finds flags that exclude each other.
func (o *agentOptions) check(command []string) error {
	switch {
	case o.csh && o.sh:
		return errors.New("-c and -s exclude each other")
	case o.kill && len(command) > 0:
		return errors.New("-k takes no command")
	case o.kill:
		return nil
	case o.foreground && o.debug:
		return errors.New("-D and -d exclude each other")
	case len(command) > 0 && (o.foreground || o.debug || o.csh || o.sh):
		return errors.New("-c, -D, -d and -s take no command")
	}
	return nil
}

// shell returns the syntax of the commands that are printed.
func (o *agentOptions) shell() output.Shell {
	if o.csh || !o.sh && strings.HasSuffix(os.Getenv("SHELL"), "csh") {
		return output.CShell
	}
	return output.Bourne
}

// log returns the log of an agent that stays in the foreground.
func (o *agentOptions) log() *slog.Logger {
	if o.debug {
		return output.NewLog(os.Stderr, slog.LevelDebug)
	}
	return output.NewLog(os.Stderr, slog.LevelInfo)
}

// launch returns how the agent is to run. The error is a mistake of the command line.
func (o *agentOptions) launch(g *globals) (l *daemon.Launch, err error) {
	l = &daemon.Launch{
		Options: daemon.Options{ConfigFile: g.config, Lifetime: o.lifetime.Duration, System: o.system, Version: version},
		// Scripts start ssh-agent where another agent runs, and expect it to have a socket.
		Elsewhere: calledSSHAgent() && o.socket == "" && !o.system,
		Warn:      warn,
	}
	if o.allow.given {
		allow := selection.ParseAllowList(o.allow.patterns)
		l.Options.Allow = &allow
	}
	if l.Options.NameKey, err = daemon.Fingerprints(o.hash); err != nil {
		return nil, err
	}
	for _, option := range o.options {
		switch {
		case option == "allow-remote-pkcs11":
			l.Options.RemoteTokens = true
		case option == "no-restrict-websafe", strings.HasPrefix(option, "websafe-allow="):
			// These are about keys of FIDO devices, which p11-agent does not have.
		default:
			return nil, fmt.Errorf("unknown option -O %s: use allow-remote-pkcs11 or no-restrict-websafe", option)
		}
	}
	return l, nil
}

// runWithAgent starts an agent that ends with the command, and becomes the command.
func runWithAgent(path string, command []string) error {
	program, err := exec.LookPath(command[0])
	if err != nil {
		return noCommand(command[0], err)
	}
	b, err := daemon.Start(path, true, warn)
	if err != nil {
		return err
	}
	return b.Become(program, command)
}

// noCommand says that the command of an agent cannot be run. The hint is for people who mean a command of
// p11-agent, such as "p11-agent agent stop".
func noCommand(name string, err error) error {
	if e, ok := errors.AsType[*exec.Error](err); ok {
		err = e.Err
	}
	if errors.Is(err, exec.ErrNotFound) {
		err = errors.New("no such program in PATH")
	}
	failed := fmt.Errorf("the agent cannot run the command %q: %w", name, err)
	if meant := map[string]string{
		"start": `eval "$(p11-agent agent -s)"`, "run": `eval "$(p11-agent agent -s)"`, "stop": "p11-agent agent -k", "kill": "p11-agent agent -k",
		"end": "p11-agent agent -k", "restart": `p11-agent agent -k; eval "$(p11-agent agent -s)"`, "reload": `kill -HUP "$SSH_AGENT_PID"`,
	}[name]; meant != "" {
		return exit.WithHint(failed, "to "+name+", type: "+meant)
	}
	for _, c := range newRootCommand().Commands() {
		if c.Name() == name {
			return exit.WithHint(failed, "did you mean: p11-agent "+name)
		}
	}
	return failed
}

// killAgent ends the agent of the environment, as ssh-agent -k does.
func killAgent(s output.Shell, out io.Writer) error {
	pid, err := daemon.EndNamed()
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, s.Unset(paths.SocketVariable)+s.Unset(paths.PIDVariable)+fmt.Sprintf("echo Agent pid %d killed;\n", pid))
	return err
}

// warn tells a person of a problem that ends nothing.
func warn(err error) { fmt.Fprintf(os.Stderr, "p11-agent: warning: %v\n", err) }
