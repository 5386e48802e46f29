package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"
	"golang.org/x/sys/unix"

	"p11-agent/agent/peer"
	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/pinentry/procstat"
	"p11-agent/systemd/install"
)

// An answering is what is found at the socket of an agent.
type answering struct {
	path string
	err  error // nobody is there, or does not answer
	// name is what the program is called that listens, pid its process; empty and 0
	// where that cannot be found out.
	name string
	pid  int
	own  bool // it is p11-agent
	old  bool // one that was started before this program was installed
	keys []*sshagent.Key
}

// askAgent connects to an agent, sees who it is, and has it list its keys.
func askAgent(ctx context.Context, path string) answering {
	a := answering{path: path, name: byPath(path)}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		a.err = err
		return a
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if a.err = c.SetDeadline(deadline); a.err != nil {
		return a
	}
	if u, ok := c.(*net.UnixConn); ok {
		// Where the service manager listens for it, the path tells.
		if name, pid := listenerOf(peer.Of(u), path); name != "" && name != "systemd" || a.name == "" {
			a.name, a.pid = name, pid
		}
	}
	if a.keys, a.err = sshagent.NewClient(c).List(); a.err != nil && !time.Now().Before(deadline) {
		a.err = os.ErrDeadlineExceeded // of which the client makes a text
	}
	a.own = a.name == program || byPath(path) == program || sameProgram(a.pid) ||
		a.name == "ssh-agent" && slices.ContainsFunc(a.keys, isTokenKey) // under that name
	a.old = a.own && startedBefore(a.pid, "/proc/self/exe")
	return a
}

// program is what this one is called.
const program = "p11-agent"

// includeLine is the line for ~/.ssh/config that leads to the file which install has
// written; empty: it has written none.
func includeLine() string {
	file := filepath.Join(filepath.Dir(paths.ConfigFile()), "ssh_config")
	if _, err := os.Stat(file); err != nil || !filepath.IsAbs(file) {
		return ""
	}
	return install.Include(file)
}

func isTokenKey(k *sshagent.Key) bool { return strings.HasPrefix(k.Comment, "pkcs11:") }

// listenerOf finds the program that listens on a socket: the one that has it open.
// The kernel tells only which process began to listen, and that is another one for
// ssh-agent and gpg-agent, which go on in a child of it; with "ssh-agent bash" it is
// the shell. So it counts only where nobody may look what it has open.
func listenerOf(p peer.Peer, path string) (name string, pid int) {
	inode := listeningInode(path)
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "", 0
	}
	var closed []int // agents that nobody may look into
	manager := 0     // systemd holds it, too, for the one that it starts
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		comm := line(filepath.Join(dir, "comm"))
		files, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			if line(filepath.Join(dir, "cmdline")) == "" {
				continue // it has ended, and its parent does not know yet
			}
			if pid == p.PID {
				return calledAs(pid, comm), pid
			}
			if comm == program || comm == "exe" || slices.ContainsFunc(rivals, func(v rival) bool { return slices.Contains(v.names, comm) }) {
				closed = append(closed, pid)
			}
			continue
		}
		for _, f := range files {
			link, err := os.Readlink(filepath.Join(dir, "fd", f.Name()))
			switch {
			case err != nil || inode == "" || link != "socket:["+inode+"]":
			case comm == "systemd":
				manager = pid
			default:
				return calledAs(pid, comm), pid
			}
		}
	}
	if manager != 0 {
		return "systemd", manager
	}
	for _, pid := range closed {
		if strconv.Itoa(pid) == os.Getenv(paths.PIDVariable) || len(closed) == 1 {
			return calledAs(pid, line(fmt.Sprintf("/proc/%d/comm", pid))), pid
		}
	}
	// ssh-agent and sshd name their sockets so; sshd's can be looked up above.
	if strings.HasPrefix(filepath.Base(path), "agent.") && strings.HasPrefix(filepath.Base(filepath.Dir(path)), "ssh-") {
		return "ssh-agent", 0
	}
	return "", 0
}

