// Package install writes the units with which systemd starts the agent, and removes them.
//
// It promises to replace and remove only files with Marker as their first line.
// Options.Force lets Install replace other files, too. Install replaces a file as a whole or
// not at all. Package systemd has the texts of the units. The command has the flags and the
// places of the user's files.
package install

import (
	"bytes"
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

	"github.com/google/renameio/v2"

	"p11-agent/systemd"
)

// Marker is the first line of every file that install writes. By this line it
// recognizes them.
const Marker = `# Written by "p11-agent install", which "p11-agent uninstall" undoes. Without this line the file is yours.` + "\n"

// The names of the units of a user's agent.
const (
	SocketUnit  = "p11-agent.socket"
	ServiceUnit = "p11-agent.service"
)

// sshConfig is where the piece of ssh_config(5) goes, in the directory of the user's
// configuration.
const sshConfig = "p11-agent/ssh_config"

// systemName matches the names that an agent of the system can have. systemd writes such a
// name as it is, and such a name is not a path.
var systemName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.]{0,63}$`)

// ValidName tells whether an agent of the system can have this name.
func ValidName(name string) bool { return systemName.MatchString(name) }

// A file is one file of an installation.
type file struct {
	path string
	text []byte      // with the marker
	mode fs.FileMode // of directories that are made for the file
}

// A source is where a file of an installation goes, and its name in package systemd.
type source struct{ path, from string }

// A Target is the agent that systemd is to start, and where its files go.
type Target struct {
	// System is the name of an agent of the system; empty: the agent of this user.
	System string
	// ConfigHome is the directory of the user's configuration, an absolute path. An
	// agent of the system does not need it.
	ConfigHome string
	// Socket is the path of the socket of the user's agent. Empty: systemd does not know
	// this session.
	Socket string
	// Answers tells whether an agent answers at a socket.
	Answers func(ctx context.Context, socket string) bool
}

// An Installation is the set of files that belong to one agent. Only one goroutine may
// use it.
type Installation struct {
	target  Target
	ctl     func(args ...string) error
	program string

	unit    string // to be enabled
	units   []file
	others  []file
	foreign []string // units of a package or of the administrator, which are used in place of units

	out io.Writer
}

// New finds the files of an agent. It changes nothing. The methods of the Installation
// report on out; systemctl writes its messages to stderr.
func New(ctx context.Context, target Target, out, stderr io.Writer) (*Installation, error) {
	program, err := os.Executable()
	if err == nil {
		program, err = filepath.EvalSymlinks(program)
	}
	if err != nil {
		return nil, fmt.Errorf("find this program's own file: %w", err)
	}
	in := &Installation{target: target, program: program, out: out}
	in.ctl = func(args ...string) error {
		if target.System == "" {
			args = append([]string{"--user"}, args...)
		}
		return systemctl(ctx, stderr, args...)
	}
	if target.System == "" {
		return in, in.forUser()
	}
	return in, in.forSystem()
}

// forUser adds the files of the agent of this user.
func (in *Installation) forUser() error {
	config := in.target.ConfigHome
	if !filepath.IsAbs(config) {
		return errors.New("cannot find the directory of your configuration: set HOME")
	}
	in.unit = SocketUnit
	return in.add(filepath.Join(config, "systemd", "user"), "user", []string{systemd.UserSocket, systemd.UserService},
		[]source{
			{filepath.Join(config, "environment.d", "50-p11-agent.conf"), systemd.Environment},
			{filepath.Join(config, sshConfig), systemd.SSHConfig},
		}, 0o700)
}

// forSystem adds the files of an agent of the system.
func (in *Installation) forSystem() error {
	if os.Geteuid() != 0 {
		return errors.New("only root can use --system: it changes /etc/systemd/system")
	}
	for _, dir := range []string{"/home/", "/root/", "/run/", "/tmp/", "/var/tmp/"} {
		if strings.HasPrefix(in.program, dir) {
			return fmt.Errorf("systemd cannot start the agent of the system from %s, because the unit hides that directory: install the program first (make install)", in.program)
		}
	}
	in.unit = "p11-agent@" + in.target.System + ".socket"
	sysusers := []source{{"/etc/sysusers.d/p11-agent.conf", systemd.Sysusers}}
	if slices.ContainsFunc([]string{"/usr/lib/sysusers.d", "/usr/local/lib/sysusers.d"}, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "p11-agent.conf"))
		return err == nil
	}) {
		sysusers = nil
	}
	return in.add("/etc/systemd/system", "system", []string{systemd.SystemSocket, systemd.SystemService}, sysusers, 0o755)
}

// add adds the units, which go to dir, and the other files. It also looks for units that
// a package or the administrator has put elsewhere.
func (in *Installation) add(dir, manager string, units []string, others []source, mode fs.FileMode) error {
	read := func(path, from string) (file, error) {
		text, err := systemd.Shipped(from, in.program)
		if err != nil {
			return file{}, fmt.Errorf("have systemd start this program: %w", err)
		}
		return file{path: path, text: append([]byte(Marker), text...), mode: mode}, nil
	}
	for _, from := range units {
		f, err := read(filepath.Join(dir, filepath.Base(from)), from)
		if err != nil {
			return err
		}
		in.units = append(in.units, f)
	}
	for _, o := range others {
		f, err := read(o.path, o.from)
		if err != nil {
			return err
		}
		in.others = append(in.others, f)
	}
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

// files returns the files to write.
func (in *Installation) files() []file {
	if len(in.foreign) > 0 {
		return in.others
	}
	return slices.Concat(in.units, in.others)
}

// Print shows the files that Install would write.
func (in *Installation) Print() {
	for _, f := range in.files() {
		fmt.Fprintf(in.out, "# %s\n%s\n", f.path, f.text)
	}
	in.sayForeign()
}

// Options are what Install does beside writing files that are missing or its own.
type Options struct {
	Start bool // has systemd read, enable and start the units
	Force bool // replaces files that install has not written, too
}

// Install writes the files. Then it has systemd start the agent, or prints how to do
// that. When Install may not replace one of the files, or cannot start the agent as
// asked, it writes nothing.
func (in *Installation) Install(ctx context.Context, o Options) error {
	if o.Start {
		if err := in.mayStart(ctx); err != nil {
			return err
		}
	}
	changed, err := in.write(in.files(), o.Force)
	if err != nil {
		return err
	}
	in.sayForeign()
	if len(in.foreign) > 0 {
		// Units of an earlier installation would hide the foreign ones.
		for _, f := range in.units {
			if ours, err := isOurs(f.path); err == nil && ours {
				if err := os.Remove(f.path); err != nil {
					return err
				}
				changed = true
				fmt.Fprintf(in.out, "removed %s, which an earlier install has written\n", f.path)
			}
		}
	}
	if in.target.System != "" {
		return in.finishSystem(o.Start, changed)
	}
	return in.finishUser(o.Start, changed)
}

// sayForeign names the units that systemd uses in place of the units of this package.
func (in *Installation) sayForeign() {
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
			fmt.Fprintf(in.out, "note: these units start %s, and this program is %s\n", m[1], in.program)
		}
	}
}

// mayStart returns an error when the agent cannot be started now.
func (in *Installation) mayStart(ctx context.Context) error {
	if name := in.target.System; name != "" {
		for _, file := range []string{"/etc/p11-agent/" + name + ".toml", "/etc/p11-agent/" + name + ".pin"} {
			if _, err := os.Stat(file); err != nil {
				return fmt.Errorf("%w: the agent needs this file: see HOST KEYS in p11-agent(1), or leave --now out to write the units only", err)
			}
		}
		return nil
	}
	if in.target.Socket == "" {
		return errors.New("XDG_RUNTIME_DIR is not set, so systemd does not know this session: log in without su or sudo, or leave --now out")
	}
	if in.ctl("is-active", "--quiet", SocketUnit) == nil {
		return nil // systemd has started the agent that answers
	}
	// systemd would take the socket away from an agent that listens there.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if in.target.Answers(ctx, in.target.Socket) {
		return fmt.Errorf("an agent that systemd has not started answers at %s: end it first (p11-agent agent -k)", in.target.Socket)
	}
	return nil
}

// write writes all files, or none when it may not replace one of them.
func (in *Installation) write(files []file, force bool) (changed bool, err error) {
	for _, f := range files {
		switch ours, err := isOurs(f.path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return false, err
		case !ours && !force:
			return false, fmt.Errorf("%s exists, and install has not written it: move the file away, or replace it with --force", f.path)
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

// isOurs tells whether install has written a file. It has not written a link.
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
	first := make([]byte, len(Marker))
	if _, err := io.ReadFull(f, first); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	return string(first) == Marker, nil
}

// write replaces the file as a whole or not at all.
func (f file) write() error {
	dir := filepath.Dir(f.path)
	if err := os.MkdirAll(dir, f.mode); err != nil {
		return err
	}
	text, err := renameio.NewPendingFile(f.path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o644))
	if err != nil {
		return err
	}
	_, err = text.Write(f.text)
	if err == nil {
		err = text.CloseAtomicallyReplace()
	}
	if err = errors.Join(err, text.Cleanup()); err != nil {
		return fmt.Errorf("write %s: %w", f.path, err)
	}
	return nil
}

// finishUser starts the agent, or prints how to do that. Then it prints how ssh finds
// the agent.
func (in *Installation) finishUser(start, changed bool) error {
	if start {
		if err := in.start(changed, ServiceUnit); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(in.out, "\nTo have systemd use these files, run:\n\n    systemctl --user daemon-reload\n    systemctl --user enable --now %s\n", in.unit)
	}
	fmt.Fprintf(in.out, `
