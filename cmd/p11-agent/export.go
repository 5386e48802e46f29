package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/named"
	"p11-agent/agent/certdir"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
)

type exportOptions struct {
	dir            string
	force          bool
	sshConfig, git bool
	signers        bool // principal was given
	principal      string
	namespace      string
}

func newExportCommand(g *globals) *cobra.Command {
	o := new(exportOptions)
	cmd := &cobra.Command{
		Use:   "export [flags] [URI...] [HOST...]",
		Short: "Write public keys into files, and say what ssh and git need to use them",
		Long: `Write the public halves of keys into files, NAME.pub in ~/.ssh, by which ssh and
git know which key of the agent is meant. Keys are those that pkcs11: URIs or the
labels of tokens name, or all that the agent offers, be their token there or only
remembered. With neither URIs nor flags it says what there is, and writes nothing.
With --ssh-config a word that is no URI is a HOST.

    p11-agent export pkcs11:                         write a file for each key
    p11-agent export --ssh-config bastion 'pkcs11:token=Work' >>~/.ssh/config
    p11-agent export --git 'pkcs11:token=Work;id=%02' | sh
    p11-agent export --allowed-signers me@example.org --namespace git

It needs no running agent, and never asks for a PIN.`,
		ValidArgsFunction: completeURIs(g, true, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.signers = cmd.Flags().Changed("allowed-signers")
			return runExport(cmd.Context(), g, o, args, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "", "write the files into `DIR` (default ~/.ssh)")
	f.BoolVar(&o.force, "force", false, "replace a file that has another key")
	f.BoolVar(&o.sshConfig, "ssh-config", false, "write the files, and print a block for ~/.ssh/config; it is for the HOSTs, or for all")
	f.BoolVar(&o.git, "git", false, "write the file of one key, and print the commands that have git sign with it")
	f.StringVar(&o.principal, "allowed-signers", "", "print lines for the file of allowed signers, for `PRINCIPAL`, such as an e-mail address; no files are written")
	f.StringVar(&o.namespace, "namespace", "", "have these lines count for `NAMESPACE` only, such as git")
	return cmd
}

// An exported key is what is known of one that is to be written.
type exported struct {
	key  *token.Key
	name string // of its file, without ".pub"
	line string // of the file
	pub  ssh.PublicKey
	// certificates are the files in the directory of certificates that are for it.
	certificates []string
}

func runExport(ctx context.Context, g *globals, o *exportOptions, args []string, out, stderr io.Writer) error {
	uris, hosts, err := o.arguments(args)
	if err != nil {
		return err
	}
	if len(args) > 0 {
		named.NoteUnquoted(stderr, args[len(args)-1])
	}
	defer func() {
		for _, u := range uris {
			u.Wipe()
		}
	}()
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	b := backend.Look(ctx, c, backend.Options{Log: output.NewLog(stderr, slog.LevelError)})
	defer b.Close()
	keys, err := exportable(c, b.Store, uris)
	if err != nil {
		return aboutHosts(err, args)
	}
	dir := cmp.Or(paths.ExpandHome(o.dir), filepath.Join(os.Getenv("HOME"), ".ssh"))
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	switch {
	case o.overview(uris):
		return printExportable(out, keys, dir)
	case o.signers:
		return printSigners(out, keys, o)
	case o.git && len(keys) > 1:
		return exit.Usage(fmt.Errorf("git signs with one key, and these are %d: name it by its URI, such as %s", len(keys), output.ShellWord(keys[0].key.URI())))
	case strings.ContainsAny(dir, "\"'\n$"):
		return exit.Usage(fmt.Errorf("the name of the directory %q has characters that ssh's and git's configuration cannot have", dir))
	}
	if err := writeKeys(stderr, keys, dir, o.force); err != nil {
		return err
	}
	switch {
	case o.sshConfig:
		return printSSHConfig(ctx, out, keys, dir, hosts)
	case o.git:
		return printGit(out, keys[0], dir)
	}
	return nil
}

// aboutHosts adds to the error for a label that no token has that it may be a host.
func aboutHosts(err error, args []string) error {
	hint := exit.Hint(err)
	i := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(err.Error(), "pkcs11:token="+a+":") })
	if hint == "" || i < 0 {
		return err
	}
	return exit.Usage(exit.WithHint(
		fmt.Errorf("no token with a key has the label %[1]q; %[1]q is no pkcs11: URI, and hosts go with --ssh-config", args[i]), hint,
	))
}