// listeningInode returns the inode of the socket that listens at a path, as
// /proc/net/unix has it; empty: it is not there.
func listeningInode(path string) string {
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return ""
	}
	for l := range strings.Lines(string(b)) {
		// Num RefCount Protocol Flags Type St Inode Path
		f := strings.Fields(l)
		if len(f) >= 8 && f[3] == "00010000" && strings.HasSuffix(strings.TrimSuffix(l, "\n"), " "+path) {
			return f[6]
		}
	}
	return ""
}

// calledAs returns the name of a process's program, given the one that it gave
// itself. An older agent of ours in the background is called "exe", as it has run itself
// by /proc/self/exe. A long name is cut.
func calledAs(pid int, name string) string {
	const maxComm = 15 // TASK_COMM_LEN, without the zero
	if file, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil {
		return filepath.Base(strings.TrimSuffix(file, " (deleted)"))
	}
	if name != "" && name != "exe" && len(name) < maxComm {
		return name
	}
	first, _, _ := strings.Cut(line(fmt.Sprintf("/proc/%d/cmdline", pid)), "\x00")
	if first = strings.TrimSpace(first); first == "" {
		return name
	}
	return filepath.Base(first)
}

// sameProgram tells whether a process runs our file, where that can be seen.
func sameProgram(pid int) bool {
	if pid <= 0 {
		return false
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return false
	}
	ours, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(theirs, ours)
}