From your next login on, SSH_AUTH_SOCK names the agent in programs that systemd starts for you,
such as a desktop. For shells of the console and of ssh, add this line to ~/.profile:

    export SSH_AUTH_SOCK="$XDG_RUNTIME_DIR/p11-agent/agent.sock"

To have ssh ask this agent even where SSH_AUTH_SOCK names another one, put this line at the top of
~/.ssh/config:

    %s
`, Include(filepath.Join(in.target.ConfigHome, sshConfig)))
	if others := OtherAgents(in.target.ConfigHome); len(others) > 0 {
		all := strings.Join(others, " ")
		fmt.Fprintf(in.out, "\nnote: systemd starts these agents, too, and they may set SSH_AUTH_SOCK: %s. To switch them off:\n\n    systemctl --user mask --now %s\n", all, all)
	}
	return nil
}

// finishSystem starts the agent, or prints how to do that.
func (in *Installation) finishSystem(start, changed bool) error {
	if start {
		if err := run(in.out, "systemd-sysusers"); err != nil {
			return err
		}
		return in.start(changed, strings.TrimSuffix(in.unit, "socket")+"service")
	}
	fmt.Fprintf(in.out, `
The agent reads its configuration from /etc/p11-agent/%[1]s.toml, and the PIN from
/etc/p11-agent/%[1]s.pin. Make sure that only root can read the PIN. HOST KEYS in p11-agent(1) has
an example. Then run:

    systemd-sysusers
    systemctl daemon-reload
    systemctl enable --now %[2]s
