package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token/registry"
)

// The throw-away token of the demo. Its PIN is no secret: nobody else can read
// the directory that the token is in, and it ends with the demo.
const (
	demoToken = "p11-agent-demo"
	demoURI   = "pkcs11:token=" + demoToken
	demoPIN   = "123456"
	demoSOPIN = "12345678"
	demoEmail = "demo@example.org"
)

const (
	// demoPatience is how long one command of the demo may take.
	demoPatience = 20 * time.Second
	// demoPoll is how often the demo looks whether something has happened that
	// nobody tells it.
	demoPoll = 50 * time.Millisecond
	// demoGrace is how long a program of the demo gets for ending by itself.
	demoGrace = 3 * time.Second
)

type demoOptions struct {
	keep bool
}

func newDemoCommand() *cobra.Command {
	o := new(demoOptions)
	cmd := &cobra.Command{
		Use:   "demo [flags]",
		Short: "Show the agent at work with a throw-away token",
		Long: `Show the agent at work: make a software token with two keys, run the agent, log
in to an sshd on the loopback interface with each key, sign and verify git
commits, and give PINs by pinentry and from a file. Every command line is printed
before it runs.

Everything is made in a new temporary directory, and is stopped and removed at
the end and on Ctrl-C. Your home directory, your agent, your tokens and your git
and ssh configuration are not touched. It needs softhsm2-util, pkcs11-tool, git
and OpenSSH with sshd; with tmux and pinentry-curses it shows a real prompt.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDemo(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&o.keep, "keep", false, "leave the directory, and say how to use it by hand")
	return cmd
}

// demo is a demo under way. One goroutine uses it.
type demo struct {
	out      io.Writer
	dir      string
	env      []string // of every program
	programs map[string]string
	module   string // SoftHSM's
	user     string
	tty      string // that pinentry asks on; empty: SSH_ASKPASS answers
	terminal bool   // tmux was started
	running  []*started

	passed, failed int
}

// started is a program in the background. Only the goroutine that closes ended
// waits for it.
type started struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func runDemo(ctx context.Context, o *demoOptions, out io.Writer) (err error) {
	// SIGPIPE: when nobody reads any more, there is nothing to show.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	// Programs in the background are told to end when the thread that has
	// started them does (PR_SET_PDEATHSIG): should the demo be killed, they go.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	d := &demo{out: out}
	if err := d.find(); err != nil {
		return err
	}
	if err := d.prepare(); err != nil {
		return errors.Join(err, os.RemoveAll(d.dir))
	}
	completed := d.play(ctx)
	d.stopAll()
	if d.failed > 0 {
		d.showLogs()
	}
	if o.keep {
		d.explainKept()
	} else if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errors.New("the demo was interrupted")
	}
	if !completed {
		d.say("\nThe rest was not tried.")
	}
	d.say("\n%d passed, %d failed", d.passed, d.failed)
	if d.failed > 0 {
		return exit.Status(exit.CodeFailure)
	}
	return nil
}

// say prints a line. When nobody reads it, SIGPIPE ends the demo.
func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// find finds the programs, and says which are missing.
func (d *demo) find() error {
	d.programs = make(map[string]string)
	var missing []string
	for _, name := range []string{"softhsm2-util", "pkcs11-tool", "ssh", "ssh-add", "ssh-keygen", "sshd", "git", "pinentry-curses", "tmux"} {
		path, err := exec.LookPath(name)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil && name == "sshd" { // not in everybody's PATH
			path, err = firstFile("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd")
		}
		switch {
		case err == nil:
			d.programs[name] = path
		case name != "tmux" && name != "pinentry-curses": // SSH_ASKPASS stands in for them
			missing = append(missing, name)
		}
	}
	var err error
	if d.module, err = firstFile("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/*/softhsm/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib*/pkcs11/libsofthsm2.so", "/usr/lib/*/pkcs11/libsofthsm2.so",
		"/usr/lib*/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"); err != nil {
		missing = append(missing, "libsofthsm2.so")
	}
	if len(missing) > 0 {
		return fmt.Errorf("the demo needs what is not installed here: %s: run \"make deps-demo\", or install it by other means", strings.Join(missing, ", "))
	}
	if d.programs["p11-agent"], err = os.Executable(); err != nil {
		return fmt.Errorf("find this program's own file: %w", err)
	}
	u, err := user.Current()
	if err != nil {
		return fmt.Errorf("ssh has to know who logs in: %w", err)
	}
	d.user = u.Username
	return nil
}

// firstFile returns the first file that matches one of the patterns.
func firstFile(patterns ...string) (string, error) {
	for _, pattern := range patterns {
		// The patterns are constants: Glob fails on malformed ones only.
		if files, _ := filepath.Glob(pattern); len(files) > 0 {
			return files[0], nil
		}
	}
	return "", os.ErrNotExist
}

// prepare makes the directory and the environment that everything runs in.
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

// write makes a file and shows it. Nothing of it is for others to read.
func (d *demo) write(name, content string, perm os.FileMode) bool {
	d.say("\n$ cat >%s <<'EOF'\n%s\nEOF", output.ShellWord(name), strings.TrimSuffix(content, "\n"))
	if perm != 0o600 {
		d.say("$ chmod %#o %s", perm, output.ShellWord(name))
	}
	return d.result(os.WriteFile(d.path(name), []byte(content), perm))
}

// result counts and prints how a step went.
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
	to   string // the file that takes its output
	// status is the one that it is to end with.
	status int
	// show is for commands with an output that is worth reading when nothing is
	// wrong.
	show bool
	// meanwhile is done while the command runs. Its context ends with it.
	meanwhile func(context.Context) error
}

// run runs one command and tells whether it did what it should. It waits for
// its end.
func (d *demo) run(ctx context.Context, s step) bool {
	if ctx.Err() != nil {
		return false
	}
	line := output.CommandLine(s.argv)
	if s.to != "" {
		line += " >" + output.ShellWord(s.to)
	}
	d.say("\n$ %s", line)
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
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
		err = fmt.Errorf("it took longer than %v", demoPatience)
	case context.Canceled:
		return false // the demo ends, which is no failure of the command
	}
	if s.show || err != nil {
		d.indent(printed.String())
	}
	return d.result(err)
}

// wait waits for the end of a command, and of what is done meanwhile.
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
			err = fmt.Errorf("it ended with status %d, not with %d", status, s.status)
		}
	}
	return errors.Join(err, <-meanwhile)
}

// command makes a command of the demo: in its directory and environment, and
// without a terminal, so that whatever may ask a person asks by way of the agent.
func (d *demo) command(ctx context.Context, argv []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, cmp.Or(d.programs[argv[0]], argv[0]), argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Dir = d.dir
	cmd.Env = slices.Clone(d.env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What it has started is in its session, and goes with it.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// indent prints what a program has printed.
func (d *demo) indent(text string) {
	for line := range strings.Lines(text) {
		d.say("    %s", strings.TrimRight(line, "\r\n"))
	}
}

// play runs the whole demo. It returns false when something failed that
// everything after it needs, or ctx has ended.
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

func (d *demo) heading(text string) { d.say("\n== %s", text) }

// makeToken makes the token and its two keys.
func (d *demo) makeToken(ctx context.Context) bool {
	d.heading("A token with an RSA key and a P-256 key. Its PIN is " + demoPIN + ".")
	key := func(kind, id, label string) bool {
		return d.run(ctx, step{argv: []string{
			"pkcs11-tool", "--module", d.module, "--token-label", demoToken, "--login", "--pin", demoPIN,
			"--keypairgen", "--key-type", kind, "--id", id, "--label", label,
		}})
	}
	return d.write("softhsm2.conf", "directories.tokendir = "+d.path("tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600) &&
		d.run(ctx, step{argv: []string{
			"softhsm2-util", "--init-token", "--free", "--label", demoToken, "--pin", demoPIN, "--so-pin", demoSOPIN,
		}}) &&
		key("rsa:2048", "01", "rsa") && key("EC:prime256v1", "02", "p256")
}

// startAgent configures and starts the agent.
func (d *demo) startAgent(ctx context.Context) bool {
	d.heading("The agent. Its configuration names this token, and leaves all others alone.")
	var b strings.Builder
	fmt.Fprintf(&b, "keys = [%q]\n", demoURI)
	if d.programs["tmux"] != "" && d.programs["pinentry-curses"] != "" {
		fmt.Fprintf(&b, "\n[pinentry]\nprogram = %q\n", d.programs["pinentry-curses"])
	}
	fmt.Fprintf(&b, "\n[[module]]\nname = \"softhsm2\"\npath = %q\n", d.module)
	for _, name := range d.otherModules() {
		fmt.Fprintf(&b, "\n[[module]]\nname = %q\nenabled = false\n", name)
	}
	const config = "home/.config/p11-agent/config.toml"
	if !d.write(config, b.String(), 0o600) || !d.openTerminal(ctx) {
		return false
	}
	person := []string{"SSH_ASKPASS=" + d.path("askpass")}
	if d.tty != "" {
		person = []string{"GPG_TTY=" + d.tty, "TERM=screen"}
	}
	ok := d.run(ctx, step{argv: []string{"p11-agent", "list"}, show: true})
	argv := []string{"p11-agent", "agent", "-D", "-a", "agent.sock"}
	return d.background(ctx, person, argv, "agent.log", func(ctx context.Context) error {
		return dial(ctx, "unix", d.path("agent.sock"))
	}) && d.run(ctx, step{argv: []string{"ssh-add", "-l"}, show: true}) && ok
}

// otherModules returns the registered modules that the demo has no use for: a
// card that happens to be in the reader is not its business.
func (d *demo) otherModules() []string {
	lookup := func(name string) (string, bool) {
		for _, kv := range d.env {
			if n, v, _ := strings.Cut(kv, "="); n == name {
				return v, true
			}
		}
		return "", false
	}
	var names []string
	for _, m := range registry.Load(registry.Options{Dirs: registry.DefaultDirs(lookup, os.Geteuid()), Program: registry.Program}).Modules {
		if m.Skip == "" && m.Name != "softhsm2" {
			names = append(names, m.Name)
		}
	}
	return names
}

// openTerminal makes the terminal that pinentry asks on, or the program that
// stands in for a person where there is none.
func (d *demo) openTerminal(ctx context.Context) bool {
	if d.programs["tmux"] == "" || d.programs["pinentry-curses"] == "" {
		d.say("\ntmux or pinentry-curses is not installed (\"make deps-demo\" does that): no prompt is shown,\nand an SSH_ASKPASS program gives the PIN.")
		return d.write("askpass", "#!/bin/sh\necho "+demoPIN+"\n", 0o700)
	}
	d.terminal = true
	if !d.run(ctx, step{argv: d.tmux("new-session", "-d", "-x", "80", "-y", "24", "sleep 3600")}) {
		return false
	}
	out, err := d.command(ctx, d.tmux("display-message", "-p", "#{pane_tty}")).Output()
	d.tty = strings.TrimSpace(string(out))
	if err != nil || d.tty == "" {
		return d.result(fmt.Errorf("ask tmux for its terminal: %w", cmp.Or(err, errors.New("it has none"))))
	}
	return true
}

func (d *demo) tmux(args ...string) []string {
	return append([]string{"tmux", "-S", "tmux.sock", "-f", "/dev/null"}, args...)
}

// background starts a program that stays, with additions to its environment, and
// waits until ready says that it is.
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
	// Not with ctx, which would kill it: stopAll ends it in its own way.
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
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(p.ended)
	}()
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return d.result(nil)
		}
		select {
		case <-p.ended:
			return d.result(fmt.Errorf("it has ended: %v", cmd.ProcessState))
		case <-ctx.Done():
			if ctx.Err() == context.Canceled {
				return false
			}
			return d.result(fmt.Errorf("it does not get ready: %w", err))
		case <-time.After(demoPoll):
		}
	}
}

// stopAll ends what runs in the background, the last first.
func (d *demo) stopAll() {
	for len(d.running) > 0 {
		p := d.running[len(d.running)-1]
		d.running = d.running[:len(d.running)-1]
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		late := time.AfterFunc(demoGrace, func() { _ = p.cmd.Process.Kill() })
		<-p.ended
		late.Stop()
	}
	if d.terminal {
		_ = d.command(context.Background(), d.tmux("kill-server")).Run() // as above
	}
}

// startServer starts an sshd that knows both keys and runs nothing but echo.
func (d *demo) startServer(ctx context.Context) bool {
	d.heading("An sshd that lets both keys in.")
	port, err := freePort()
	if err != nil {
		return d.result(err)
	}
	for _, key := range []string{"rsa", "p256"} {
		if !d.run(ctx, step{argv: []string{"p11-agent", "list", "--public", demoURI + ";object=" + key}, to: key + ".pub"}) {
			return false
		}
	}
	if os.Geteuid() == 0 {
		// Debian's sshd does not start without it, and it is the start of its
		// service that makes it. Others may use it by now, so it stays.
		if _, err := os.Stat("/run/sshd"); err != nil && !d.run(ctx, step{argv: []string{"mkdir", "-p", "/run/sshd"}}) {
			return false
		}
	}
	pam := "no"
	if rootLocked() {
		pam = "yes" // without it, sshd lets nobody in whose password is locked
	}
	ok := d.run(ctx, step{argv: []string{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", "host_key"}}) &&
		d.run(ctx, step{argv: []string{"cat", "rsa.pub", "p256.pub"}, to: "authorized_keys"}) &&
		d.write("sshd_config", fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s
AuthenticationMethods publickey
AllowUsers %s
PermitRootLogin prohibit-password
# The directory is in /tmp, which everybody may write to.
StrictModes no
UsePAM %s
PidFile none
LogLevel VERBOSE
SetEnv HOME=%s
ForceCommand echo "logged in"
`, port, d.path("host_key"), d.path("authorized_keys"), d.user, pam, d.path("home")), 0o600)
	if !ok {
		return false
	}
	host, err := os.ReadFile(d.path("host_key.pub"))
	if err != nil {
		return d.result(err)
	}
	// The agent reads the file of its HOME, as it does anywhere: its prompts name the host.
	known := filepath.Join("home", ".ssh", "known_hosts")
	ok = d.write(known, fmt.Sprintf("demo %s\n", bytes.TrimSpace(host)), 0o600) &&
		d.write("ssh_config", fmt.Sprintf(`Host demo
    HostName 127.0.0.1
    HostKeyAlias demo
    Port %d
    User %s
    IdentityAgent %s
    IdentitiesOnly yes
    UserKnownHostsFile %s
    StrictHostKeyChecking yes
    BatchMode yes
`, port, d.user, d.path("agent.sock"), d.path(known)), 0o600)
	return ok && d.background(ctx, nil, []string{d.programs["sshd"], "-D", "-e", "-f", d.path("sshd_config")}, "sshd.log",
		func(ctx context.Context) error { return dial(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port)) })
}

