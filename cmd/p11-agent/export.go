package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/completion"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/export"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
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
		ValidArgsFunction: completion.URIs(&g.config, true, 0),
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
	keys, err := export.Keys(c, b.Store, uris, backend.Comment)
	if err != nil {
		return aboutHosts(err, args)
	}
	dir := cmp.Or(paths.ExpandHome(o.dir), filepath.Join(os.Getenv("HOME"), ".ssh"))
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	switch {
	case o.overview(uris):
		return export.Overview(out, keys, dir)
	case o.signers:
		return export.Signers(out, keys, o.principal, o.namespace)
	case o.git && len(keys) > 1:
		return exit.Usage(fmt.Errorf("git signs with one key, and these are %d: name it by its URI, such as %s", len(keys), output.ShellWord(keys[0].Token.URI())))
	case strings.ContainsAny(dir, "\"'\n$"):
		return exit.Usage(fmt.Errorf("the name of the directory %q has characters that ssh's and git's configuration cannot have", dir))
	}
	if err := export.Write(stderr, keys, dir, o.force); err != nil {
		return err
	}
	switch {
	case o.sshConfig:
		return export.SSHConfig(out, keys, dir, hosts, probe.UsedSocket(ctx))
	case o.git:
		return export.Git(out, keys[0], dir)
	}
	return nil
}

// aboutHosts says for a label that no token has that it may be a host.
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

// overview tells whether the command line says nothing about what to do.
func (o *exportOptions) overview(uris []*pkcs11uri.URI) bool {
	return len(uris) == 0 && o.dir == "" && !o.force && !o.sshConfig && !o.git && !o.signers
}

// arguments splits the arguments into URIs and hosts, and checks the flags. The caller wipes the URIs.
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
	case o.namespace != "" && !export.IsNamespace(o.namespace):
		return nil, nil, exit.Usage(fmt.Errorf("invalid namespace %q: use letters, digits and . @ _ - * ? , ! only", o.namespace))
	case o.signers && o.principal == "":
		return nil, nil, exit.Usage(errors.New("--allowed-signers wants the name of the signer: an e-mail address, as \"git config user.email\" prints it once it is set"))
	case o.signers && !export.IsPrincipal(o.principal):
		return nil, nil, exit.Usage(fmt.Errorf("invalid principal %q: use a name without blanks, such as an e-mail address", o.principal))
	case o.signers && (o.dir != "" || o.force):
		return nil, nil, exit.Usage(errors.New("--allowed-signers writes no files: --dir and --force mean nothing"))
	}
	for _, a := range args {
		if o.sshConfig && !pkcs11uri.IsURI([]byte(a)) {
			if !export.IsHost(a) {
				return nil, nil, exit.Usage(fmt.Errorf("invalid host name %q", a))
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
