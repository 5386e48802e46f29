package doctor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"

	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/systemd"
	"p11-agent/systemd/install"
)

const installUnits = "p11-agent install --user --now  # starts it with the first use, after every login"

// ifBooted returns a step that needs systemd, or "" when systemd does not run.
func ifBooted(step string) string {
	if systemd.Booted() {
		return step
	}
	return ""
}

// restartStep returns the step that restarts services. more is an addition for systemd.
func restartStep(what, units, more string) string {
	if systemd.Booted() {
		return "sudo systemctl restart " + units + more
	}
	return "restart " + what + " as your system does: systemd does not run here"
}

// findUnits looks at the units of the user's service manager.
func findUnits(ctx context.Context, r *Group) {
	units, s, err := probe.Units(ctx, install.SocketUnit, install.ServiceUnit)
	switch {
	case errors.Is(err, exec.ErrNotFound), s.Status != nil && !systemd.Booted():
		r.ok("systemd does not run here, so the agent is started by hand")
		return
	case err != nil:
		r.bad("the user's service manager cannot be asked: %v", err).
			Next("systemctl --user daemon-reexec  # or log out and in again")
		return
	case s.Status != nil:
		r.warn("the user's service manager cannot be reached from here (%s): a shell of su or sudo has none", firstLine(s.Err)).
			Next("log in as yourself, or: sudo machinectl shell %s@", userName())
		return
	}
	socket, service := units[install.SocketUnit], units[install.ServiceUnit]
	findUnit := func(name string, u probe.Unit) {
		where := u["FragmentPath"]
		if u["DropInPaths"] != "" {
			where += ", changed by " + u["DropInPaths"]
		}
		switch {
		case u["LoadState"] == "masked":
			r.warn("%s is masked, so it never starts", name).Next("systemctl --user unmask %s", name)
		case u["LoadState"] != "loaded" && u["LoadState"] != "not-found" && u["LoadState"] != "":
			r.bad("%s cannot be loaded (%s)", name, u["LoadState"]).Next("systemd-analyze --user verify %s", name)
		case u["LoadState"] != "loaded":
		case u["ActiveState"] == "failed":
			why := u["Result"]
			if why == "start-limit-hit" || why == "service-start-limit-hit" {
				why = "systemd does not start the unit any more, because it ended again and again: " + why
			}
			r.bad("%s has failed (%s; %s)", name, why, where).
				Next("journalctl --user -u %s -n 20  # says why", install.ServiceUnit).
				Next("systemctl --user reset-failed %s %s && systemctl --user start %s", install.SocketUnit, install.ServiceUnit, install.SocketUnit)
		default:
			r.detail("%s is %s (%s; %s)", name, u["ActiveState"], u["UnitFileState"], where)
		}
	}
	findUnit(install.SocketUnit, socket)
	findUnit(install.ServiceUnit, service)
	installed := socket["LoadState"] == "loaded"
	switch {
	case !installed && service["LoadState"] != "loaded":
		r.ok("the user's service manager has no unit of the agent").Next("%s", installUnits)
	case installed && socket["ActiveState"] == "inactive":
		r.warn("%s is installed and does not listen", install.SocketUnit).Next("systemctl --user enable --now %s", install.SocketUnit)
	case installed && socket["UnitFileState"] == "disabled":
		r.warn("%s listens now, and will not after the next login", install.SocketUnit).Next("systemctl --user enable %s", install.SocketUnit)
	case installed && socket["ActiveState"] == "active":
		r.ok("%s listens", install.SocketUnit)
	}
	findManagerEnvironment(ctx, r, installed || service["LoadState"] == "loaded")
	if _, err := os.Stat(filepath.Join("/var/lib/systemd/linger", userName())); err == nil {
		r.detail("your services stay when you log out (linger)")
	}
}

// findManagerEnvironment compares the environment of units with that of this process.
func findManagerEnvironment(ctx context.Context, r *Group, installed bool) {
	there, ok := probe.ManagerEnvironment(ctx)
	if !ok || !installed {
		return // systemctl has answered a moment ago: the environment is unknown
	}
	var missing []string
	for _, name := range []string{"DISPLAY", "WAYLAND_DISPLAY"} {
		if os.Getenv(name) != "" && there[name] == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		r.warn("the service manager does not have %s, so an agent that it starts cannot ask on the desktop", strings.Join(missing, " and ")).
			Next("systemctl --user import-environment DISPLAY WAYLAND_DISPLAY XAUTHORITY; systemctl --user restart %s", install.ServiceUnit)
	}
	if there[paths.SocketVariable] == "" {
		r.warn("programs that the service manager starts (editors, desktops) do not have SSH_AUTH_SOCK").
			Next("mkdir -p ~/.config/environment.d\necho 'SSH_AUTH_SOCK=${XDG_RUNTIME_DIR}/p11-agent/agent.sock' >~/.config/environment.d/50-p11-agent.conf\nsystemctl --user daemon-reload")
	} else {
		r.detail("the service manager has SSH_AUTH_SOCK=%s", there[paths.SocketVariable])
	}
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(s, "\n")
	return l
}

func userName() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "NAME"
}
