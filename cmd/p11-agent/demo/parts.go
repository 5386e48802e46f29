package demo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token/registry"
)

func (d *demo) heading(text string) { d.say("\n== %s", text) }

// makeToken makes the token and its two keys.
func (d *demo) makeToken(ctx context.Context) bool {
	d.heading("A token with an RSA key and a P-256 key. Its PIN is " + pin + ".")
	key := func(kind, id, label string) bool {
		return d.run(ctx, step{argv: []string{
			"pkcs11-tool", "--module", d.module, "--token-label", tokenLabel, "--login", "--pin", pin,
			"--keypairgen", "--key-type", kind, "--id", id, "--label", label,
		}})
	}
	return d.write("softhsm2.conf", "directories.tokendir = "+d.path("tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600) &&
		d.run(ctx, step{argv: []string{
			"softhsm2-util", "--init-token", "--free", "--label", tokenLabel, "--pin", pin, "--so-pin", soPIN,
		}}) &&
		key("rsa:2048", "01", "rsa") && key("EC:prime256v1", "02", "p256")
}

// startAgent configures and starts the agent.
func (d *demo) startAgent(ctx context.Context) bool {
	d.heading("The agent. Its configuration names this token only.")
	var b strings.Builder
	fmt.Fprintf(&b, "keys = [%q]\n", tokenURI)
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

// otherModules returns the registered modules that the demo does not use. The agent of
// the demo must not touch a card that happens to be in a reader.
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

// openTerminal makes the terminal where pinentry asks. Without tmux or pinentry-curses it
// makes a program that gives the PIN.
func (d *demo) openTerminal(ctx context.Context) bool {
	if d.programs["tmux"] == "" || d.programs["pinentry-curses"] == "" {
		d.say("\ntmux or pinentry-curses is not installed (\"make deps-demo\" installs them): the demo shows no\nprompt, and an SSH_ASKPASS program gives the PIN.")
		return d.write("askpass", "#!/bin/sh\necho "+pin+"\n", 0o700)
	}
	d.terminal = true
	if !d.run(ctx, step{argv: d.tmux("new-session", "-d", "-x", "80", "-y", "24", "sleep 3600")}) {
		return false
	}
	out, err := d.command(ctx, d.tmux("display-message", "-p", "#{pane_tty}")).Output()
	d.tty = strings.TrimSpace(string(out))
	if err != nil || d.tty == "" {
		return d.result(fmt.Errorf("ask tmux for its terminal: %w", cmp.Or(err, errors.New("tmux has no terminal"))))
	}
	return true
}

func (d *demo) tmux(args ...string) []string {
	return append([]string{"tmux", "-S", "tmux.sock", "-f", "/dev/null"}, args...)
}

// startServer starts an sshd that accepts both keys and runs only echo.
func (d *demo) startServer(ctx context.Context) bool {
	d.heading("An sshd that accepts both keys.")
	port, err := freePort()
	if err != nil {
		return d.result(err)
	}
	for _, key := range []string{"rsa", "p256"} {
		if !d.run(ctx, step{argv: []string{"p11-agent", "list", "--public", tokenURI + ";object=" + key}, to: key + ".pub"}) {
			return false
		}
	}
	if os.Geteuid() == 0 {
		// Debian's sshd does not start without this directory, which its service makes.
		// Another sshd may use it by the end of the demo, so it stays.
		if _, err := os.Stat("/run/sshd"); err != nil && !d.run(ctx, step{argv: []string{"mkdir", "-p", "/run/sshd"}}) {
			return false
		}
	}
	pam := "no"
	if rootLocked() {
		pam = "yes" // otherwise sshd refuses users with a locked password
	}
	ok := d.run(ctx, step{argv: []string{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", "host_key"}}) &&
		d.run(ctx, step{argv: []string{"cat", "rsa.pub", "p256.pub"}, to: "authorized_keys"}) &&
		d.write("sshd_config", fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s
AuthenticationMethods publickey
AllowUsers %s
PermitRootLogin prohibit-password
# The directory is in /tmp, where all users may write.
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
	// The agent reads known_hosts of its HOME, so its prompts name the host.
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

// makeRepository makes a git repository whose commits the keys can sign.
func (d *demo) makeRepository(ctx context.Context) bool {
	d.heading("A git repository.")
	var signers strings.Builder
	for _, key := range []string{"rsa.pub", "p256.pub"} {
		b, err := os.ReadFile(d.path(key))
		if err != nil {
			return d.result(err)
		}
		fmt.Fprintf(&signers, "%s %s", email, b)
	}
	git := func(args ...string) bool {
		return d.run(ctx, step{argv: append([]string{"git", "-C", "repo"}, args...)})
	}
	return d.write("allowed_signers", signers.String(), 0o600) &&
		d.run(ctx, step{argv: []string{"git", "init", "-q", "repo"}}) &&
		git("config", "user.name", "Demo") && git("config", "user.email", email) &&
		git("config", "gpg.format", "ssh") &&
		git("config", "gpg.ssh.allowedSignersFile", d.path("allowed_signers"))
}

// asked uses the keys while a person gives the PIN. When the first login fails, it stops:
// all later ones would ask again, and no person would answer.
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

// typePIN waits for the prompt and types the PIN, as a person does.
func (d *demo) typePIN(ctx context.Context) error {
	for {
		screen, err := d.command(ctx, d.tmux("capture-pane", "-p")).Output()
		if ctx.Err() != nil {
			return errors.New("no prompt for the PIN appeared")
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
		case <-time.After(poll):
		}
	}
	// The command may end before tmux confirms the last key.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	for _, keys := range [][]string{{"-l", pin}, {"Enter"}} {
		argv := d.tmux(append([]string{"send-keys"}, keys...)...)
		d.say("$ %s", output.CommandLine(argv))
		if err := d.command(ctx, argv).Run(); err != nil {
			return fmt.Errorf("type the PIN: %w", err)
		}
	}
	return nil
}

// constrained removes keys and adds them.
func (d *demo) constrained(ctx context.Context) bool {
	d.heading("ssh-add: URIs name the keys. (ssh-add asks for a passphrase and means the PIN; the demo gives none here.)")
	key := tokenURI + ";object=rsa"
	d.run(ctx, step{argv: []string{"ssh-add", "-e", key}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-t", "1h", "-s", key}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, show: true})
	return ctx.Err() == nil
}

// fromFile uses the keys with a PIN from a file.
func (d *demo) fromFile(ctx context.Context) bool {
	d.heading("Without a person: the agent forgets all keys, and the PIN comes from a file.")
	d.run(ctx, step{argv: []string{"ssh-add", "-D"}, show: true})
	d.run(ctx, step{argv: []string{"ssh-add", "-l"}, status: 1, show: true})
	if !d.write("pin", pin+"\n", 0o600) ||
		!d.run(ctx, step{argv: []string{"ssh-add", "-t", "1h", "-s", tokenURI + "?pin-source=file:" + d.path("pin")}, show: true}) {
		return false
	}
	for _, key := range []string{"rsa", "p256"} {
		d.run(ctx, d.login(key))
		d.commit(ctx, key)
	}
	return ctx.Err() == nil
}