// dial tells whether somebody listens.
func dial(ctx context.Context, network, address string) error {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	return c.Close()
}

// freePort returns a port that nobody listens on, at this moment.
func freePort() (int, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	port := l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // that of a TCP listener
	return port, l.Close()
}

// rootLocked tells whether this is root and its password is locked in the way
// that sshd looks for. Another user's sshd cannot see that.
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

// makeRepository makes a git repository in which commits are signed by ssh keys.
func (d *demo) makeRepository(ctx context.Context) bool {
	d.heading("A git repository.")
	var signers strings.Builder
	for _, key := range []string{"rsa.pub", "p256.pub"} {
		b, err := os.ReadFile(d.path(key))
		if err != nil {
			return d.result(err)
		}
		fmt.Fprintf(&signers, "%s %s", demoEmail, b)
	}
	git := func(args ...string) bool {
		return d.run(ctx, step{argv: append([]string{"git", "-C", "repo"}, args...)})
	}
	return d.write("allowed_signers", signers.String(), 0o600) &&
		d.run(ctx, step{argv: []string{"git", "init", "-q", "repo"}}) &&
		git("config", "user.name", "Demo") && git("config", "user.email", demoEmail) &&
		git("config", "gpg.format", "ssh") &&
		git("config", "gpg.ssh.allowedSignersFile", d.path("allowed_signers"))
}

