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

// Ask connects to the agent at a socket, finds out its program, and lists its keys.
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
		// When the service manager listens, only the path tells the agent's name.
		if name, pid := listenerOf(peer.Of(u), path); name != "" && name != "systemd" || a.Name == "" {
			a.Name, a.PID = name, pid
		}
	}
	if a.Keys, a.Err = sshagent.NewClient(c).List(); a.Err != nil && !time.Now().Before(deadline) {
		a.Err = os.ErrDeadlineExceeded // the client keeps only its text
	}
	a.Own = a.Name == Program || byPath(path) == Program || sameProgram(a.PID) ||
		a.Name == "ssh-agent" && slices.ContainsFunc(a.Keys, isTokenKey) // under that name
	a.Old = a.Own && startedBefore(a.PID, "/proc/self/exe")
	return a
}

// Program is the name of this program.
const Program = "p11-agent"

// ModuleProgram is the name that a module process gives itself.
const ModuleProgram = "p11-module"

// HasTokenKeys tells whether the agent has keys of tokens, as p11-agent names them.
func (a Agent) HasTokenKeys() bool { return slices.ContainsFunc(a.Keys, isTokenKey) }

func isTokenKey(k *sshagent.Key) bool { return strings.HasPrefix(k.Comment, "pkcs11:") }

// listenerOf finds the program that has a socket open. The kernel tells only which process
// began to listen. For ssh-agent and gpg-agent, which go on in a child, that process is
// another one; with "ssh-agent bash" it is the shell. So it counts only when this process
// may not read its list of open files.
func listenerOf(p peer.Peer, path string) (name string, pid int) {
	inode := listeningInode(path)
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "", 0
	}
	var closed []int // agents whose open files this process may not list
	manager := 0     // systemd has the sockets open of the agents that it starts
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		comm := Line(filepath.Join(dir, "comm"))
		files, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			if Line(filepath.Join(dir, "cmdline")) == "" {
				continue // a process that has ended
			}
			if pid == p.PID {
				return calledAs(pid, comm), pid
			}
			if comm == Program || comm == "exe" || slices.ContainsFunc(otherAgents, func(v otherAgent) bool { return slices.Contains(v.names, comm) }) {
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
	// ssh-agent and sshd give their sockets such names. The code above finds sshd.
	if strings.HasPrefix(filepath.Base(path), "agent.") && strings.HasPrefix(filepath.Base(filepath.Dir(path)), "ssh-") {
		return "ssh-agent", 0
	}
	return "", 0
}

// listeningInode returns the inode in /proc/net/unix of the socket that listens at a path,
// or "".
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

// calledAs returns the name of the program of a process. name is
// the name that the process gave itself, which the kernel cuts. Older agents in the
// background have the name "exe".
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

// sameProgram tells whether a process runs the file of this program.
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
	// The file was modified when it was built. Its inode changed when it was installed.
	return ok && known && older(started, time.Unix(sys.Ctim.Unix()))
}

// older tells whether a process started before an installation. The start is known to some
// seconds only, and the clock may have been set since.
func older(started, installed time.Time) bool { return installed.Sub(started) > time.Minute }

// startOf returns when a process was started.
func startOf(pid int) (time.Time, bool) {
	s, ok := procstat.Of(pid)
	if !ok {
		return time.Time{}, false
	}
	return s.Started()
}

// byPath returns the name of the agent that usually listens at a path. When systemd starts
// an agent with the first connection, systemd listens.
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

// An otherAgent is another program for the agent protocol.
type otherAgent struct {
	names []string // of its programs
	title string
	steps []string // keep it from taking SSH_AUTH_SOCK
}

var otherAgents = []otherAgent{
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

// kind names another agent for a person.
func (a Agent) kind() string {
	if a.forwarded() {
		return "the agent of the machine that you come from, which sshd forwards"
	}
	for _, v := range otherAgents {
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

// Title names the agent and its process for a person.
func (a Agent) Title() string {
	if a.PID == 0 {
		return a.kind()
	}
	return fmt.Sprintf("%s (process %d)", a.kind(), a.PID)
}

// SwitchOff returns the steps that keep the agent from taking SSH_AUTH_SOCK.
func (a Agent) SwitchOff() []string {
	for _, v := range otherAgents {
		if slices.Contains(v.names, a.Name) {
			return v.steps
		}
	}
	return nil
}

// UsedSocket returns the socket of the agent that ssh asks, when that is p11-agent, and
// otherwise the usual socket.
func UsedSocket(ctx context.Context) string {
	if path := os.Getenv(paths.SocketVariable); path != "" && path != paths.UserSocket() {
		if a := Ask(ctx, path); a.Err == nil && a.Own {
			return path
		}
	}
	return paths.UserSocket()
}
