package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/systemd"
	"p11-agent/token"
	"p11-agent/token/pcsc"
	"p11-agent/token/wellknown"
)

func findCards(ctx context.Context, r *Group, d probe.PCSCD, modules []token.ModuleStatus) {
	wanted := slices.ContainsFunc(modules, func(m token.ModuleStatus) bool { return wellknown.KindOf(m.Path).SmartCards() })
	switch {
	case d.Err != nil:
		findDown(r, d, wanted)
		return
	case len(d.Readers) == 0 && len(d.USB) > 0:
		r.bad("%s is plugged in, and pcscd has no reader: the driver is missing", strings.Join(d.USB, " and ")).
			Next("%s", advice.Install("libccid", "pcsc-lite-ccid")).
			Next("%s", restartStep("pcscd", "pcscd.socket pcscd.service", ""))
		return
	case len(d.Readers) == 0:
		anyToken := slices.ContainsFunc(modules, func(m token.ModuleStatus) bool { return len(m.Tokens) > 0 })
		f := r.add(map[bool]level{true: levelOK, false: levelWarning}[anyToken || !wanted], "pcscd runs, and no reader or security key is plugged in")
		if f.level == levelWarning {
			f.Next("plug one in; if one is plugged in, try another port, and read the kernel's messages: sudo dmesg | tail")
		}
		return
	}
	for _, reader := range d.Readers {
		switch {
		case reader.Users == pcsc.Exclusive:
			findExclusive(r, d, reader)
		case !reader.Card:
			r.ok("reader %q is empty", reader.Name)
		case recognised(modules, reader.Name):
			r.ok("reader %q has a card", reader.Name)
		default:
			findUnknownCard(ctx, r, reader, wanted)
		}
	}
	for _, c := range slices.Concat(d.Clients.Clients, d.Clients.Suspects) {
		if c.Name == "scdaemon" && !hasLine(gnupgFile("scdaemon.conf"), "pcsc-shared") {
			r.warn("GnuPG's scdaemon (%d) is running, and does not share cards: the agent then cannot use them", c.PID).
				Next("%s", shareStep())
			break
		}
	}
}

// findDown adds why pcscd does not answer.
func findDown(r *Group, d probe.PCSCD, wanted bool) {
	bad := r.bad
	if len(d.USB) == 0 {
		bad = r.warn // without a reader, nothing is missing
	}
	plugged := ""
	if len(d.USB) > 0 {
		plugged = ", and " + strings.Join(d.USB, " and ") + " is plugged in"
	}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(d.Err, pcsc.ErrRefused) && d.UID != 0:
		r.bad("pcscd refuses you the readers (polkit admits a person at the machine only; sessions of ssh, tmux, cron and lingering services do not count)").
			Next("%s", polkitRule()).
			Next("%s", restartStep("polkit and pcscd", "polkit pcscd.socket", ""))
	case errors.Is(d.Err, pcsc.ErrRefused):
		r.bad("pcscd hangs up without an answer").
			Next("%s", restartStep("pcscd", "pcscd.socket pcscd.service", "; journalctl -u pcscd -n 20"))
	case errors.Is(d.Err, pcsc.ErrLanguage):
		r.bad("%v: pcscd and the libraries are of different versions", d.Err).
			Next("%s  # an upgrade has left the old one running", restartStep("pcscd", "pcscd.socket pcscd.service", "")).
			Next("in a container, use the same version of pcsc-lite as outside")
	case errors.Is(d.Err, os.ErrPermission):
		r.bad("pcscd's socket %s may not be used by you", d.Socket).
			Next("ls -l %s  # all users need access; in a sandbox (snap, flatpak), allow access to pcscd", output.ShellWord(d.Socket))
	case errors.Is(d.Err, os.ErrNotExist), errors.Is(d.Err, unix.ECONNREFUSED), errors.Is(d.Err, unix.ENOTSOCK):
		if !wanted && len(d.USB) == 0 {
			r.ok("pcscd does not run, and no module needs it")
			return
		}
		f := bad("pcscd does not run (no program listens at %s), so no smart card and no security key can be seen%s", d.Socket, plugged)
		if _, err := os.Stat("/usr/sbin/pcscd"); err != nil {
			f.Next("%s", advice.Install("pcscd", "pcsc-lite"))
		}
		if systemd.Booted() {
			f.Next("sudo systemctl enable --now pcscd.socket")
		} else {
			f.Next("sudo pcscd  # systemd does not run here: have your system start pcscd")
		}
	case errors.As(d.Err, &timeout) && timeout.Timeout():
		r.bad("pcscd does not answer, perhaps because of a reader").
			Next("pull the reader out and put it in again, then: %s", restartStep("pcscd", "pcscd.socket pcscd.service", ""))
	default:
		r.bad("pcscd cannot be asked: %v", d.Err).
			Next("%s", restartStep("pcscd", "pcscd.socket pcscd.service", "; journalctl -u pcscd -n 20"))
	}
}

