package setup

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/systemd"
	"p11-agent/systemd/install"
)

// userManagerRuns tells whether the user has a systemd that answers.
func userManagerRuns() bool {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if _, err := exec.LookPath("systemctl"); err != nil || dir == "" || !systemd.Booted() {
		return false
	}
	st, err := os.Stat(filepath.Join(dir, "systemd", "private"))
	return err == nil && st.Mode().Type() == fs.ModeSocket
}

// startAgent makes systemd start the agent, or starts it in the background. It connects to the agent before a person types
// the PIN: see [status.Query].
func (s *conversation) startAgent(ctx context.Context) error {
	const title = "The agent"
	socket := paths.SetupSocket()
	done := ""
	a, err := status.Query(ctx, socket, "")
	switch {
	case err == nil:
		s.agent = a
		done = "it answers at " + output.HomePath(socket)
	case !status.IsNotFound(err):
		return err
	}
	what := []string{
		"start it in the background, as systemd does not run for you here:",
		fmt.Sprintf("p11-agent agent -a %s", output.HomePath(socket)),
	}
	start := s.startBackground
	if userManagerRuns() {
		what = []string{
			"have systemd start it with the first use, after every login:",
			"p11-agent install --user --now  (p11-agent uninstall --user takes it back)",
		}
		start = s.startUnits
	}
	yes, err := s.offer(ctx, title, done, what...)
	if err != nil || !yes {
		return err
	}
	if err := start(ctx, socket); err != nil {
		return err
	}
	s.changed = true
	if s.agent, err = status.Query(ctx, socket, ""); err != nil {
		return fmt.Errorf("the agent was started, and does not answer at %s: %w", socket, err)
	}
	s.say("  it answers at %s", output.HomePath(socket))
	return nil
}

// startUnits installs and starts the units. Ctrl-C does not reach systemctl, so units that are written are enabled as
// well.
func (s *conversation) startUnits(ctx context.Context, _ string) error {
	var said bytes.Buffer
	ctx = context.WithoutCancel(ctx)
	in, err := install.New(ctx, s.target, &said, s.stderr)
	if err != nil {
		return err
	}
	if err := in.Install(ctx, install.Options{Start: true}); err != nil {
		return err
	}
	for line := range strings.Lines(said.String()) {
		if strings.HasPrefix(line, "wrote ") {
			s.say("  %s", strings.TrimSpace(line))
		}
	}
	if others := install.OtherAgents(s.target.ConfigHome); len(others) > 0 {
		s.say("  note: other agents are enabled, too. To switch them off: systemctl --user mask --now %s", strings.Join(others, " "))
	}
	return nil
}

// startBackground starts the agent at a socket of its own.
func (s *conversation) startBackground(ctx context.Context, socket string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's own file: %w", err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, "agent", "-s", "-a", socket)
	cmd.Stderr = s.stderr
	// Ctrl-C reaches this program only: the agent finishes its start.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return err
	}
	if _, err := cmd.Output(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	return nil
}

// leadSSH makes ssh ask the agent, even if SSH_AUTH_SOCK names another agent.
func (s *conversation) leadSSH(ctx context.Context) error {
	socket := paths.SetupSocket()
	done := ""
	settings := probe.ReadSSH(ctx)
	if settings.Agent == socket {
		done = "its configuration names " + output.HomePath(socket)
	}
	own := filepath.Join(filepath.Dir(paths.ConfigFile()), "ssh_config")
	file := filepath.Join(os.Getenv("HOME"), ".ssh", "config")
	line := install.Include(own)
	yes, err := s.offer(ctx, "ssh", done,
		fmt.Sprintf("have it ask this agent, by this line at the top of %s:", output.HomePath(file)), line)
	if err != nil || !yes {
		return err
	}
	if settings.Err != nil {
		s.trouble(settings.Err)
		return nil
	}
	if err := writeInclude(own, file, line, socket); err != nil {
		s.trouble(err)
		return nil
	}
	s.changed = true
	if now := probe.ReadSSH(ctx); now.Agent != socket {
		s.trouble(fmt.Errorf("the line is in %s, and ssh does not heed it: %w", file,
			cmp.Or(now.Err, fmt.Errorf("it asks %q; p11-agent doctor tells more", now.Agent))))
		return nil
	}
	s.say("  wrote %s", output.HomePath(file))
	return nil
}

// writeInclude writes the file that names the socket, unless install wrote it, and then the line that includes the file.
func writeInclude(own, file, line, socket string) error {
	if _, err := os.Lstat(own); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(own), 0o700); err != nil {
			return err
		}
		text := install.Marker + "Host *\n    " + paths.IdentityAgent(socket) + "\n"
		if err := files.Create(own, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return files.Prepend(file, line+"\n\n")
}