// overview tells whether nothing was said of what is to be done.
func (o *exportOptions) overview(uris []*pkcs11uri.URI) bool {
	return len(uris) == 0 && o.dir == "" && !o.force && !o.sshConfig && !o.git && !o.signers
}

var (
	hostPattern      = regexp.MustCompile(`^!?[A-Za-z0-9._*?:%\[\]-]+$`)
	namespacePattern = regexp.MustCompile(`^[A-Za-z0-9.@_*?,!-]+$`)
	// A principal is a list of patterns as well (ssh-keygen(1), ALLOWED SIGNERS).
	principalPattern = regexp.MustCompile(`^[^\s"#\\[:cntrl:]][^\s"\\[:cntrl:]]*$`)
)

// arguments sorts what is not a flag.
func (o *exportOptions) arguments(args []string) (uris []*pkcs11uri.URI, hosts []string, err error) {
	modes := 0
	for _, set := range []bool{o.sshConfig, o.git, o.signers} {
		if set {
			modes++
		}
	}
	switch {
	case modes > 1:
		return nil, nil, exit.Usage(errors.New("--ssh-config, --git and --allowed-signers exclude each other"))
	case o.namespace != "" && !o.signers:
		return nil, nil, exit.Usage(errors.New("--namespace goes with --allowed-signers"))
	case o.namespace != "" && !namespacePattern.MatchString(o.namespace):
		return nil, nil, exit.Usage(fmt.Errorf("%q is no namespace", o.namespace))
	case o.signers && o.principal == "":
		return nil, nil, exit.Usage(errors.New("--allowed-signers wants the name of the signer: an e-mail address, as \"git config user.email\" prints it once it is set"))
	case o.signers && !principalPattern.MatchString(o.principal):
		return nil, nil, exit.Usage(fmt.Errorf("%q is no principal: it is a name without blanks, such as an e-mail address", o.principal))
	case o.signers && (o.dir != "" || o.force):
		return nil, nil, exit.Usage(errors.New("--allowed-signers writes no files: --dir and --force mean nothing"))
	}
	for _, a := range args {
		if o.sshConfig && !pkcs11uri.IsURI([]byte(a)) {
			if !hostPattern.MatchString(a) {
				return nil, nil, exit.Usage(fmt.Errorf("%q is no name of a host", a))
			}
			hosts = append(hosts, a)
			continue
		}
		u, err := named.Parse(a)
		if err != nil {
			return nil, nil, err
		}
		uris = append(uris, u)
	}
	return uris, hosts, nil
}

// exportable returns the keys that the URIs match, or those that the agent offers;
// each once, however many tokens it is on.
func exportable(c *config.File, store *token.Store, uris []*pkcs11uri.URI) ([]exported, error) {
	all := slices.Concat(store.Keys(), store.Away())
	var keys []*token.Key
	if len(uris) == 0 {
		auto := c.Automatic()
		for _, k := range all {
			if ok, _ := offered(k, auto, ""); ok {
				keys = append(keys, k)
			}
		}
		if len(keys) == 0 {
			return nil, errors.New(`there is no key to export: "p11-agent list -v" says what there is, "p11-agent doctor" why`)
		}
	}
	for _, u := range uris {
		sel, n := token.NewSelector(u), len(keys)
		for _, k := range all {
			if sel.Match(k) && (k.Unfit() == "" || !config.KeySelection{Selector: sel}.Broad()) {
				keys = append(keys, k)
			}
		}
		if len(keys) == n {
			return nil, named.WithSuggestions(fmt.Errorf("%v: %w", u, token.ErrNoMatch), store, u)
		}
	}
	certificates, err := certificatesOf(c)
	if err != nil {
		return nil, err
	}
	name := c.KeyName
	var list []exported
	seen := make(map[string]bool)
	for _, k := range keys {
		pub, err := ssh.NewPublicKey(k.Public())
		if err != nil || seen[string(pub.Marshal())] {
			continue
		}
		seen[string(pub.Marshal())] = true
		list = append(list, exported{
			key: k, pub: pub, name: fileName(cmp.Or(name(k), k.Label())),
			line:         strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))) + " " + cmp.Or(name(k), backend.Comment(k)) + "\n",
			certificates: certificates[string(pub.Marshal())],
		})
	}
	tellApart(list)
	return list, nil
}