// startedBefore tells whether a process has begun before a file was installed.
func startedBefore(pid int, file string) bool {
	st, err := os.Stat(file)
	if err != nil {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	started, known := startOf(pid)
	// The time of its last modification is when it was built; that of the last change
	// of its inode is when it came here.
	return ok && known && older(started, time.Unix(sys.Ctim.Unix()))
}

// older tells whether a process is from before an installation. The time of its
// start is known to some seconds only, and the clock may have been set since.
func older(started, installed time.Time) bool { return installed.Sub(started) > time.Minute }

// startOf returns when a process was started.
func startOf(pid int) (time.Time, bool) {
	s, ok := procstat.Of(pid)
	if !ok {
		return time.Time{}, false
	}
	return s.Started()
}

// byPath knows agents by where they listen: of those that systemd starts with the
// first connection, it is systemd that listens.
func byPath(path string) string {
	for _, known := range []struct{ end, name string }{
		{"/gcr/ssh", "gcr-ssh-agent"},
		{"/keyring/ssh", "gnome-keyring-daemon"},
		{"/keyring/.ssh", "gnome-keyring-daemon"},
		{"/gnupg/S.gpg-agent.ssh", "gpg-agent"},
		{"/S.gpg-agent.ssh", "gpg-agent"},
		{"/openssh_agent", "ssh-agent"},
		{"/ssh-agent.socket", "ssh-agent"},
		{"/p11-agent/agent.sock", program},
		{"/.1password/agent.sock", "1password"},
		{"/.bitwarden-ssh-agent.sock", "bitwarden"},
	} {
		if strings.HasSuffix(path, known.end) {
			return known.name
		}
	}
	return ""
}

// A rival is another agent, and what keeps it from taking SSH_AUTH_SOCK.
type rival struct {
	names []string // of its programs
	title string
	steps []string
}

var rivals = []rival{
	{
		[]string{"gcr-ssh-agent"},
		"GNOME's agent (gcr-ssh-agent)",
		[]string{"systemctl --user mask --now gcr-ssh-agent.socket gcr-ssh-agent.service  # then log out and in again"},
	},
	{
		[]string{"gnome-keyring-daemon", "gnome-keyring-d"},
		"GNOME's keyring",
		[]string{"mkdir -p ~/.config/autostart; (cat /etc/xdg/autostart/gnome-keyring-ssh.desktop; echo Hidden=true) >~/.config/autostart/gnome-keyring-ssh.desktop  # then log out and in again"},
	},
	{
		[]string{"gpg-agent"},
		"GnuPG's agent (gpg-agent)",
		[]string{
			"take enable-ssh-support out of ~/.gnupg/gpg-agent.conf, and what sets SSH_AUTH_SOCK out of your shell's startup files",
			"systemctl --user mask --now gpg-agent-ssh.socket",
		},
	},
	{
		[]string{"1password", "op-ssh-agent"},
		"1Password's agent",
		[]string{"in 1Password's settings, Developer, switch off the SSH agent, and take IdentityAgent ~/.1password/agent.sock out of ~/.ssh/config"},
	},
	{[]string{"bitwarden", "bitwarden-app"}, "Bitwarden's agent", []string{"in Bitwarden's settings, switch off the SSH agent"}},
	{[]string{"ssh-agent"}, "OpenSSH's agent (ssh-agent)", nil},
	{[]string{"yubikey-agent", "piv-agent", "ssh-tpm-agent", "tkey-ssh-agent", "pivy-agent"}, "", nil},
}

// title names an agent that is not ours.
func (a answering) title() string {
	if a.forwarded() {
		return "the agent of the machine that you have come from, which sshd forwards"
	}
	for _, v := range rivals {
		if slices.Contains(v.names, a.name) && v.title != "" {
			return v.title
		}
	}
	if a.name != "" {
		return "another agent, " + a.name
	}
	return "another agent"
}

func (a answering) forwarded() bool {
	return a.name == "sshd" || a.name == "sshd-session" || a.name == "dropbear"
}

// who is the title with the process.
func (a answering) who() string {
	if a.pid == 0 {
		return a.title()
	}
	return fmt.Sprintf("%s (process %d)", a.title(), a.pid)
}

// sshSettings are what ssh makes of its configuration for a host that no block is
// about.
type sshSettings struct {
	version         string // as ssh -V has it; empty: there is no ssh
	err             error
	agent, provider string
	only            bool // IdentitiesOnly
	files           []string
}

// anyHost is no host (RFC 2606): what counts for it counts for all.
const anyHost = "any-host.invalid"

func askSSH(ctx context.Context) sshSettings {
	var s sshSettings
	v, err := ask(ctx, "ssh", "-V")
	if err != nil {
		s.err = err
		return s
	}
	s.version = firstLine(cmp.Or(v.err, v.out))
	g, err := ask(ctx, "ssh", "-G", anyHost)
	switch {
	case err != nil:
		s.err = err
	case g.status != nil:
		s.err = fmt.Errorf("ssh does not take its configuration: %s", g.err)
	}
	for l := range strings.Lines(g.out) {
		key, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		switch key {
		case "identityagent":
			s.agent = value
		case "pkcs11provider":
			s.provider = value
		case "identitiesonly":
			s.only = value == "yes"
		case "identityfile":
			s.files = append(s.files, value)
		}
	}
	return s
}

// findAgent looks at the agent that ssh asks, and at SSH_AUTH_SOCK, which ssh-add
// and git's signatures use in any case. It returns the keys that the first lists.
func findAgent(ctx context.Context, r *report, s sshSettings) []*sshagent.Key {
	env := os.Getenv(paths.SocketVariable)
	asked, from := env, paths.SocketVariable
	switch {
	case s.agent == "none":
		r.bad("ssh asks no agent at all: its configuration has IdentityAgent none").
			Next("take that line out of ~/.ssh/config or /etc/ssh/ssh_config, or have this one come before it:\nHost *\n    %s", paths.IdentityAgent(cmp.Or(paths.UserSocket(), env)))
		return nil
	case strings.HasPrefix(s.agent, "$"):
		asked, from = os.Getenv(strings.Trim(s.agent, "${}")), "IdentityAgent "+s.agent
	case s.agent != "" && s.agent != paths.SocketVariable:
		asked, from = paths.ExpandHome(s.agent), "IdentityAgent in ssh's configuration"
	}
	own := paths.UserSocket()
	lead := func(f *finding, a answering) {
		leadToOwn(ctx, f, a, own, asked)
	}
	if asked == "" {
		f := r.bad("%s is not set, so ssh asks no agent", from)
		lead(f, answering{})
		return nil
	}
	a := askAgent(ctx, asked)
	judgeAgent(r.bad, r, a, from, lead)
	if env != asked {
		if env == "" {
			r.warn("ssh finds its agent by %s; ssh-add and git's signatures do not, as SSH_AUTH_SOCK is not set", from).
				Next("export SSH_AUTH_SOCK=%s", output.ShellWord(asked))
		} else if b := askAgent(ctx, env); b.err != nil || !b.own {
			judgeAgent(r.warn, r, b, "SSH_AUTH_SOCK, which ssh-add and git's signatures use", func(f *finding, _ answering) {
				f.Next("export SSH_AUTH_SOCK=%s", output.ShellWord(asked))
			})
		}
	}
	return a.keys
}

// judgeAgent says what is at a socket.
func judgeAgent(add func(string, ...any) *finding, r *report, a answering, from string, lead func(*finding, answering)) {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(a.err, os.ErrNotExist):
		lead(add("%s names %s, and there is no such socket: its agent has ended", from, a.path), a)
	case errors.Is(a.err, unix.ECONNREFUSED), errors.Is(a.err, unix.ENOTSOCK):
		lead(add("%s names %s, and nobody answers there: its agent has ended and left the socket behind", from, a.path), a)
	case errors.Is(a.err, os.ErrPermission):
		lead(add("%s names %s, which you may not use: it belongs to another user (after su or sudo, perhaps)", from, a.path), a)
	case errors.As(a.err, &timeout) && timeout.Timeout():
		lead(add("%s names %s, where %s takes the connection and does not answer: it hangs", from, a.path, a.who()), a)
	case a.err != nil && !a.own:
		lead(add("%s names %s, where %s answers, and not as an agent does (%v)", from, a.path, a.who(), a.err), a)
	case a.err != nil:
		add("%s names %s, and the agent there does not list its keys: %v", from, a.path, a.err).
			Next("%s", strings.TrimSuffix("tail ~/.local/state/p11-agent/agent.log; "+ifBooted("journalctl --user -u p11-agent -n 20"), "; "))
	case a.own && len(a.keys) == 0:
		r.warn("p11-agent answers at %s and lists no key: it is locked, or there is none to be used", a.path).
			Next("ssh-add -X  # unlocks it, if somebody has locked it with ssh-add -x").
			Next("p11-agent list -v  # which keys there are, and why some are left out")
	case a.own && a.old:
		r.warn("p11-agent (process %d) answers at %s and is older than the program that is installed now", a.pid, a.path).
			Next("start it anew: %sp11-agent agent -k and start it as before", ifBooted("systemctl --user restart p11-agent.service, or "))
	case a.own:
		r.ok("p11-agent answers at %s and lists %s", a.path, output.Count(len(a.keys), "key"))
	case slices.ContainsFunc(a.keys, isTokenKey):
		r.ok("%s answers at %s, and has keys of tokens among its %s", a.who(), a.path, output.Count(len(a.keys), "key"))
	default:
		lead(add("ssh does not ask p11-agent but %s: %s names its socket, %s", a.who(), from, a.path), a)
	}
}

