package setup

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/cmd/p11-agent/export"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/pinentry/plain"
)

// hostName matches the hosts that ssh-copy-id may get: they do not begin with "-", and are one word for a shell.
var hostName = regexp.MustCompile(`^[A-Za-z0-9._][A-Za-z0-9._@:%\[\]-]*$`)

// authorize shows the line that lets the key in, and copies it to a host.
func (s *conversation) authorize(ctx context.Context) error {
	const title = "The other side"
	s.say("\n%s", title)
	if s.key.Token == nil {
		s.toDo(title, "show the line for ~/.ssh/authorized_keys, and copy it to a host with ssh-copy-id")
		return nil
	}
	s.say("  This line in ~/.ssh/authorized_keys on a host lets the key in:\n\n%s\n", strings.TrimSpace(s.key.Line))
	file := publicFile(s.key)
	cp := []string{"ssh-copy-id", "-f", "-i", file}
	if same, err := export.Holds(file, s.key.Public); err == nil && same {
		s.say("  done: it is in %s. To copy it to another host: ssh-copy-id -f -i %s HOST", output.HomePath(file), output.HomePath(file))
		return nil
	}
	if s.ask == nil {
		s.toDo(title, fmt.Sprintf("write %s, and copy it to a host: ssh-copy-id -f -i %s HOST", output.HomePath(file), output.HomePath(file)))
		return nil
	}
	if _, err := exec.LookPath(cp[0]); err != nil {
		return nil // the line is all that there is to do
	}
	for {
		host, err := s.ask.line(ctx, fmt.Sprintf("  Write it to %s, and copy it with ssh-copy-id to this host (Enter: neither):", output.HomePath(file)))
		if err != nil || host == "" {
			return err
		}
		if !hostName.MatchString(host) {
			s.say("  %q is no name of a host, such as host.example.org or user@host.", plain.Line(host))
			continue
		}
		if err := s.writeKey(); err != nil {
			s.trouble(err)
			return nil
		}
		if err := s.attached(ctx, append(cp, host)...); err != nil {
			s.trouble(err)
		}
		return nil
	}
}

// writeKey writes the public half of the key.
func (s *conversation) writeKey() error {
	if err := export.Write(io.Discard, []export.Key{s.key}, filepath.Dir(publicFile(s.key)), false); err != nil {
		return err
	}
	s.changed = true
	return nil
}

// gitSigners is the file of allowed signers, if git's configuration does not name one.
const gitSigners = "~/.config/git/allowed_signers"

// signWithGit makes git sign with the key, and accept its signatures.
func (s *conversation) signWithGit(ctx context.Context) error {
	const title = "git"
	if _, err := exec.LookPath("git"); err != nil {
		return nil // without git there is nothing to set up
	}
	set := func(name string) string { return gitSetting(ctx, name) }
	email, signing := set("user.email"), set("user.signingkey")
	if email == "" {
		s.say("\n%s", title)
		s.say("  not done: git does not know your e-mail address, which its signatures go by. To have it sign, type this and setup again:\n")
		s.say("    git config --global user.email you@example.org")
		return nil
	}
	if !export.IsPrincipal(email) {
		s.say("\n%s", title)
		s.say("  not done: git's user.email, %q, is no name that signatures can go by", plain.Line(email))
		return nil
	}
	if s.key.Token == nil {
		_, err := s.offer(ctx, title, "", "have it sign commits with the key")
		return err
	}
	signers := paths.ExpandHome(set("gpg.ssh.allowedsignersfile"))
	if signers == "" {
		signers = paths.ExpandHome(gitSigners)
	}
	file := publicFile(s.key)
	line := fmt.Sprintf("%s namespaces=\"git\" %s", email, s.key.Line)
	known := hasSigner(signers, email, s.key.Public)
	done := ""
	if signing != "" && paths.ExpandHome(signing) == file && set("gpg.format") == "ssh" && known && set("gpg.ssh.allowedsignersfile") != "" {
		done = "it signs with " + output.HomePath(file)
	}
	what := []string{
		fmt.Sprintf("have it sign each commit with %s, and believe signatures of %s:", output.HomePath(file), email),
		"git config --global: gpg.format, user.signingkey, commit.gpgsign, gpg.ssh.allowedSignersFile",
		"a line in " + output.HomePath(signers),
	}
	if signing != "" {
		what = append(what, fmt.Sprintf("git signs with another key so far: %s", plain.Line(signing)))
	}
	yes, err := s.offer(ctx, title, done, what...)
	if err != nil || !yes {
		return err
	}
	if err := s.setGit(ctx, file, signers, line, known); err != nil {
		s.trouble(err)
		return nil
	}
	s.changed = true
	s.say("  git signs with %s", output.HomePath(file))
	return nil
}

// setGit changes git's configuration. Ctrl-C does not reach its commands. commit.gpgsign comes last, so that git never signs
// without the other settings.
func (s *conversation) setGit(ctx context.Context, file, signers, line string, known bool) error {
	if err := s.writeKey(); err != nil {
		return err
	}
	if !known {
		if err := files.AppendLine(signers, line); err != nil {
			return err
		}
	}
	for _, kv := range [][2]string{
		{"gpg.format", "ssh"}, {"gpg.ssh.allowedSignersFile", output.HomePath(signers)}, {"user.signingkey", file}, {"commit.gpgsign", "true"},
	} {
		said, err := probe.Run(context.WithoutCancel(ctx), "git", "config", "--global", kv[0], kv[1])
		if err == nil && said.Status != nil {
			err = fmt.Errorf("git config %s: %s", kv[0], said.Err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// gitSetting returns a setting of git for all repositories, or "".
func gitSetting(ctx context.Context, name string) string {
	said, err := probe.Run(ctx, "git", "config", "--global", "--get", name)
	if err != nil || said.Status != nil {
		return ""
	}
	return strings.TrimSpace(said.Out)
}

// hasSigner tells whether a file of allowed signers has this address with this key.
func hasSigner(file, email string, pub ssh.PublicKey) bool {
	b, err := files.Read(file)
	if err != nil {
		return false
	}
	blob := strings.Fields(string(ssh.MarshalAuthorizedKey(pub)))[1]
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) > 2 && words[0] == email && strings.Contains(line, blob) {
			return true
		}
	}
	return false
}