// asked shows the uses of keys when a person gives the PIN. Without the first
// login all others would ask again, and nobody would answer.
func (d *demo) asked(ctx context.Context) bool {
	d.heading("ssh: the first use of a key asks for the PIN, the second does not.")
	first := d.login("rsa")
	if d.tty != "" {
		first.meanwhile = d.typePIN
	}
	if !d.run(ctx, first) {
		return false
	}
	d.run(ctx, d.login("p256"))

	d.heading("git: a commit signed by each key.")
	for _, key := range []string{"rsa", "p256"} {
		d.commit(ctx, key)
	}
	return ctx.Err() == nil
}

func (d *demo) login(key string) step {
	return step{argv: []string{"ssh", "-T", "-F", "ssh_config", "-i", key + ".pub", "demo"}, show: true}
}

func (d *demo) commit(ctx context.Context, key string) {
	if d.run(ctx, step{argv: []string{
		"git", "-C", "repo", "-c", "user.signingKey=" + d.path(key+".pub"), "commit", "-q", "--allow-empty", "-S", "-m", "signed by " + key,
	}}) {
		d.run(ctx, step{argv: []string{"git", "-C", "repo", "verify-commit", "HEAD"}, show: true})
	}
}

// typePIN does what a person does: it waits for the prompt, and types the PIN.
func (d *demo) typePIN(ctx context.Context) error {
	for {
		screen, err := d.command(ctx, d.tmux("capture-pane", "-p")).Output()
		if ctx.Err() != nil {
			return errors.New("it did not ask for the PIN")
		}
		if err != nil {
			return fmt.Errorf("look at the terminal: %w", err)
		}
		if strings.Contains(string(screen), "PIN:") {
			d.say("The terminal shows:")
			d.indent(strings.TrimSpace(string(screen)))
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(demoPoll):
		}
	}
	// The command may end before tmux has said that it sent the last key.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), demoGrace)
	defer cancel()
	for _, keys := range [][]string{{"-l", demoPIN}, {"Enter"}} {
		argv := d.tmux(append([]string{"send-keys"}, keys...)...)
		d.say("$ %s", output.CommandLine(argv))
		if err := d.command(ctx, argv).Run(); err != nil {
			return fmt.Errorf("type the PIN: %w", err)
		}
	}
	return nil
}

