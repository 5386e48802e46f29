package doctor

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/systemd"
	"p11-agent/systemd/install"
)

// includeLine returns the line for ~/.ssh/config that includes the file of install, or ""
// when there is no such file.
func includeLine() string {
	file := filepath.Join(filepath.Dir(paths.ConfigFile()), "ssh_config")
	if _, err := os.Stat(file); err != nil || !filepath.IsAbs(file) {
		return ""
	}
	return install.Include(file)
}

// An askedAgent is the agent that ssh asks.
type askedAgent struct {
	probe.Agent
	from string // what names its socket
	none bool   // ssh asks no agent: IdentityAgent none
}

// askAgent asks the agent that ssh asks. Without a path it asks none.
func askAgent(ctx context.Context, s probe.SSH) askedAgent {
	a := askedAgent{from: paths.SocketVariable}
	path := os.Getenv(paths.SocketVariable)
	switch {
	case s.Agent == "none":
		return askedAgent{none: true}
	case strings.HasPrefix(s.Agent, "$"):
		path, a.from = os.Getenv(strings.Trim(s.Agent, "${}")), "IdentityAgent "+s.Agent
	case s.Agent != "" && s.Agent != paths.SocketVariable:
		path, a.from = paths.ExpandHome(s.Agent), "IdentityAgent in ssh's configuration"
	}
	if path != "" {
		a.Agent = probe.Ask(ctx, path)
	}
	return a
}

// findAgent looks at the agent that ssh asks. It also looks at the agent of SSH_AUTH_SOCK,
// which ssh-add and git's signatures ask in any case.
func findAgent(ctx context.Context, r *Group, a askedAgent) {
	env, own := os.Getenv(paths.SocketVariable), paths.UserSocket()
	if a.none {
		r.bad("ssh asks no agent at all: its configuration has IdentityAgent none").
			Next("take that line out of ~/.ssh/config or /etc/ssh/ssh_config, or have this one come before it:\nHost *\n    %s", paths.IdentityAgent(cmp.Or(own, env)))
		return
	}
	lead := func(f *finding, other probe.Agent) { leadToOwn(ctx, f, other, own, a.Path) }
	if a.Path == "" {
		lead(r.bad("%s is not set, so ssh asks no agent", a.from), probe.Agent{})
		return
	}
	judgeAgent(r.bad, r, a.Agent, a.from, lead)
	if env == a.Path {
		return
	}
	export := "export SSH_AUTH_SOCK=" + output.ShellWord(a.Path)
	if env == "" {
		r.warn("ssh finds its agent by %s; ssh-add and git's signatures do not, as SSH_AUTH_SOCK is not set", a.from).Next("%s", export)
	} else if b := probe.Ask(ctx, env); b.Err != nil || !b.Own {
		judgeAgent(r.warn, r, b, "SSH_AUTH_SOCK, which ssh-add and git's signatures use", func(f *finding, _ probe.Agent) { f.Next("%s", export) })
	}
}

// judgeAgent adds a finding about the agent at a socket.
func judgeAgent(add func(string, ...any) *finding, r *Group, a probe.Agent, from string, lead func(*finding, probe.Agent)) {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(a.Err, os.ErrNotExist):
		lead(add("%s names %s, and there is no such socket: its agent has ended", from, a.Path), a)
	case errors.Is(a.Err, unix.ECONNREFUSED), errors.Is(a.Err, unix.ENOTSOCK):
		lead(add("%s names %s, and no agent answers there: the agent has ended and left its socket behind", from, a.Path), a)
	case errors.Is(a.Err, os.ErrPermission):
		lead(add("%s names %s, which you may not use: the socket belongs to another user (after su or sudo, perhaps)", from, a.Path), a)
	case errors.As(a.Err, &timeout) && timeout.Timeout():
		lead(add("%s names %s, where %s takes the connection and does not answer", from, a.Path, a.Title()), a)
	case a.Err != nil && !a.Own:
		lead(add("%s names %s, where %s answers, and not as an agent does (%v)", from, a.Path, a.Title(), a.Err), a)
	case a.Err != nil:
		add("%s names %s, and the agent there does not list its keys: %v", from, a.Path, a.Err).
			Next("%s", strings.TrimSuffix("tail ~/.local/state/p11-agent/agent.log; "+ifBooted("journalctl --user -u p11-agent -n 20"), "; "))
	case a.Own && len(a.Keys) == 0:
		r.warn("p11-agent answers at %s and lists no key: the agent is locked, or no key can be used", a.Path).
			Next("ssh-add -X  # unlocks the agent, if it was locked with ssh-add -x").
			Next("p11-agent list -v  # which keys there are, and why some are left out")
	case a.Own && a.Old:
		r.warn("p11-agent (process %d) answers at %s and is older than the program that is installed now", a.PID, a.Path).
			Next("restart the agent: %sp11-agent agent -k, and start it as before", ifBooted("systemctl --user restart p11-agent.service, or "))
	case a.Own:
		r.ok("p11-agent answers at %s and lists %s", a.Path, output.Count(len(a.Keys), "key"))
	case a.HasTokenKeys():
		r.ok("%s answers at %s, and has keys of tokens among its %s", a.Title(), a.Path, output.Count(len(a.Keys), "key"))
	default:
		lead(add("ssh does not ask p11-agent but %s: %s names its socket, %s", a.Title(), from, a.Path), a)
	}
}

// leadToOwn adds the steps that lead from another agent, or from none, to p11-agent.
func leadToOwn(ctx context.Context, f *finding, a probe.Agent, own, asked string) {
	running := false
	if own != "" && own != asked {
		ours := probe.Ask(ctx, own)
		running = ours.Err == nil && ours.Own
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
		if systemd.Booted() {
			f.Next("%s", installUnits)
		}
		if include := includeLine(); include != "" {
			f.Next("in ~/.ssh/config, above everything else, so that ssh finds the agent even when SSH_AUTH_SOCK names another one:\n%s", include)
		} else if own != "" {
			f.Next("in ~/.ssh/config, above everything else, so that ssh finds the agent even when SSH_AUTH_SOCK names another one:\nHost *\n    %s", paths.IdentityAgent(own))
		}
	}
	for _, step := range a.SwitchOff() {
		if !strings.HasPrefix(step, "systemctl ") || systemd.Booted() {
			f.Next("%s", step)
		}
	}
	if a.Name == "ssh-agent" {
		if _, err := os.Stat(filepath.Join(os.Getenv("HOME"), ".keychain")); err == nil {
			f.Next("keychain starts it: take the line with keychain out of your shell's startup files")
		}
	}
}
