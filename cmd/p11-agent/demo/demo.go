// Package demo shows the agent at work with a software token, an sshd and a git
// repository of its own.
//
// It promises that everything it makes is in one new directory, and that it stops all
// programs that it has started. It runs p11-agent and the other programs as a user would,
// by their command lines, and prints each line before it runs it.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token/wellknown"
)

// The token of the demo. Its PIN is not a secret: only this user can read the directory
// of the token, and the token goes with the demo.
const (
	tokenLabel = "p11-agent-demo"
	tokenURI   = "pkcs11:token=" + tokenLabel
	pin        = "123456"
	soPIN      = "12345678"
	email      = "demo@example.org"
)

const (
	// patience is how long one command of the demo may take.
	patience = 20 * time.Second
	// poll is how often the demo looks at a socket or a terminal that it waits for.
	poll = 50 * time.Millisecond
	// grace is how long a program of the demo may take to end before the demo kills it.
	grace = 3 * time.Second
)

// A demo is one run. Only one goroutine uses it.
type demo struct {
	out      io.Writer
	dir      string
	env      []string // of every program
	programs map[string]string
	module   string // SoftHSM's
	user     string
	tty      string // where pinentry asks; empty: SSH_ASKPASS answers
	terminal bool   // tmux was started
	running  []*started

	passed, failed int
}

// A started program runs in the background. One goroutine waits for its end, and closes
// ended.
type started struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// Run shows the demo on out. It returns whether each step has worked, and an error when
// it cannot start the demo or the demo is interrupted. With keep it leaves the directory,
// and prints how to use it by hand.
func Run(ctx context.Context, out io.Writer, keep bool) (ok bool, err error) {
	// SIGPIPE: without a reader, the demo ends.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	// The kernel ends the programs in the background when the thread that has started
	// them ends (PR_SET_PDEATHSIG). So they end when the demo is killed.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	d := &demo{out: out}
	if err := d.find(); err != nil {
		return false, err
	}
	if err := d.prepare(); err != nil {
		return false, errors.Join(err, os.RemoveAll(d.dir))
	}
	completed := d.play(ctx)
	d.stopAll()
	if d.failed > 0 {
		d.showLogs()
	}
	if keep {
		d.explainKept()
	} else if err := os.RemoveAll(d.dir); err != nil {
		return false, err
	}
	if ctx.Err() != nil {
		return false, errors.New("the demo was interrupted")
	}
	if !completed {
		d.say("\nThe rest was not tried.")
	}
	d.say("\n%d passed, %d failed", d.passed, d.failed)
	return d.failed == 0, nil
}

// say prints a line.
func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// find finds the programs. The error names those that are missing.
func (d *demo) find() error {
	d.programs = make(map[string]string)
	var missing []string
	for _, name := range []string{"softhsm2-util", "pkcs11-tool", "ssh", "ssh-add", "ssh-keygen", "sshd", "git", "pinentry-curses", "tmux"} {
		path, err := exec.LookPath(name)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil && name == "sshd" { // PATH of many users leaves it out
			path, err = firstFile("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd")
		}
		switch {
		case err == nil:
			d.programs[name] = path
		case name != "tmux" && name != "pinentry-curses": // the demo can do without these two
			missing = append(missing, name)
		}
	}
	var err error
	if d.module, err = wellknown.SoftHSMModule(); err != nil {
		missing = append(missing, "libsofthsm2.so")
	}
	if len(missing) > 0 {
		return fmt.Errorf("the demo cannot start, because these are not installed: %s: install them, or run \"make deps-demo\"", strings.Join(missing, ", "))
	}
	if d.programs["p11-agent"], err = os.Executable(); err != nil {
		return fmt.Errorf("find this program's own file: %w", err)
	}
	u, err := user.Current()
	if err != nil {
		return fmt.Errorf("find the name of this user: %w", err)
	}
	d.user = u.Username
	return nil
}

