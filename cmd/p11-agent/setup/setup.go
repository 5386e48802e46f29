// Package setup leads a person from a token, or from nothing, to the first login. Each step says what it does and asks first.
// A step that is done already is not done again. Ctrl-C ends the conversation, and leaves nothing half done.
package setup

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
	"p11-agent/systemd/install"
)

// A conversation is a run of setup. One goroutine uses it.
type conversation struct {
	target      install.Target
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

// Options say how the conversation goes.
type Options struct {
	Print  bool           // only tell the steps, and change nothing
	Target install.Target // where the units of the agent are installed
}

// Run leads a person to the first login. It asks on in and out, if both are terminals. Otherwise it tells the steps that are
// left, and returns an error if there are any. A step that fails is told on stderr, and the error is an [exit.Status].
func Run(ctx context.Context, o Options, in io.Reader, out, stderr io.Writer) error {
	if !filepath.IsAbs(os.Getenv("HOME")) {
		return errors.New("HOME does not name a directory, so there is no place for ssh's configuration")
	}
	c, err := config.Load("")
	if err != nil {
		return err
	}
	// A signal ends the conversation between two steps: each step is done as a whole.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s := &conversation{target: o.Target, config: c, out: out, stderr: stderr, log: output.NewLog(stderr, slog.LevelError)}
	defer s.close()
	if !o.Print {
		s.ask = newDialog(in, out)
	}
	s.making = newkey.NewProgress(ctx, stderr, newKind)
	err = s.run(ctx)
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return errInterrupted // between two questions
	case err != nil:
		return err
	case s.failed:
		return exit.Status(exit.CodeFailure)
	case len(s.left) == 0 || o.Print:
		return nil
	}
	return fmt.Errorf("%s left to do (%s), and there is no terminal to ask at: run p11-agent setup in a terminal",
		map[bool]string{true: "1 step is", false: fmt.Sprintf("%d steps are", len(s.left))}[len(s.left) == 1], strings.Join(s.left, ", "))
}

// close closes the agent's connection and the modules.
func (s *conversation) close() {
	if s.agent != nil {
		_ = s.agent.Close()
	}
	if s.b != nil {
		s.b.Close()
	}
}

// say prints a line.
func (s *conversation) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// run goes through the steps. A step that fails ends the conversation only if later steps need it.
func (s *conversation) run(ctx context.Context) error {
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

// offer begins a step, and tells whether to do it. done says that the step is done already. what says what the step does.
func (s *conversation) offer(ctx context.Context, title, done string, what ...string) (bool, error) {
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
func (s *conversation) toDo(title string, what ...string) {
	s.left = append(s.left, strings.ToLower(title[:1])+title[1:])
	for i, line := range what {
		s.say("  %s%s", []string{"to do: ", "       "}[min(i, 1)], line)
	}
}

// trouble tells of a step that failed, if later steps do not need it.
func (s *conversation) trouble(err error) {
	s.failed = true
	fmt.Fprintf(s.stderr, "  p11-agent: error: %v\n", err)
}

// look looks at all modules again. It finds modules that were installed in between.
func (s *conversation) look(ctx context.Context) {
	if s.b != nil {
		s.b.Close()
	}
	// A module that does not answer may not be the module of the token.
	s.b = backend.Look(ctx, s.config, backend.Options{
		Log: s.log, PINs: prompt.New(s.config, prompt.Options{Log: s.log}), Generating: s.making.Begin,
	})
}

// finish says what comes next.
func (s *conversation) finish() {
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

// attached runs a program at the terminal of this program.
func (s *conversation) attached(ctx context.Context, argv ...string) error {
	s.say("  $ %s", output.CommandLine(argv))
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, s.out, s.stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", argv[0], err)
	}
	return nil
}

// marked returns the key whose public half is in ~/.ssh, as an earlier run chose it. It returns false if there are several.
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

// publicFile returns the file for the public half of a key.
func publicFile(e export.Key) string {
	return filepath.Join(os.Getenv("HOME"), ".ssh", e.Name+".pub")
}

// describeKey names a key to a person.
func describeKey(e export.Key) string {
	return fmt.Sprintf("key %q on token %q (%s)", plain.Line(cmp.Or(e.Token.Label(), "without label")), plain.Line(e.Token.Token().Label), e.Public.Type())
}

// keysNow returns the keys that the agent offers, as they are exported.
func (s *conversation) keysNow() []export.Key {
	keys, err := export.Keys(s.config, s.b.Store, nil, backend.Comment)
	if err != nil {
		return nil // there are no keys
	}
	// A key that is only remembered cannot be used until its token is back.
	return slices.DeleteFunc(keys, func(e export.Key) bool { return !slices.Contains(s.b.Store.Keys(), e.Token) })
}
