package demo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"p11-agent/cmd/p11-agent/output"
)

// write makes a file that only this user can read, and shows it.
func (d *demo) write(name, content string, perm os.FileMode) bool {
	d.say("\n$ cat >%s <<'EOF'\n%s\nEOF", output.ShellWord(name), strings.TrimSuffix(content, "\n"))
	if perm != 0o600 {
		d.say("$ chmod %#o %s", perm, output.ShellWord(name))
	}
	return d.result(os.WriteFile(d.path(name), []byte(content), perm))
}

// result counts a step, and prints whether it has worked.
func (d *demo) result(err error) bool {
	if err != nil {
		d.failed++
		d.say("FAILED: %v", err)
		return false
	}
	d.passed++
	d.say("ok")
	return true
}

// A step is one command line.
type step struct {
	argv []string
	to   string // the file for its output
	// status is the expected exit status.
	status int
	// show prints the output also when the command has worked.
	show bool
	// meanwhile runs at the same time as the command. Its context ends with the command.
	meanwhile func(context.Context) error
}

// run runs one command to its end, and tells whether it has worked.
func (d *demo) run(ctx context.Context, s step) bool {
	if ctx.Err() != nil {
		return false
	}
	line := output.CommandLine(s.argv)
	if s.to != "" {
		line += " >" + output.ShellWord(s.to)
	}
	d.say("\n$ %s", line)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := d.command(ctx, s.argv)
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &printed
	if s.to != "" {
		f, err := os.OpenFile(d.path(s.to), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return d.result(err)
		}
		defer f.Close()
		cmd.Stdout = f
	}
	err := cmd.Start()
	if err == nil {
		err = d.wait(ctx, cmd, s)
	}
	switch ctx.Err() {
	case context.DeadlineExceeded:
		err = fmt.Errorf("the command did not end within %v", patience)
	case context.Canceled:
		return false // the demo was interrupted; the command has not failed
	}
	if s.show || err != nil {
		d.indent(printed.String())
	}
	return d.result(err)
}

// wait waits for the ends of a command and of meanwhile.
func (d *demo) wait(ctx context.Context, cmd *exec.Cmd, s step) error {
	meanwhile := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	if s.meanwhile != nil {
		go func() { meanwhile <- s.meanwhile(ctx) }()
	} else {
		meanwhile <- nil
	}
	err := cmd.Wait()
	cancel()
	if s.status != 0 {
		switch status := cmd.ProcessState.ExitCode(); {
		case status == s.status:
			err = nil
		case err == nil:
			err = fmt.Errorf("exit status %d, expected %d", status, s.status)
		}
	}
	return errors.Join(err, <-meanwhile)
}

// command makes a command that runs in the directory and the environment of the demo. The
// command has no terminal, so only the agent can ask a person.
func (d *demo) command(ctx context.Context, argv []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, cmp.Or(d.programs[argv[0]], argv[0]), argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Dir = d.dir
	cmd.Env = slices.Clone(d.env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// The programs that it has started are in its session, and end with it.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// indent prints the output of a program.
func (d *demo) indent(text string) {
	for line := range strings.Lines(text) {
		d.say("    %s", strings.TrimRight(line, "\r\n"))
	}
}

// background starts a program in the background, with additions to its environment, and
// waits until ready returns nil.
func (d *demo) background(ctx context.Context, env, argv []string, logName string, ready func(context.Context) error) bool {
	assignments := ""
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		assignments += name + "=" + output.ShellWord(value) + " "
	}
	d.say("\n$ %s%s >%s 2>&1 &", assignments, output.CommandLine(argv), output.ShellWord(logName))
	f, err := os.OpenFile(d.path(logName), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return d.result(err)
	}
	defer f.Close()
	// The end of ctx would kill the program. stopAll ends it with SIGTERM.
	cmd := d.command(context.Background(), argv)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	if err := cmd.Start(); err != nil {
		return d.result(err)
	}
	p := &started{cmd: cmd, ended: make(chan struct{})}
	d.running = append(d.running, p)
	go func() {
		_ = cmd.Wait() // cmd.ProcessState has the status
		close(p.ended)
	}()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return d.result(nil)
		}
		select {
		case <-p.ended:
			return d.result(fmt.Errorf("the program has ended: %v", cmd.ProcessState))
		case <-ctx.Done():
			if ctx.Err() == context.Canceled {
				return false
			}
			return d.result(fmt.Errorf("the program was not ready within %v: %w", patience, err))
		case <-time.After(poll):
		}
	}
}

// stopAll ends the programs in the background, the last one first.
func (d *demo) stopAll() {
	for len(d.running) > 0 {
		p := d.running[len(d.running)-1]
		d.running = d.running[:len(d.running)-1]
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // the program may have ended
		late := time.AfterFunc(grace, func() { _ = p.cmd.Process.Kill() })
		<-p.ended
		late.Stop()
	}
	if d.terminal {
		_ = d.command(context.Background(), d.tmux("kill-server")).Run() // likewise
	}
}

// dial returns nil when a program listens.
func dial(ctx context.Context, network, address string) error {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	return c.Close()
}

// freePort returns a port that is free at this moment.
func freePort() (int, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	port := l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // that of a TCP listener
	return port, l.Close()
}

// rootLocked tells whether this user is root, and its password is locked in the way that
// sshd looks for. The sshd of another user cannot see that.
func rootLocked() bool {
	if os.Geteuid() != 0 {
		return false
	}
	b, err := os.ReadFile("/etc/shadow")
	if err != nil {
		return false
	}
	defer clear(b)
	for line := range bytes.Lines(b) {
		if bytes.HasPrefix(line, []byte("root:!")) {
			return true
		}
	}
	return false
}
