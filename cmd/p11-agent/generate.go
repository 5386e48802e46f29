package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Bounds of what a new key is called, in bytes.
const (
	maxLabel = 64
	maxKeyID = 32
)

type generateOptions struct {
	kind, label, id string
}

func newGenerateCommand(g *globals) *cobra.Command {
	o := new(generateOptions)
	cmd := &cobra.Command{
		Use:   "generate [flags] URI",
		Short: "Make a new key on a token",
		Long: `Make a new key pair on the token that a pkcs11: URI or a label names, and print its URI
and its public key as a line for authorized_keys. The private key can neither be read nor
leave the token. Nothing on the token is ever replaced.

It needs no running agent. The PIN is asked for with pinentry, or comes from a
pin-source of the configuration.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return exit.Usage(errors.New("one URI has to be given, which names the token, such as pkcs11:token=Work, or the label of the token"))
			}
			return nil
		},
		ValidArgsFunction: completeURIs(g, false, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runGenerate(cmd.Context(), g, o, args[0], cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.kind, "type", string(token.ECDSAP256), "make a key of this `KIND`: "+kindNames())
	f.StringVar(&o.label, "label", "", "call the key `TEXT`; the same as object in the URI")
	f.StringVar(&o.id, "id", "", "give it this ID, in `HEX`; the same as id in the URI (default one that is free)")
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(kindList(), cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	return cmd
}

func kindList() []string {
	var all []string
	for _, k := range token.KeyKinds {
		all = append(all, string(k))
	}
	return all
}

func kindNames() string { return strings.Join(kindList(), ", ") }

// uri puts the URI and the flags together.
func (o *generateOptions) uri(text string) (*pkcs11uri.URI, error) {
	u, err := named.Parse(text)
	if err != nil {
		return nil, err
	}
	defer u.Wipe() // there is to be none
	if id := pkcs11uri.MeantID(u.ID); id != nil && !pkcs11uri.SpellsID(text, u.ID) {
		return nil, exit.WithHint(
			fmt.Errorf("the id of the URI has digits without percent signs, and means the bytes %x", u.ID),
			fmt.Sprintf("did you mean id=%s? To have those bytes, write id=%s", pkcs11uri.FormatID(id), pkcs11uri.FormatID(u.ID)),
		)
	}
	if u.PIN() != nil || u.PINSource != nil {
		return nil, errors.New("the PIN is asked for, or comes from a pin-source in the configuration, and cannot be in this URI")
	}
	if o.label != "" {
		if u.Object != nil && *u.Object != o.label {
			return nil, errors.New("--label and the object of the URI differ")
		}
		u.Object = &o.label
	}
	if o.id != "" {
		id, err := hex.DecodeString(o.id)
		if err != nil {
			return nil, fmt.Errorf("--id %q is not hexadecimal, such as 01", o.id)
		}
		if u.ID != nil && !slices.Equal(u.ID, id) {
			return nil, errors.New("--id and the id of the URI differ")
		}
		u.ID = id
	}
	if u.Object != nil && (len(*u.Object) > maxLabel || !plain.Prints(*u.Object)) {
		return nil, fmt.Errorf("a label has %d bytes at the most, all of them printable", maxLabel)
	}
	if len(u.ID) > maxKeyID {
		return nil, fmt.Errorf("an ID has %d bytes at the most", maxKeyID)
	}
	return u, nil
}

func runGenerate(ctx context.Context, g *globals, o *generateOptions, text string, out, stderr io.Writer) error {
	kind := token.KeyKind(o.kind)
	if !slices.Contains(token.KeyKinds, kind) {
		return exit.Usage(fmt.Errorf("there is no type %q: it can be %s", o.kind, kindNames()))
	}
	u, err := o.uri(text)
	if err != nil {
		return exit.Usage(err)
	}
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	named.NoteUnquoted(stderr, text)
	// Whoever interrupts this is to find no half-made key, and who does so twice does
	// not want to wait for that.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()

	log := output.NewLog(stderr, slog.LevelError)
	show := &progress{ctx: ctx, w: stderr, terminal: output.IsTerminal(stderr), kind: kind}
	// A module that does not answer may be another one than that of the token.
	b := backend.Look(ctx, c, backend.Options{
		Log: log, PINs: terminalAsker{newAsker(c, os.Getenv, os.Environ(), log)}, Generating: show.begin,
	})
	defer b.Close()
	// The PIN is asked for as for a client, which this is.
	k, err := b.Store.Generate((&request.Caller{Peer: peer.Self()}).Context(ctx), u, kind, nil)
	//nolint:errorlint // wrapped, it says what became of the key
	if err == context.Canceled {
		err = errors.New("interrupted: no key was made")
	}
	if err != nil {
		return named.WithSuggestions(err, b.Store, u)
	}
	tellAgent(ctx, k.URI())
	return printGenerated(out, stderr, k)
}

// tellAgent has the running agent, if there is one, look for a key that is new.
func tellAgent(ctx context.Context, uri string) {
	if a, err := status.Find(ctx, "", uri); err == nil {
		_ = a.Close() // never matters: the key is there
	}
}

// printGenerated prints what others need of a new key, and what the token does not
// say of it as others do.
func printGenerated(out, stderr io.Writer, k *token.NewKey) error {
	pub, err := ssh.NewPublicKey(k.Public())
	if err != nil {
		return fmt.Errorf("the key %v was made, but SSH has no such keys: %w", k, err)
	}
	for _, say := range []struct {
		is   wire.Tri
		what string
	}{
		{k.Local, "was made on it (CKA_LOCAL)"},
		{k.AlwaysSensitive, "was always sensitive (CKA_ALWAYS_SENSITIVE)"},
		{k.NeverExtractable, "could never be extracted (CKA_NEVER_EXTRACTABLE)"},
	} {
		if say.is != wire.True {
			fmt.Fprintf(stderr, "note: the token does not say that the key %s\n", say.what)
		}
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
	_, err = fmt.Fprintf(out, "%s\n%s %s\n", k.URI(), line, cmp.Or(k.Label(), k.URI()))
	return err
}

// progress tells a person that a token takes its time: one line, and on a terminal
// the seconds.
type progress struct {
	ctx      context.Context // of the command: it ends when that is interrupted
	w        io.Writer
	terminal bool
	kind     token.KeyKind
}

// begin is called when the token begins. The result is called when it has finished.
func (p *progress) begin(id wire.TokenID) (done func()) {
	end := make(chan struct{})
	var shown sync.WaitGroup
	shown.Go(func() { p.show(id, end) })
	return func() {
		close(end)
		shown.Wait()
	}
}

func (p *progress) show(id wire.TokenID, end <-chan struct{}) {
	const every = time.Second
	line := fmt.Sprintf("token %q makes a key of type %s, which may take minutes", id.Label, p.kind)
	interrupted := p.ctx.Done()
	tick := time.NewTicker(every)
	defer tick.Stop()
	seconds := 0
	for {
		select {
		case <-end:
			if seconds > 0 && p.terminal {
				fmt.Fprintln(p.w)
			}
			return
		case <-interrupted:
			interrupted = nil
			if seconds > 0 && p.terminal {
				fmt.Fprintln(p.w)
			}
			fmt.Fprintln(p.w, "it is to be taken away again as soon as the token has made it; interrupt once more not to wait for that")
		case <-tick.C:
			seconds++
			switch {
			case p.terminal:
				fmt.Fprintf(p.w, "\r%s: %d s", line, seconds)
			case seconds == 1:
				fmt.Fprintln(p.w, line)
			}
		}
	}
}