`, in.target.System, in.unit)
	return nil
}

// start has systemd read, enable and start the units. When files have changed, it first
// restarts a service that runs. So an upgraded agent runs even when systemd cannot enable
// the units, and the units are enabled even when the agent does not restart.
func (in *Installation) start(changed bool, service string) error {
	if err := in.ctl("daemon-reload"); err != nil {
		return err
	}
	var restarted error
	if changed {
		restarted = in.ctl("try-restart", service)
	}
	if err := errors.Join(restarted, in.ctl("enable", "--now", in.unit)); err != nil {
		return err
	}
	fmt.Fprintf(in.out, "%s is enabled and listens\n", in.unit)
	return nil
}

// Remove stops and disables the agent, and removes the files that Install has written.
func (in *Installation) Remove() error {
	// Without systemd, or when systemd does not know the unit, nothing runs. The code
	// below then removes the link that enables the unit.
	stopped := in.ctl("disable", "--now", in.unit) == nil
	files := append(slices.Clone(in.units), in.others...)
	if in.target.System != "" {
		// Other agents may need the template and its user.
		links, err := filepath.Glob("/etc/systemd/system/sockets.target.wants/p11-agent@*.socket")
		if err != nil {
			return err
		}
		links = slices.DeleteFunc(links, func(link string) bool { return filepath.Base(link) == in.unit })
		if len(links) > 0 {
			fmt.Fprintf(in.out, "kept the units: %s uses them\n", filepath.Base(links[0]))
			files = nil
		}
	}
	if !stopped {
		link := filepath.Join(filepath.Dir(in.units[0].path), "sockets.target.wants", in.unit)
		if to, err := os.Readlink(link); err == nil && filepath.Base(to) == filepath.Base(in.units[0].path) {
			if err := os.Remove(link); err != nil {
				return err
			}
			fmt.Fprintf(in.out, "removed %s\n", link)
		}
	}
	var kept []error
	for _, f := range files {
		switch ours, err := isOurs(f.path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			kept = append(kept, err)
		case !ours:
			fmt.Fprintf(in.out, "kept %s: install has not written it\n", f.path)
		default:
			if err := os.Remove(f.path); err != nil {
				kept = append(kept, err)
				continue
			}
			fmt.Fprintf(in.out, "removed %s\n", f.path)
		}
	}
	if stopped {
		if err := in.ctl("daemon-reload"); err != nil {
			kept = append(kept, err)
		}
	}
	return errors.Join(kept...)
}

// systemctl runs systemctl.
func systemctl(ctx context.Context, stderr io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	cmd.Stderr = stderr
	// Ctrl-C interrupts this program, and does not interrupt systemctl half-way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("systemctl %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// run runs a program of systemd.
func run(out io.Writer, name string) error {
	cmd := exec.Command(name)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// OtherAgents returns the units of other agents that are enabled for this user.
// configHome is the directory of the user's configuration.
func OtherAgents(configHome string) (found []string) {
	own := filepath.Join(configHome, "systemd", "user")
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

// Include returns the line that has ssh_config(5) include a file.
func Include(file string) string {
	if home := os.Getenv("HOME"); home != "" {
		if rest, ok := strings.CutPrefix(file, filepath.Clean(home)+"/"); ok {
			file = "~/" + rest
		}
	}
	if strings.ContainsAny(file, " \t") {
		file = `"` + file + `"`
	}
	return "Include " + file
}
