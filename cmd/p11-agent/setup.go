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
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/export"
	"p11-agent/cmd/p11-agent/newkey"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
)

type setupOptions struct {
	print bool
}

func newSetupCommand(g *globals) *cobra.Command {
	o := new(setupOptions)
	cmd := &cobra.Command{
		Use:   "setup [flags]",
		Short: "Lead to the first login, in one conversation",
		Long: `Lead from a token, or from nothing, to the first login. It looks for tokens and
keys, makes a key where there is none, on a new token if need be, starts the agent,
has ssh ask the agent, shows the line for authorized_keys, copies it to a host, and
has git sign.

Each step says what it does, and asks first: no leaves everything as it is. A step
that is done already is not done again. Ctrl-C ends the conversation, and leaves
nothing half done. The PIN is typed once.

Without a terminal it says what is left to do, and changes nothing. The exit status
is 1 then, unless all is done.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runSetup(cmd.Context(), g, o, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&o.print, "print", false, "only tell what would be done")
	return cmd
}

// A setup is a conversation under way. One goroutine uses it.
type setup struct {
	config      *config.File
	out, stderr io.Writer
	log         *slog.Logger
	ask         *dialog // nil: it only tells
	b           *backend.Modules
	making      *newkey.Progress

	plan  *choice    // the key to use
	key   export.Key // once it is there
	uri   string     // of its token
	agent *status.Agent

	left    []string // steps that are left, when it only tells
	changed bool
	failed  bool
}

func runSetup(ctx context.Context, g *globals, o *setupOptions, in io.Reader, out, stderr io.Writer) error {
	if g.config != "" {
		return exit.Usage(errors.New("--config means nothing here: setup is about the agent that reads the usual file"))
	}
	if !filepath.IsAbs(os.Getenv("HOME")) {
		return errors.New("HOME does not name a directory, so there is no place for ssh's configuration")
	}
	c, err := config.Load("")
	if err != nil {
		return err
	}
	// Whatever is under way is done as a whole: see each step.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s := &setup{config: c, out: out, stderr: stderr, log: output.NewLog(stderr, slog.LevelError)}
	defer s.close()
	if !o.print {
		s.ask = newDialog(in, out)
	}
	s.making = newkey.NewProgress(ctx, stderr, setupKind)
	err = s.run(ctx)
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return errInterrupted // between two questions
	case err != nil:
		return err
	case s.failed:
		return exit.Status(exit.CodeFailure)
	case len(s.left) == 0 || o.print:
		return nil
	}
	return fmt.Errorf("%s left to do (%s), and there is no terminal to ask at: run p11-agent setup in a terminal",
		map[bool]string{true: "1 step is", false: fmt.Sprintf("%d steps are", len(s.left))}[len(s.left) == 1], strings.Join(s.left, ", "))
}

// close ends what was opened.
func (s *setup) close() {
	if s.agent != nil {
		_ = s.agent.Close()
	}
	if s.b != nil {
		s.b.Close()
	}
}

// say prints a line.
func (s *setup) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// run goes through the steps. A step that fails is told, and ends the conversation
// where the following ones need it.
func (s *setup) run(ctx context.Context) error {
	if s.ask != nil {
		s.say("This leads to the first login. Each step asks before it changes anything; Ctrl-C ends it.")
	}
	for _, step := range []func(context.Context) error{
		s.chooseKey, s.startAgent, s.makeKey, s.leadSSH, s.authorize, s.signWithGit,
	} {
		if err := step(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errInterrupted
		}
	}
	s.finish()
	return nil
}

// offer begins a step, and tells whether it is to be done. done says that it is done
// already; what says what it does.
func (s *setup) offer(ctx context.Context, title, done string, what ...string) (bool, error) {
	s.say("\n%s", title)
	if done != "" {
		s.say("  done: %s", done)
		return false, nil
	}
	if s.ask == nil {
		s.toDo(title, what...)
		return false, nil
	}
	for _, line := range what {
		s.say("  %s", line)
	}
	yes, err := s.ask.yes(ctx, "  Do this?", true)
	if err == nil && !yes {
		s.say("  left as it is")
	}
	return yes, err
}

// toDo tells of a step that is left.
func (s *setup) toDo(title string, what ...string) {
	s.left = append(s.left, strings.ToLower(title[:1])+title[1:])
	for i, line := range what {
		s.say("  %s%s", []string{"to do: ", "       "}[min(i, 1)], line)
	}
}

// trouble tells of a step that failed and that the following ones do not need.
func (s *setup) trouble(err error) {
	s.failed = true
	fmt.Fprintf(s.stderr, "  p11-agent: error: %v\n", err)
}

// look looks at all modules, those too that have just been installed.
func (s *setup) look(ctx context.Context) {
	if s.b != nil {
		s.b.Close()
	}
	// A module that does not answer may be another one than that of the token.
	s.b = backend.Look(ctx, s.config, backend.Options{
		Log: s.log, PINs: prompt.New(s.config, prompt.Options{Log: s.log}), Generating: s.making.Begin,
	})
}

// finish says what comes next.
func (s *setup) finish() {
	if len(s.left) > 0 || s.key.Token == nil {
		return
	}
	if !s.changed && !s.failed {
		s.say("\nEverything is done.")
	}
	s.say("\nLog in, where the line above is in ~/.ssh/authorized_keys:\n\n    ssh host")
	if socket := paths.SetupSocket(); os.Getenv(paths.SocketVariable) != socket && s.agent != nil {
		s.say("\nssh finds the agent by its configuration. ssh-add and git need this line, in this shell and in ~/.profile:\n\n    export SSH_AUTH_SOCK=%s", output.ShellWord(socket))
		if !userManagerRuns() {
			s.say("    p11-agent agent -s -a \"$SSH_AUTH_SOCK\" >/dev/null 2>&1 || :   # starts it after a restart of the machine")
		}
	}
	s.say("\np11-agent doctor says why, if something does not work.")
}

// attached runs a program at the terminal of this one.
func (s *setup) attached(ctx context.Context, argv ...string) error {
	s.say("  $ %s", output.CommandLine(argv))
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, s.out, s.stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", argv[0], err)
	}
	return nil
}

// marked returns the one key whose public half is in ~/.ssh: it was chosen before.
func marked(keys []export.Key) (export.Key, bool) {
	var found []export.Key
	for _, e := range keys {
		if same, err := export.Holds(publicFile(e), e.Public); err == nil && same {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		return export.Key{}, false
	}
	return found[0], true
}

// publicFile is where the public half of a key is written to.
func publicFile(e export.Key) string {
	return filepath.Join(os.Getenv("HOME"), ".ssh", e.Name+".pub")
}

// describe names a key to a person.
func describeKey(e export.Key) string {
	return fmt.Sprintf("key %q on token %q (%s)", plain.Line(cmp.Or(e.Token.Label(), "without label")), plain.Line(e.Token.Token().Label), e.Public.Type())
}

// keysNow returns the keys that the agent offers, as they are exported.
func (s *setup) keysNow() []export.Key {
	keys, err := export.Keys(s.config, s.b.Store, nil, backend.Comment)
	if err != nil {
		return nil // there is none
	}
	// One that is remembered only can be used once its token is back.
	return slices.DeleteFunc(keys, func(e export.Key) bool { return !slices.Contains(s.b.Store.Keys(), e.Token) })
}