// leadToOwn adds how to get from another agent, or none, to ours.
func leadToOwn(ctx context.Context, f *finding, a answering, own, asked string) {
	running := false
	if own != "" && own != asked {
		ours := askAgent(ctx, own)
		running = ours.err == nil && ours.own
	}
	if running {
		lines := "Host *\n    " + paths.IdentityAgent(own)
		if include := includeLine(); include != "" {
			lines = include
		}
		f.Next("p11-agent listens at another place. In ~/.ssh/config, above everything else:\n%s", lines).
			Next("export SSH_AUTH_SOCK=%s  # in this shell, and in its startup file", output.ShellWord(own))
	} else {
		f.Next(`eval "$(p11-agent agent -s)"  # starts it for this shell`)
		if booted() {
			f.Next("%s", installUnits)
		}
		if include := includeLine(); include != "" {
			f.Next("in ~/.ssh/config, above everything else, so that ssh finds the agent whatever SSH_AUTH_SOCK says:\n%s", include)
		} else if own != "" {
			f.Next("in ~/.ssh/config, above everything else, so that ssh finds it whatever SSH_AUTH_SOCK says:\nHost *\n    %s", paths.IdentityAgent(own))
		}
	}
	for _, v := range rivals {
		if slices.Contains(v.names, a.name) {
			for _, step := range v.steps {
				if !strings.HasPrefix(step, "systemctl ") || booted() {
					f.Next("%s", step)
				}
			}
		}
	}
	if a.name == "ssh-agent" {
		if _, err := os.Stat(filepath.Join(os.Getenv("HOME"), ".keychain")); err == nil {
			f.Next("keychain starts it: take the line with keychain out of your shell's startup files")
		}
	}
}

