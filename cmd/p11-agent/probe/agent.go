package probe

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	sshagent "golang.org/x/crypto/ssh/agent"

	"p11-agent/agent/peer"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/pinentry/procstat"
)

// An Agent is what answers at the socket of an agent.
type Agent struct {
	Path string
	Err  error // no agent answers
	// Name is the name of the program that listens, PID its process. They are empty and 0
	// when they are unknown.
	Name string
	PID  int
	Own  bool // it is p11-agent
	Old  bool // it was started before this program was installed
	Keys []*sshagent.Key
}

// Ask connects to the agent at a socket, finds out its Program, and lists its keys.
func Ask(ctx context.Context, path string) Agent {
	a := Agent{Path: path, Name: byPath(path)}
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		a.Err = err
		return a
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if a.Err = c.SetDeadline(deadline); a.Err != nil {
		return a
	}
	if u, ok := c.(*net.UnixConn); ok {
		// Where the service manager listens for it, the path tells.
		if name, pid := listenerOf(peer.Of(u), path); name != "" && name != "systemd" || a.Name == "" {
			a.Name, a.PID = name, pid
		}
	}
	if a.Keys, a.Err = sshagent.NewClient(c).List(); a.Err != nil && !time.Now().Before(deadline) {
		a.Err = os.ErrDeadlineExceeded // of which the client makes a text
	}
	a.Own = a.Name == Program || byPath(path) == Program || sameProgram(a.PID) ||
		a.Name == "ssh-agent" && slices.ContainsFunc(a.Keys, isTokenKey) // under that name
	a.Old = a.Own && startedBefore(a.PID, "/proc/self/exe")
	return a
}

// Program is the name of this program.
const Program = "p11-agent"

// HasTokenKeys tells whether the agent has keys of tokens, as p11-agent names them.
func (a Agent) HasTokenKeys() bool { return slices.ContainsFunc(a.Keys, isTokenKey) }

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
		comm := Line(filepath.Join(dir, "comm"))
		files, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			if Line(filepath.Join(dir, "cmdline")) == "" {
				continue // it has ended, and its parent does not know yet
			}
			if pid == p.PID {
				return calledAs(pid, comm), pid
			}
			if comm == Program || comm == "exe" || slices.ContainsFunc(rivals, func(v rival) bool { return slices.Contains(v.names, comm) }) {
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
			return calledAs(pid, Line(fmt.Sprintf("/proc/%d/comm", pid))), pid
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

// calledAs returns the name of a process's Program, given the one that it gave
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
	first, _, _ := strings.Cut(Line(fmt.Sprintf("/proc/%d/cmdline", pid)), "\x00")
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
		{"/p11-agent/agent.sock", Program},
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
func (a Agent) title() string {
	if a.forwarded() {
		return "the agent of the machine that you have come from, which sshd forwards"
	}
	for _, v := range rivals {
		if slices.Contains(v.names, a.Name) && v.title != "" {
			return v.title
		}
	}
	if a.Name != "" {
		return "another agent, " + a.Name
	}
	return "another agent"
}

func (a Agent) forwarded() bool {
	return a.Name == "sshd" || a.Name == "sshd-session" || a.Name == "dropbear"
}

// Who names the agent and its process for a person.
func (a Agent) Who() string {
	if a.PID == 0 {
		return a.title()
	}
	return fmt.Sprintf("%s (process %d)", a.title(), a.PID)
}

// SwitchOff returns the steps that keep the agent from taking SSH_AUTH_SOCK.
func (a Agent) SwitchOff() []string {
	for _, v := range rivals {
		if slices.Contains(v.names, a.Name) {
			return v.steps
		}
	}
	return nil
}