// constrained shows how keys are taken away and added.
func (d *demo) constrained(ctx context.Context) bool {
	d.heading("ssh-add: keys are named by their URIs. (What it calls passphrase is the PIN; none is given here.)")
	key := demoURI + ";object=rsa"
	d.run(ctx, step{argv: []string{"ssh-add", "-e", key}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-t", "1h", "-s", key}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, show: true})
	return ctx.Err() == nil
}

// fromFile shows the uses of keys when the PIN is in a file.
func (d *demo) fromFile(ctx context.Context) bool {
	d.heading("Without a person: everything is forgotten, and the PIN comes from a file.")
	d.run(ctx, step{argv: []string{"ssh-add", "-D"}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, status: 1, show: true})
	if !d.write("pin", demoPIN+"\n", 0o600) ||
		!d.run(ctx, step{argv: []string{"ssh-add", "-t", "1h", "-s", demoURI + "?pin-source=file:" + d.path("pin")}, show: true}) {
		return false
	}
	for _, key := range []string{"rsa", "p256"} {
		d.run(ctx, d.login(key))
		d.commit(ctx, key)
	}
	return ctx.Err() == nil
}

// showLogs prints the ends of the logs.
func (d *demo) showLogs() {
	for _, name := range []string{"agent.log", "sshd.log"} {
		b, err := os.ReadFile(d.path(name))
		if err != nil {
			continue // it was not started
		}
		d.say("\nThe end of %s:", name)
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		d.indent(strings.Join(lines[max(0, len(lines)-20):], "\n"))
	}
}

// explainKept says how the directory is used by hand.
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
The directory stays, and nothing runs any more. To go on by hand, in a shell that
you do not need for anything else (the PIN is %s):

    . %s
    p11-agent list
    p11-agent agent -D -a "$SSH_AUTH_SOCK" 2>agent.log &
    ssh-add -l
    %s -D -E sshd.log -f sshd_config &
    ssh -T -F ssh_config -i p256.pub demo
    kill %%1 %%2

When it is of no more use:

    rm -r %s`, demoPIN, output.ShellWord(d.path("env.sh")), d.programs["sshd"], output.ShellWord(d.dir))
}