// tellApart gives keys that would have the same file the names of their tokens, and
// their IDs where that is not enough.
func tellApart(list []exported) {
	for _, longer := range []func(exported) string{
		func(e exported) string { return fileName(e.key.Token().Label + "-" + e.name) },
		func(e exported) string { return fileName(e.name + "-" + hex.EncodeToString(e.key.ID())) },
		func(e exported) string {
			print := ssh.FingerprintSHA256(e.pub)
			return fileName(e.name + "-" + strings.TrimPrefix(print, "SHA256:")[:8])
		},
	} {
		count := make(map[string]int)
		for _, e := range list {
			count[strings.ToLower(e.name)]++
		}
		for i, e := range list {
			if count[strings.ToLower(e.name)] > 1 {
				list[i].name = longer(e)
			}
		}
	}
}

// maxFileName leaves room for ".pub" and for what makes a temporary file of it.
const maxFileName = 100

// unsafe is what a file's name does not need.
var unsafe = regexp.MustCompile(`[^A-Za-z0-9._@+]+`)

// fileName makes a name that is safe in shells, ssh's configuration and file
// systems.
func fileName(s string) string {
	name := unsafe.ReplaceAllString(s, "-")
	name = strings.TrimSuffix(name[:min(len(name), maxFileName)], ".pub")
	return cmp.Or(strings.Trim(name, ".-"), "token-key")
}

// certificatesOf returns the files of certificates by the key that they certify.
func certificatesOf(c *config.File) (map[string][]string, error) {
	if c.Certificates == "" {
		return nil, nil
	}
	files, err := certdir.Read(c.Certificates)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := make(map[string][]string)
	for _, f := range files {
		if f.Certificate != nil {
			wire := string(f.Certificate.Key.Marshal())
			all[wire] = append(all[wire], f.Path)
		}
	}
	return all, nil
}