// polkitRule returns the step that gives this user the readers in every session.
func polkitRule() string {
	return fmt.Sprintf(`sudo tee /etc/polkit-1/rules.d/30-p11-agent.rules <<'END'
polkit.addRule(function(action, subject) {
    if ((action.id == "org.debian.pcsc-lite.access_pcsc" ||
         action.id == "org.debian.pcsc-lite.access_card") &&
        subject.user == %q) {
        return polkit.Result.YES;
    }
});
END`, userName())
}

func findExclusive(r *Group, d probe.PCSCD, reader pcsc.Reader) {
	var who []string
	gnupg := false
	for _, c := range slices.Concat(d.Clients.Clients, d.Clients.Suspects) {
		// The doctor's own module processes look at the same readers now.
		if c.PID == os.Getpid() || c.Name == probe.Program || c.Name == probe.ModuleProgram {
			continue
		}
		who = append(who, c.String())
		gnupg = gnupg || c.Name == "scdaemon"
	}
	by := "another program"
	if len(who) > 0 {
		by = "another program: probably " + strings.Join(who, " or ")
	}
	f := r.warn("the card in reader %q is kept by %s", reader.Name, by)
	switch {
	case gnupg:
		f.Next("%s", shareStep())
	case len(who) > 0:
		f.Next("end that program, or make it share the card")
	default:
		f.Next("sudo fuser -v %s  # shows who is connected with pcscd", output.ShellWord(d.Socket))
	}
}

// shareStep returns the step that makes scdaemon share cards.
func shareStep() string {
	return fmt.Sprintf("echo pcsc-shared >>%s; gpgconf --kill scdaemon", output.ShellWord(gnupgFile("scdaemon.conf")))
}

func gnupgFile(name string) string {
	if dir := os.Getenv("GNUPGHOME"); dir != "" {
		return filepath.Join(dir, name)
	}
	return filepath.Join(os.Getenv("HOME"), ".gnupg", name)
}

// hasLine tells whether a file of settings has this line.
func hasLine(file, want string) bool {
	b, err := os.ReadFile(file)
	return err == nil && slices.ContainsFunc(strings.Split(string(b), "\n"), func(l string) bool { return strings.TrimSpace(l) == want })
}

// recognised tells whether a module shows a token in a reader. Slots of OpenSC and ykcs11
// have the name of the reader, cut to 64 bytes, and sometimes more text after it.
func recognised(modules []token.ModuleStatus, reader string) bool {
	reader = reader[:min(len(reader), 64)]
	for _, m := range modules {
		for _, t := range m.Tokens {
			if slot := strings.TrimSpace(t.Slot); slot != "" && (strings.HasPrefix(slot, reader) || strings.HasPrefix(reader, slot)) {
				return true
			}
		}
	}
	return false
}

func findUnknownCard(ctx context.Context, r *Group, reader pcsc.Reader, wanted bool) {
	if !wanted {
		r.bad("the card in reader %q is seen by no module: none for smart cards is installed", reader.Name).
			Next("%s", advice.Install("opensc-pkcs11", "opensc"))
		return
	}
	if refused(ctx, "org.debian.pcsc-lite.access_card") {
		r.bad("pcscd shows the card in reader %q and does not let you use it (polkit)", reader.Name).
			Next("%s", polkitRule()).
			Next("%s", restartStep("polkit and pcscd", "polkit pcscd.socket", ""))
		return
	}
	r.warn("the card in reader %q is recognised by no module: it is empty, of a kind that needs a module of its maker, or its chip is not touched (turn it round)", reader.Name).
		Next("opensc-tool --reader %s --name  # what OpenSC knows about the card", output.ShellWord(reader.Name))
}

// refused tells whether polkit refuses an action to this process.
func refused(ctx context.Context, action string) bool {
	s, err := probe.Run(ctx, "pkcheck", "--action-id", action, "--process", strconv.Itoa(os.Getpid()))
	e, failed := errors.AsType[*exec.ExitError](s.Status)
	// 1: not authorised; 2: only with a password, which pcscd does not ask for; 127: polkit
	// does not answer (pkcheck(1)).
	return err == nil && failed && (e.ExitCode() == 1 || e.ExitCode() == 2) && !strings.Contains(s.Err, "Error")
}
