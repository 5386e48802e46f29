package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"p11-agent/agent/peer"
	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/pinentry"
)

// findPrompt says which program can ask for a PIN here, and what prevents it. It shows no
// prompt.
func findPrompt(ctx context.Context, r *Group, c *config.File) {
	ctx, cancel := context.WithTimeout(ctx, 2*probe.Timeout)
	defer cancel()
	a := prompt.New(c, prompt.Options{Log: slog.New(slog.DiscardHandler)})
	place := a.Here(nil)
	tty, ttyErr := peer.Own()
	if ttyErr == nil {
		defer tty.Close()
		place = a.Here(tty.File)
	}
	desktop := findDisplays(ctx, r, place)
	askpass := findAskpass(r)
	findFlavors(r)

	probed, err := a.Probe(ctx, place)
	called := cmp.Or(c.Pinentry.Program, "pinentry")
	switch {
	case probed.File == "" && askpass != "":
		r.ok("a PIN can be asked for here with SSH_ASKPASS, %s: there is no %s", askpass, called)
		return
	case probed.File == "":
		f := r.bad("no PIN can be asked for: there is no program %s", called)
		if c.Pinentry.Program != "" {
			f.Next("in the configuration, set program in [pinentry] to an installed program, or take the line out")
		}
		f.Next("%s", pinentryInstall(desktop))
		return
	case err != nil && (place.Display != "" || place.WaylandDisplay != ""):
		// The agent does the same: pinentry-qt ends when the display does not answer.
		place.Display, place.WaylandDisplay = "", ""
		again, aerr := a.Probe(ctx, place)
		if aerr != nil {
			break
		}
		r.warn("%s does not start with this display: %v", probed.File, err).
			Next("see the line about the display above, or install another one: %s", pinentryInstall(desktop))
		probed, err = again, nil
	}
	if err != nil {
		f := r.bad("%s cannot ask for a PIN: %v", probed.File, err)
		if askpass != "" {
			f.level = levelWarning
			r.ok("a PIN can be asked for here with SSH_ASKPASS, %s", askpass)
		}
		f.Next("%s", pinentryInstall(desktop)).
			Next("%s </dev/null  # says more", output.ShellWord(probed.File))
		return
	}
	with := probed.File
	if probed.Flavor != "" {
		with += " (" + strings.ReplaceAll(probed.Flavor, ":", ", in its place ") + ")"
	}
	if !probed.Terminal() {
		r.ok("a PIN can be asked for here with %s", with)
		return
	}
	if flavor, _, fallen := strings.Cut(probed.Flavor, ":"); desktop && fallen {
		f := r.warn("the display answers, and %s does not use it", probed.File)
		if flavor == "gnome3" {
			f.Next("pinentry-gnome3 needs gcr and the bus of your session: set DBUS_SESSION_BUS_ADDRESS as the desktop has it, or use dbus-run-session")
		}
		f.Next("another pinentry may use it: %s", advice.Install("pinentry-gtk2", "pinentry-gtk"))
	}
	findTerminal(r, place, ttyErr, with, askpass)
	if desktop && !strings.Contains(probed.Flavor, ":") {
		r.warn("there is a desktop, and %s asks on terminals only: programs without a terminal (editors, file managers) get no PIN", probed.File).
			Next("%s", pinentryInstall(true))
	}
}

