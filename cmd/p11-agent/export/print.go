package export

import (
	"cmp"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
)

// Overview prints the keys, with the files that Write would write, and the ways to export them.
func Overview(out io.Writer, keys []Key, dir string) error {
	var b strings.Builder
	for _, e := range keys {
		fmt.Fprintf(&b, "%s\n    %s %s\n    would be written to %s", e.Token.URI(), e.Public.Type(), ssh.FingerprintSHA256(e.Public), output.HomePath(filepath.Join(dir, e.Name+".pub")))
		if same, err := Holds(filepath.Join(dir, e.Name+".pub"), e.Public); err == nil {
			b.WriteString(map[bool]string{true: ", where it is already", false: ", where another key is (--force replaces it)"}[same])
		}
		b.WriteString("\n")
		for _, file := range e.Certificates {
			fmt.Fprintf(&b, "    has the certificate %s\n", output.HomePath(file))
		}
	}
	b.WriteString(`
Nothing was written. What can be done, for the keys that URIs name or for all:
    p11-agent export pkcs11:                            write the files
    p11-agent export --ssh-config HOST 'pkcs11:...'     and print a block for ~/.ssh/config
    p11-agent export --git 'pkcs11:...'                 and print the commands that have git sign
    p11-agent export --allowed-signers EMAIL            print lines for git's file of allowed signers
`)
	_, err := io.WriteString(out, b.String())
	return err
}

// Signers prints lines for a file of allowed signers. The lines count for all namespaces if namespace is "".
func Signers(out io.Writer, keys []Key, principal, namespace string) error {
	options := ""
	if namespace != "" {
		options = fmt.Sprintf(" namespaces=%q", namespace)
	}
	for _, e := range keys {
		if _, err := fmt.Fprintf(out, "%s%s %s", principal, options, e.Line); err != nil {
			return err
		}
	}
	return nil
}

// SSHConfig prints a block of ssh_config(5) that makes ssh offer these keys and no others. It names the agent's
// socket, unless socket is "". Without hosts the block is for all hosts.
func SSHConfig(out io.Writer, keys []Key, dir string, hosts []string, socket string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Host %s\n", cmp.Or(strings.Join(hosts, " "), "*"))
	for _, e := range keys {
		fmt.Fprintf(&b, "    IdentityFile %s\n", sshPath(filepath.Join(dir, e.Name+".pub")))
		for _, file := range e.Certificates {
			fmt.Fprintf(&b, "    CertificateFile %s\n", sshPath(file))
		}
	}
	b.WriteString("    IdentitiesOnly yes\n")
	if socket != "" {
		fmt.Fprintf(&b, "    %s\n", paths.IdentityAgent(socket))
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// sshPath writes a path for ssh_config(5), in which percent signs begin tokens.
func sshPath(path string) string {
	path = strings.ReplaceAll(output.HomePath(path), "%", "%%")
	if strings.ContainsAny(path, " \t") {
		return `"` + path + `"`
	}
	return path
}

// Git prints commands for a shell that make git sign with the key. They change nothing unless all of them can work,
// and may run again. The parentheses make the shell read all of them before it runs one.
func Git(out io.Writer, e Key, dir string) error {
	_, err := fmt.Fprintf(out, `(
set -eu
# Your address names you in signatures:
email=$(git config user.email) || { echo 'git does not know your address. First: git config --global user.email YOU@EXAMPLE.ORG' >&2; exit 1; }
# Whose signatures are believed when git verifies, beginning with this one:
signer=$(p11-agent export --allowed-signers "$email" --namespace git %[2]s)
signers=$(git config --global --type=path gpg.ssh.allowedSignersFile) || { signers=$HOME/.config/git/allowed_signers; git config --global gpg.ssh.allowedSignersFile '~/.config/git/allowed_signers'; }
mkdir -p "$(dirname "$signers")"
grep -qxF -e "$signer" "$signers" 2>/dev/null || printf '%%s\n' "$signer" >>"$signers"
git config --global gpg.format ssh
git config --global user.signingkey %[1]s
# Sign without being told to each time:
git config --global commit.gpgsign true
)
`, output.ShellWord(filepath.Join(dir, e.Name+".pub")), output.ShellWord(e.Token.URI()))
	return err
}

// principalPattern accepts lists of patterns, too (ssh-keygen(1), ALLOWED SIGNERS).
var principalPattern = regexp.MustCompile(`^[^\s"#\\[:cntrl:]][^\s"\\[:cntrl:]]*$`)

// IsPrincipal tells whether a name can stand for a signer in a file of allowed signers.
func IsPrincipal(name string) bool { return principalPattern.MatchString(name) }

var (
	hostPattern      = regexp.MustCompile(`^!?[A-Za-z0-9._*?:%\[\]-]+$`)
	namespacePattern = regexp.MustCompile(`^[A-Za-z0-9.@_*?,!-]+$`)
)

// IsHost tells whether a text can be a pattern of host names in ssh_config(5).
func IsHost(text string) bool { return hostPattern.MatchString(text) }

// IsNamespace tells whether a text can be a list of namespaces in a file of allowed signers.
func IsNamespace(text string) bool { return namespacePattern.MatchString(text) }