// firstFile returns the first file that matches one of the patterns.
func firstFile(patterns ...string) (string, error) {
	for _, pattern := range patterns {
		// Glob fails on malformed patterns only, and these are constants.
		if files, _ := filepath.Glob(pattern); len(files) > 0 {
			return files[0], nil
		}
	}
	return "", os.ErrNotExist
}

// prepare makes the directory and the environment of all programs.
func (d *demo) prepare() (err error) {
	if d.dir, err = os.MkdirTemp("", "p11-demo-"); err != nil {
		return err
	}
	if len(d.dir) > 90 { // the path of a socket in it has 107 bytes at most
		if err := os.Remove(d.dir); err != nil {
			return err
		}
		if d.dir, err = os.MkdirTemp("/tmp", "p11-demo-"); err != nil {
			return err
		}
	}
	for _, dir := range []string{"home/.config/p11-agent", "home/.ssh", "tokens", "bin"} {
		if err := os.MkdirAll(d.path(dir), 0o700); err != nil {
			return err
		}
	}
	if err := os.Symlink(d.programs["p11-agent"], d.path("bin/p11-agent")); err != nil {
		return err
	}
	d.env = []string{
		"HOME=" + d.path("home"),
		"SOFTHSM2_CONF=" + d.path("softhsm2.conf"),
		"SSH_AUTH_SOCK=" + d.path("agent.sock"),
		"P11_KIT_NO_USER_CONFIG=1",
		"GIT_CONFIG_NOSYSTEM=1",
		"LC_ALL=C.UTF-8",
		"PATH=" + d.path("bin") + ":" + os.Getenv("PATH"),
	}
	return nil
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// play runs all parts. It returns false when a step fails that later steps need, or when
// ctx has ended.
func (d *demo) play(ctx context.Context) bool {
	d.say("An agent, a software token, sshd and git, all in %s.", d.dir)
	d.say("Every command below runs there, with this environment:\n")
	d.say("cd %s", output.ShellWord(d.dir))
	for _, line := range d.exports() {
		d.say("%s", line)
	}
	for _, part := range []func(context.Context) bool{
		d.makeToken, d.startAgent, d.startServer, d.makeRepository, d.asked, d.constrained, d.fromFile,
	} {
		if !part(ctx) {
			return false
		}
	}
	return true
}

func (d *demo) exports() []string {
	var lines []string
	for _, kv := range d.env {
		name, value, _ := strings.Cut(kv, "=")
		if name == "PATH" {
			lines = append(lines, "export PATH="+output.ShellWord(d.path("bin"))+`:"$PATH"`)
			continue
		}
		lines = append(lines, "export "+name+"="+output.ShellWord(value))
	}
	return lines
}

// showLogs prints the ends of the logs.
func (d *demo) showLogs() {
	for _, name := range []string{"agent.log", "sshd.log"} {
		b, err := os.ReadFile(d.path(name))
		if err != nil {
			continue // the program was not started
		}
		d.say("\nThe end of %s:", name)
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		d.indent(strings.Join(lines[max(0, len(lines)-20):], "\n"))
	}
}

// explainKept prints how to use the directory by hand.
func (d *demo) explainKept() {
	text := strings.Join(append(d.exports(), "cd "+output.ShellWord(d.dir)), "\n") + "\n"
	if d.tty == "" {
		text = "export SSH_ASKPASS=" + output.ShellWord(d.path("askpass")) + "\n" + text
	}
	if err := os.WriteFile(d.path("env.sh"), []byte(text), 0o600); err != nil {
		d.result(err)
		return
	}
	d.say(`
The directory stays, and all programs have ended. To go on by hand, use a shell that you
do not need for other things (the PIN is %s):

    . %s
    p11-agent list
    p11-agent agent -D -a "$SSH_AUTH_SOCK" 2>agent.log &
    ssh-add -l
    %s -D -E "$PWD/sshd.log" -f sshd_config &
    ssh -T -F ssh_config -i p256.pub demo
    kill %%1 %%2

When you do not need the directory any more:

    rm -r %s`, pin, output.ShellWord(d.path("env.sh")), d.programs["sshd"], output.ShellWord(d.dir))
}