// The versions of OpenSSH that brought what is of use here.
var (
	versionBind   = [2]int{8, 9} // session-bind@openssh.com, which tells of hosts
	versionSign   = [2]int{8, 1} // ssh-keygen -Y
	openSSHNumber = regexp.MustCompile(`OpenSSH_(?:for_Windows_)?([0-9]{1,3})\.([0-9]{1,3})`)
)

func findSSH(r *report, s sshSettings, keys []*sshagent.Key) {
	if s.version == "" {
		if errors.Is(s.err, exec.ErrNotFound) {
			r.warn("there is no ssh here").Next("%s", advice.Install("openssh-client", "openssh-clients"))
		} else {
			r.bad("ssh -V: %v", s.err)
		}
		return
	}
	m := openSSHNumber.FindStringSubmatch(s.version)
	switch {
	case m == nil:
		r.detail("ssh is %s, of which nothing is known here", s.version)
	default:
		major, _ := strconv.Atoi(m[1])
		minor, _ := strconv.Atoi(m[2])
		has := [2]int{major, minor}
		switch {
		case slices.Compare(has[:], versionSign[:]) < 0:
			r.warn("%s is old: it cannot sign git commits with SSH keys (8.1 can), nor tell the agent which host a signature is for (8.9 can)", m[0]).
				Next("upgrade OpenSSH; logins work as they are, keys with destinations (ssh-add -h) do not")
		case slices.Compare(has[:], versionBind[:]) < 0:
			r.warn("%s does not tell the agent which host a signature is for (8.9 does)", m[0]).
				Next("upgrade OpenSSH; logins work as they are, keys with destinations (ssh-add -h) do not, and prompts name no host")
		default:
			r.ok("%s", m[0])
		}
	}
	if s.err != nil {
		f := r.bad("%v", s.err)
		if strings.Contains(s.err.Error(), "environment expansion") {
			f.Next("in ~/.ssh/config, write %s: a variable that is not set makes ssh refuse the whole file", paths.IdentityAgent(paths.UserSocket()))
		} else {
			f.Next("ssh -G %s  # says the same, with file and line, or waits for what holds it up", anyHost)
		}
		return
	}
	if s.provider != "" && s.provider != "none" {
		r.warn("ssh loads the module %s by itself (PKCS11Provider in its configuration), and asks for its PIN beside the agent", s.provider).
			Next("take PKCS11Provider out of ~/.ssh/config or /etc/ssh/ssh_config")
	}
	if s.only && len(keys) > 0 && !anyOfFiles(keys, s.files) {
		r.warn("ssh offers only the keys of its IdentityFile lines (IdentitiesOnly yes), and none of those is in the agent").
			Next("p11-agent export --ssh-config  # prints the lines that name them")
	}
}

// anyOfFiles tells whether the public half of one of the files is one of the keys.
func anyOfFiles(keys []*sshagent.Key, names []string) bool {
	for _, file := range names {
		file = paths.ExpandHome(file)
		for _, name := range []string{file, file + ".pub"} {
			b, err := files.ReadSmall(name)
			if err != nil {
				continue
			}
			pub, _, _, _, err := ssh.ParseAuthorizedKey(b)
			if err == nil && slices.ContainsFunc(keys, func(k *sshagent.Key) bool { return bytes.Equal(k.Blob, pub.Marshal()) }) {
				return true
			}
		}
	}
	return false
}