// printExportable says what there is, and what can be done with it.
func printExportable(out io.Writer, keys []exported, dir string) error {
	var b strings.Builder
	for _, e := range keys {
		fmt.Fprintf(&b, "%s\n    %s %s\n    would be written to %s", e.key.URI(), e.pub.Type(), ssh.FingerprintSHA256(e.pub), output.HomePath(filepath.Join(dir, e.name+".pub")))
		if same, err := sameKey(filepath.Join(dir, e.name+".pub"), e.pub); err == nil {
			b.WriteString(map[bool]string{true: ", where it is already", false: ", where another key is (--force replaces it)"}[same])
		}
		b.WriteString("\n")
		for _, file := range e.certificates {
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

func printSigners(out io.Writer, keys []exported, o *exportOptions) error {
	options := ""
	if o.namespace != "" {
		options = fmt.Sprintf(" namespaces=%q", o.namespace)
	}
	for _, e := range keys {
		if _, err := fmt.Fprintf(out, "%s%s %s", o.principal, options, e.line); err != nil {
			return err
		}
	}
	return nil
}

// printSSHConfig prints a block that has ssh offer these keys and no others.
func printSSHConfig(ctx context.Context, out io.Writer, keys []exported, dir string, hosts []string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Host %s\n", cmp.Or(strings.Join(hosts, " "), "*"))
	for _, e := range keys {
		fmt.Fprintf(&b, "    IdentityFile %s\n", sshPath(filepath.Join(dir, e.name+".pub")))
		for _, file := range e.certificates {
			fmt.Fprintf(&b, "    CertificateFile %s\n", sshPath(file))
		}
	}
	b.WriteString("    IdentitiesOnly yes\n")
	socket := paths.UserSocket()
	// An agent elsewhere is meant when it is the one that is used here.
	if path := os.Getenv(paths.SocketVariable); path != "" && path != socket {
		if a := askAgent(ctx, path); a.err == nil && a.own {
			socket = path
		}
	}
	if socket != "" {
		fmt.Fprintf(&b, "    %s\n", identityAgent(socket))
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// sshPath writes a path for ssh_config(5): percent signs begin tokens.
func sshPath(path string) string {
	path = strings.ReplaceAll(output.HomePath(path), "%", "%%")
	if strings.ContainsAny(path, " \t") {
		return `"` + path + `"`
	}
	return path
}

// printGit prints commands that change nothing unless all of them can work, and that may
// run again. A shell reads all of them before it runs
// any, as they are in parentheses.
func printGit(out io.Writer, e exported, dir string) error {
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
`, output.ShellWord(filepath.Join(dir, e.name+".pub")), output.ShellWord(e.key.URI()))
	return err
}

// writeKeys writes the files, and says so. All are looked at before the first is
// written.
func writeKeys(stderr io.Writer, keys []exported, dir string, force bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cannotWrite(dir, err)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return cannotWrite(dir, err)
	}
	var wrong []error
	for _, e := range keys {
		file := filepath.Join(dir, e.name+".pub")
		if err := mayWrite(file, e, force); err != nil {
			wrong = append(wrong, err)
		}
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	for _, e := range keys {
		file := filepath.Join(dir, e.name+".pub")
		if same, _ := sameKey(file, e.pub); same {
			fmt.Fprintf(stderr, "%s is there already\n", output.HomePath(file))
			continue
		}
		write := files.Create
		if force {
			write = files.Overwrite
		}
		if err := write(file, []byte(e.line), 0o644); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return &existsError{file: file, uri: e.key.URI()}
			}
			return cannotWrite(file, err)
		}
		fmt.Fprintf(stderr, "wrote %s\n", output.HomePath(file))
	}
	return nil
}

// mayWrite tells what is wrong with a file that is there.
func mayWrite(file string, e exported, force bool) error {
	same, err := sameKey(file, e.pub)
	switch st, serr := os.Stat(file); {
	case errors.Is(err, fs.ErrNotExist), err == nil && (same || force):
		return nil
	case err == nil:
		return &existsError{file: file, uri: e.key.URI()}
	case serr == nil && st.IsDir():
		return cannotWrite(file, errors.New("it is a directory"))
	case force && errors.Is(err, fs.ErrPermission) && serr == nil:
		return nil // it is replaced, not read
	default:
		return cannotWrite(file, err)
	}
}

// cannotWrite says why a file or directory cannot be written, and what else can be done.
func cannotWrite(path string, err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		path, err = p.Path, p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		err = l.Err
	}
	return exit.WithHint(fmt.Errorf("cannot write %s: %w", path, err), "--dir names another directory")
}

// existsError says that a file has something else in it.
type existsError struct{ file, uri string }

func (e *existsError) Error() string {
	return fmt.Sprintf("%s has something else in it, and is left as it is", e.file)
}

func (e *existsError) Hint() string {
	return fmt.Sprintf("--force replaces it; or give the key another name in the configuration:\n[[key]]\nuri = %q\nname = \"...\"", e.uri)
}

// sameKey tells whether a file has this public key. The error is that of reading the
// file.
func sameKey(file string, pub ssh.PublicKey) (bool, error) {
	b, err := files.ReadSmall(file)
	if err != nil {
		return false, err
	}
	there, _, _, _, perr := ssh.ParseAuthorizedKey(b)
	return perr == nil && bytes.Equal(there.Marshal(), pub.Marshal()), nil
}
