package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/agent/sshagent"
	"p11-agent/systemd"
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
	f.StringVar(&o.system, "system", "", what+" those of an agent for the system, which serves /etc/p11-agent/`NAME`.toml")
}

func newInstallCommand(g *globals) *cobra.Command {
	o := new(installOptions)
	cmd := &cobra.Command{
		Use:   "install --user|--system NAME",
		Short: "Have systemd start the agent",
		Long: `Write the units with which systemd starts this program as the agent, when the
first client connects, and a setting of SSH_AUTH_SOCK and a piece of ssh_config
that lead to it. Then say what to type, or do it with --now. Nothing else is
changed: files that were not written by this command are left alone, and so is
~/.ssh/config.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runInstall(cmd.Context(), g, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.addFlags(cmd, "write")
	f := cmd.Flags()
	f.BoolVar(&o.now, "now", false, "have systemd read, enable and start them, too")
	f.BoolVar(&o.print, "print", false, "only show what would be written")
	f.BoolVar(&o.force, "force", false, "replace files that this command has not written, too")
	return cmd
}

func newUninstallCommand(g *globals) *cobra.Command {
	o := new(installOptions)
	cmd := &cobra.Command{
		Use:   "uninstall --user|--system NAME",
		Short: "Take back what install has done",
		Long: `Stop and disable the agent, and remove the files that install has written, and no
others. The configuration of the agent stays.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runUninstall(cmd.Context(), g, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.addFlags(cmd, "remove")
	return cmd
}

// installMarker is the first line of every file that install writes, by which it
// knows them again.
const installMarker = `# Written by "p11-agent install", which "p11-agent uninstall" undoes. Without this line the file is yours.` + "\n"

// The names of the units.
const (
	socketUnit  = "p11-agent.socket"
	serviceUnit = "p11-agent.service"
)

// instanceName is what the agents of a system may be called: nothing that systemd
// would write in another way, and no path.
var instanceName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.]{0,63}$`)

// installed is one file of an installation.
type installed struct {
	path string
	from string // for systemd.Shipped
	text []byte // with the marker
	mode fs.FileMode
}

// An installation is what belongs to the agent of a user or of the system.
type installation struct {
	out     io.Writer
	ctl     func(args ...string) error // systemctl of the right manager
	unit    string                     // to be enabled
	units   []installed
	others  []installed
	foreign []string // units that are there already, where systemd finds them after those of units
	program string
}

// newInstallation finds out what there is to do.
func newInstallation(ctx context.Context, g *globals, o *installOptions, out, stderr io.Writer) (*installation, error) {
	switch {
	case g.config != "":
		return nil, &usageError{errors.New("--config means nothing here: to have the agent use another file, give it to the agent in a drop-in of its unit")}
	case o.user == (o.system != ""):
		return nil, &usageError{errors.New("say which agent: --user for yours, --system NAME for one that serves the system, such as sshd's host keys")}
	case o.system != "" && !instanceName.MatchString(o.system):
		return nil, &usageError{fmt.Errorf("%q is no name for an agent: letters, digits, dots and underscores make one", o.system)}
	}
	program, err := os.Executable()
	if err == nil {
		program, err = filepath.EvalSymlinks(program)
	}
	if err != nil {
		return nil, fmt.Errorf("find out where this program is: %w", err)
	}
	in := &installation{out: out, program: program}
	in.ctl = func(args ...string) error {
		if o.user {
			args = append([]string{"--user"}, args...)
		}
		return systemctl(ctx, stderr, args...)
	}
	if o.user {
		return in, in.forUser()
	}
	return in, in.forSystem(o.system)
}

// forUser fills in what belongs to the agent of this user.
func (in *installation) forUser() error {
	config := filepath.Dir(filepath.Dir(defaultConfig()))
	if !filepath.IsAbs(config) {
		return errors.New("neither XDG_CONFIG_HOME nor HOME says where your configuration is")
	}
	in.unit = socketUnit
	return in.add(filepath.Join(config, "systemd", "user"), "user", []string{systemd.UserSocket, systemd.UserService},
		map[string]string{
			filepath.Join(config, "environment.d", "50-p11-agent.conf"): systemd.Environment,
			filepath.Join(config, "p11-agent", "ssh_config"):            systemd.SSHConfig,
		}, 0o700)
}

// forSystem fills in what belongs to the agent of this name.
func (in *installation) forSystem(name string) error {
	if os.Geteuid() != 0 {
		return errors.New("only root can do that: --system changes /etc/systemd/system")
	}
	for _, dir := range []string{"/home/", "/root/", "/run/", "/tmp/", "/var/tmp/"} {
		if strings.HasPrefix(in.program, dir) {
			return fmt.Errorf("the agent of the system cannot be started from %s, as its unit hides that: install the program first (make install)", in.program)
		}
	}
	in.unit = "p11-agent@" + name + ".socket"
	sysusers := map[string]string{"/etc/sysusers.d/p11-agent.conf": systemd.Sysusers}
	if slices.ContainsFunc([]string{"/usr/lib/sysusers.d", "/usr/local/lib/sysusers.d"}, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "p11-agent.conf"))
		return err == nil
	}) {
		sysusers = nil
	}
	return in.add("/etc/systemd/system", "system", []string{systemd.SystemSocket, systemd.SystemService}, sysusers, 0o755)
}

// add fills in the units, which go to dir, and the other files.
func (in *installation) add(dir, manager string, units []string, others map[string]string, mode fs.FileMode) error {
	file := func(path, from string) (installed, error) {
		text, err := systemd.Shipped(from, in.program)
		if err != nil {
			return installed{}, fmt.Errorf("have systemd start this program: %w", err)
		}
		return installed{path: path, from: from, text: append([]byte(installMarker), text...), mode: mode}, nil
	}
	for _, from := range units {
		f, err := file(filepath.Join(dir, filepath.Base(from)), from)
		if err != nil {
			return err
		}
		in.units = append(in.units, f)
	}
	for path, from := range others {
		f, err := file(path, from)
		if err != nil {
			return err
		}
		in.others = append(in.others, f)
	}
	slices.SortFunc(in.others, func(a, b installed) int { return cmp.Compare(a.path, b.path) })
	for _, prefix := range []string{"/etc", "/run", "/usr/local/lib", "/usr/lib"} {
		other := filepath.Join(prefix, "systemd", manager)
		if other == dir {
			continue
		}
		var found []string
		for _, f := range in.units {
			path := filepath.Join(other, filepath.Base(f.path))
			if _, err := os.Stat(path); err == nil {
				found = append(found, path)
			}
		}
		if len(found) == len(in.units) {
			in.foreign = found
			break
		}
	}
	return nil
}

func runInstall(ctx context.Context, g *globals, o *installOptions, out, stderr io.Writer) error {
	in, err := newInstallation(ctx, g, o, out, stderr)
	if err != nil {
		return err
	}
	files := slices.Clone(in.others)
	if len(in.foreign) == 0 {
		files = append(slices.Clone(in.units), files...)
	}
	if o.print {
		for _, f := range files {
			fmt.Fprintf(out, "# %s\n%s\n", f.path, f.text)
		}
		in.sayForeign()
		return nil
	}
	if o.now {
		if err := in.mayStart(ctx, o); err != nil {
			return err
		}
	}
	changed, err := in.write(files, o.force)
	if err != nil {
		return err
	}
	in.sayForeign()
	if len(in.foreign) > 0 {
		// Those of an earlier installation would hide the others.
		for _, f := range in.units {
			if ours, err := isOurs(f.path); err == nil && ours {
				if err := os.Remove(f.path); err != nil {
					return err
				}
				changed = true
				fmt.Fprintf(out, "removed %s, which was written before\n", f.path)
			}
		}
	}
	if o.system != "" {
		return in.finishSystem(o, changed)
	}
	return in.finishUser(o, changed)
}

// sayForeign names the units that are used in place of ones of our own.
func (in *installation) sayForeign() {
	if len(in.foreign) == 0 {
		return
	}
	fmt.Fprintf(in.out, "the units are there already: %s\n", strings.Join(in.foreign, ", "))
	for _, path := range in.foreign {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if m := regexp.MustCompile(`(?m)^ExecStart=(\S+)`).FindSubmatch(text); m != nil && string(m[1]) != in.program {
			fmt.Fprintf(in.out, "note: they start %s, and this program is %s\n", m[1], in.program)
		}
	}
}

// mayStart tells why the agent should not be started now.
func (in *installation) mayStart(ctx context.Context, o *installOptions) error {
	if o.system != "" {
		for _, file := range []string{"/etc/p11-agent/" + o.system + ".toml", "/etc/p11-agent/" + o.system + ".pin"} {
			if _, err := os.Stat(file); err != nil {
				return fmt.Errorf("%w: the agent needs it, see HOST KEYS in p11-agent(1); without --now the units can be written before it is there", err)
			}
		}
		return nil
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		return errors.New("XDG_RUNTIME_DIR is not set, so this is no session that systemd knows of: log in anew (not by su or sudo), or leave --now out")
	}
	if in.ctl("is-active", "--quiet", socketUnit) == nil {
		return nil // it is what answers
	}
	// systemd would take the socket from under another agent without asking.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	path := filepath.Join(dir, "p11-agent", "agent.sock")
	if sshagent.Ping(ctx, path) == nil {
		return fmt.Errorf("an agent that systemd has not started answers at %s: end it first (p11-agent agent -k)", path)
	}
	return nil
}

// write writes the files, all or, where one may not be replaced, none.
func (in *installation) write(files []installed, force bool) (changed bool, err error) {
	for _, f := range files {
		switch ours, err := isOurs(f.path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return false, err
		case !ours && !force:
			return false, fmt.Errorf("%s is there and was not written by this command: move it away, or replace it with --force", f.path)
		}
	}
	for _, f := range files {
		was, err := os.ReadFile(f.path)
		if ours, _ := isOurs(f.path); err == nil && ours && bytes.Equal(was, f.text) {
			fmt.Fprintf(in.out, "unchanged: %s\n", f.path)
			continue
		}
		if err := f.write(); err != nil {
			return changed, err
		}
		changed = true
		fmt.Fprintf(in.out, "wrote %s\n", f.path)
	}
	return changed, nil
}

// isOurs tells whether install has written a file. A link is none, wherever it
// leads.
func isOurs(path string) (bool, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return false, err
	}
	if !st.Mode().IsRegular() {
		return false, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	first := make([]byte, len(installMarker))
	if _, err := io.ReadFull(f, first); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	return string(first) == installMarker, nil
}

// write replaces the file as a whole or not at all.
func (f installed) write() (err error) {
	dir := filepath.Dir(f.path)
	if err := os.MkdirAll(dir, f.mode); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".p11-agent-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(f.text)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", f.path, err)
	}
	return os.Rename(tmp.Name(), f.path)
}

// finishUser starts the agent, or says how, and how ssh finds it.
func (in *installation) finishUser(o *installOptions, changed bool) error {
	if o.now {
		if err := in.start(changed, serviceUnit); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(in.out, "\nTo have systemd use them:\n\n    systemctl --user daemon-reload\n    systemctl --user enable --now %s\n", in.unit)
	}
	fmt.Fprintf(in.out, `
From the next login on, SSH_AUTH_SOCK leads to the agent in what systemd starts for you, as
desktops do. For shells of the console and of ssh this line belongs into ~/.profile:

    export SSH_AUTH_SOCK="$XDG_RUNTIME_DIR/p11-agent/agent.sock"

Whatever that variable says, this line at the top of ~/.ssh/config makes ssh ask this agent:

    Include %s
`, homeRelative(in.others[len(in.others)-1].path))
	if others := rivalUnits(filepath.Dir(in.units[0].path)); len(others) > 0 {
		all := strings.Join(others, " ")
		fmt.Fprintf(in.out, "\nnote: other agents are enabled, too, and may set SSH_AUTH_SOCK: %s. To switch them off:\n\n    systemctl --user mask --now %s\n", all, all)
	}
	return nil
}

// finishSystem starts the agent, or says how.
func (in *installation) finishSystem(o *installOptions, changed bool) error {
	if o.now {
		if err := run(in.out, "systemd-sysusers"); err != nil {
			return err
		}
		return in.start(changed, strings.TrimSuffix(in.unit, "socket")+"service")
	}
	fmt.Fprintf(in.out, `
The agent reads /etc/p11-agent/%[1]s.toml, and the PIN from /etc/p11-agent/%[1]s.pin, which root
alone should be able to read; HOST KEYS in p11-agent(1) has an example. Then:

    systemd-sysusers
    systemctl daemon-reload
    systemctl enable --now %[2]s
`, o.system, in.unit)
	return nil
}

// start has systemd read, enable and start the units. changed: a service that
// runs is started anew.
func (in *installation) start(changed bool, service string) error {
	if err := in.ctl("daemon-reload"); err != nil {
		return err
	}
	if err := in.ctl("enable", "--now", in.unit); err != nil {
		return err
	}
	if changed {
		if err := in.ctl("try-restart", service); err != nil {
			return err
		}
	}
	fmt.Fprintf(in.out, "%s is enabled and listens\n", in.unit)
	return nil
}

func runUninstall(ctx context.Context, g *globals, o *installOptions, out, stderr io.Writer) error {
	in, err := newInstallation(ctx, g, o, out, stderr)
	if err != nil {
		return err
	}
	// Where systemd is not there, or does not know the unit, nothing has to be
	// stopped; what is left of it is removed below.
	stopped := in.ctl("disable", "--now", in.unit) == nil
	files := append(slices.Clone(in.units), in.others...)
	if o.system != "" {
		// The template, and its user, may serve others.
		links, err := filepath.Glob("/etc/systemd/system/sockets.target.wants/p11-agent@*.socket")
		if err != nil {
			return err
		}
		links = slices.DeleteFunc(links, func(link string) bool { return filepath.Base(link) == in.unit })
		if len(links) > 0 {
			fmt.Fprintf(out, "the units stay, for %s\n", filepath.Base(links[0]))
			files = nil
		}
	}
	if !stopped {
		link := filepath.Join(filepath.Dir(in.units[0].path), "sockets.target.wants", in.unit)
		if to, err := os.Readlink(link); err == nil && filepath.Base(to) == filepath.Base(in.units[0].path) {
			if err := os.Remove(link); err != nil {
				return err
			}
			fmt.Fprintf(out, "removed %s\n", link)
		}
	}
	var kept []error
	for _, f := range files {
		switch ours, err := isOurs(f.path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			kept = append(kept, err)
		case !ours:
			fmt.Fprintf(out, "left %s, which install has not written\n", f.path)
		default:
			if err := os.Remove(f.path); err != nil {
				kept = append(kept, err)
				continue
			}
			fmt.Fprintf(out, "removed %s\n", f.path)
		}
	}
	if stopped {
		if err := in.ctl("daemon-reload"); err != nil {
			kept = append(kept, err)
		}
	}
	return errors.Join(kept...)
}

// systemctl runs systemctl. What it says goes to the person.
func systemctl(ctx context.Context, stderr io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	cmd.Stderr = stderr
	// Ctrl-C is for this program: what systemctl has begun, it ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("systemctl %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// run runs a program of systemd's.
func run(out io.Writer, name string) error {
	cmd := exec.Command(name)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// rivalUnits returns the units of other agents that are enabled for this user. own is
// where the user's own units are.
func rivalUnits(own string) (found []string) {
	dirs := []string{own, "/etc/systemd/user", "/run/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user"}
	for _, unit := range []string{
		"gcr-ssh-agent.socket", "gcr-ssh-agent.service", "gpg-agent-ssh.socket", "ssh-agent.socket", "ssh-agent.service",
		"ssh-tpm-agent.socket", "yubikey-agent.service",
	} {
		if to, err := os.Readlink(filepath.Join(own, unit)); err == nil && to == os.DevNull {
			continue // masked
		}
		if slices.ContainsFunc(dirs, func(dir string) bool {
			links, err := filepath.Glob(filepath.Join(dir, "*.wants", unit))
			return err == nil && len(links) > 0
		}) {
			found = append(found, unit)
		}
	}
	return found
}

// homeRelative writes a path as ssh_config(5) takes it, and people do.
func homeRelative(path string) string {
	if home := os.Getenv("HOME"); home != "" {
		if rest, ok := strings.CutPrefix(path, filepath.Clean(home)+"/"); ok {
			path = "~/" + rest
		}
	}
	if strings.ContainsAny(path, " \t") {
		return `"` + path + `"`
	}
	return path
}