// findTerminal looks at the terminal, for a pinentry that asks there.
func findTerminal(r *Group, place pinentry.Place, ttyErr error, with, askpass string) {
	err, name := place.CheckTerminal(), terminalName(place.TTY)
	plain, lerr := exec.LookPath("pinentry-tty")
	cannotDraw := errors.Is(err, pinentry.ErrTooSmall) || errors.Is(err, pinentry.ErrTTYType)
	switch {
	case err == nil:
		r.ok("a PIN can be asked for here with %s, on %s", with, name)
	case cannotDraw && lerr == nil:
		r.ok("a PIN can be asked for here with %s, on %s: %s cannot draw there, as %v", plain, name, with, err)
	case errors.Is(err, pinentry.ErrTTYType):
		r.ok("a PIN can be asked for here by the agent itself, on %s: %s cannot draw there, as %v", name, with, err)
	case cannotDraw:
		r.bad("no PIN can be asked for on this terminal (%s): %v", name, err).
			Next("make the window or pane larger, to %d columns and %d rows at least", pinentry.MinColumns, pinentry.MinRows).
			Next("%s  # asks in one line", advice.Install("pinentry-tty", "pinentry"))
	case askpass != "":
		r.ok("a PIN can be asked for here with SSH_ASKPASS, %s: there is no terminal for %s", askpass, with)
	case errors.Is(err, pinentry.ErrNoTerminal):
		r.bad("no PIN can be asked for here: no display works, and there is no terminal (%v); %s would ask", ttyErr, with).
			Next("p11-agent login  # in a terminal, gives the running agent the PIN in advance").
			Next("without a person: give the PIN with pin-source, see p11-agent.toml(5)")
	default:
		r.bad("no PIN can be asked for on %s: %v", name, err).
			Next("p11-agent login  # in another terminal, gives the running agent the PIN in advance")
	}
}

// terminalName returns the path of a terminal.
func terminalName(tty *os.File) string {
	if tty == nil {
		return "no terminal"
	}
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", tty.Fd()))
	if err != nil {
		return tty.Name()
	}
	return name
}

// findDisplays tells whether a display answers.
func findDisplays(ctx context.Context, r *Group, place pinentry.Place) bool {
	ctx, cancel := context.WithTimeout(ctx, probe.Timeout)
	defer cancel()
	desktop := false
	for _, d := range []struct {
		name, value string
		err         error
	}{
		{"DISPLAY", place.Display, place.CheckDisplay(ctx)},
		{"WAYLAND_DISPLAY", place.WaylandDisplay, place.CheckWayland(ctx)},
	} {
		switch {
		case d.value == "":
		case d.err == nil:
			desktop = true
			r.detail("%s=%s answers", d.name, d.value)
		default:
			f := r.warn("%s is %s, and no display answers there (%v), so pinentry can show no window", d.name, d.value, d.err)
			if os.Getenv("TMUX") != "" {
				f.Next(`eval "$(tmux show-environment -s %s)"  # tmux keeps the value of the place where it started`, d.name)
			}
			f.Next("unset %s  # or set it to the value that your desktop has", d.name)
		}
	}
	return desktop
}

// findAskpass returns the program of SSH_ASKPASS, if it can run.
func findAskpass(r *Group) string {
	name := os.Getenv("SSH_ASKPASS")
	if name == "" {
		return ""
	}
	path, err := exec.LookPath(name)
	if err != nil {
		r.warn("SSH_ASKPASS is %s, which cannot be run (%v)", name, errors.Unwrap(err)).
			Next("unset SSH_ASKPASS  # or: chmod +x %s", output.ShellWord(name))
		return ""
	}
	return path
}

// findFlavors lists the installed pinentry programs.
func findFlavors(r *Group) {
	var there []string
	for _, f := range []string{"gnome3", "qt", "qt5", "gtk-2", "curses", "tty", "mac"} {
		if path, err := exec.LookPath("pinentry-" + f); err == nil {
			there = append(there, path)
		}
	}
	if usual, err := exec.LookPath("pinentry"); err == nil {
		if target, err := filepath.EvalSymlinks(usual); err == nil && target != usual {
			there = append(there, fmt.Sprintf("%s, which is %s", usual, target))
		}
	}
	if len(there) > 0 {
		r.detail("installed: %s", strings.Join(there, ", "))
	}
}

// pinentryInstall returns the step that installs a pinentry that fits.
func pinentryInstall(desktop bool) string {
	if !desktop {
		return advice.Install("pinentry-curses", "pinentry")
	}
	if strings.Contains(os.Getenv("XDG_CURRENT_DESKTOP"), "KDE") {
		return advice.Install("pinentry-qt", "pinentry-qt")
	}
	return advice.Install("pinentry-gnome3", "pinentry-gnome3")
}
