// Package newkey makes key pairs on tokens, for commands that talk to a person: it reads the name of the new key, shows
// that the token takes its time, and prints the public half. It replaces no key.
package newkey

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/keygen"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// The bounds of the name of a new key, in bytes.
const (
	maxLabel = 64
	maxKeyID = 32
)

// URI returns the URI of a new key: a token from text, and the label and the hexadecimal ID of the flags, unless they are
// "". Errors are mistakes on the command line.
func URI(text, label, hexID string) (*pkcs11uri.URI, error) {
	u, err := named.Parse(text)
	if err != nil {
		return nil, err
	}
	defer u.Wipe() // the URI has no PIN, or is refused
	if id := pkcs11uri.MeantID(u.ID); id != nil && !pkcs11uri.SpellsID(text, u.ID) {
		return nil, exit.WithHint(
			fmt.Errorf("the id of the URI has digits without percent signs, and means the bytes %x", u.ID),
			fmt.Sprintf("did you mean id=%s? To have those bytes, write id=%s", pkcs11uri.FormatID(id), pkcs11uri.FormatID(u.ID)),
		)
	}
	if u.PIN() != nil || u.PINSource != nil {
		return nil, errors.New("the URI names a PIN: leave it out, as the agent asks for the PIN or takes it from a pin-source of the configuration")
	}
	if label != "" {
		if u.Object != nil && *u.Object != label {
			return nil, errors.New("--label and the object of the URI differ")
		}
		u.Object = &label
	}
	if hexID != "" {
		id, err := hex.DecodeString(hexID)
		if err != nil {
			return nil, fmt.Errorf("--id %q is not hexadecimal, such as 01", hexID)
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

// Make makes a key on the token that u selects. The caller of the token is this process, with its user and terminal. Without
// a PIN, the token's asker asks for it. See [token.Store.Generate] for the errors.
func Make(ctx context.Context, store *token.Store, u *pkcs11uri.URI, kind keygen.Kind, pin *secret.Secret) (*token.NewKey, error) {
	return store.Generate((&request.Caller{Peer: peer.Self()}).Context(ctx), u, kind, pin)
}

// Print prints the URI of a new key, and its line for authorized_keys. On stderr it notes what the token does not say of
// the key's origin.
func Print(out, stderr io.Writer, k *token.NewKey) error {
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

// Progress tells a person that a token makes a key: one line, and on a terminal the seconds.
type Progress struct {
	ctx      context.Context // of the command: it ends when a person interrupts the command
	w        io.Writer
	terminal bool
	kind     keygen.Kind
}

// NewProgress returns a Progress that writes to w. ctx ends when a person interrupts the command.
func NewProgress(ctx context.Context, w io.Writer, kind keygen.Kind) *Progress {
	return &Progress{ctx: ctx, w: w, terminal: output.IsTerminal(w), kind: kind}
}

// Begin is called when the token begins, as [token.Options] Generating. It returns the function to call at the end.
func (p *Progress) Begin(id wire.TokenID) (done func()) {
	end := make(chan struct{})
	var shown sync.WaitGroup
	shown.Go(func() { p.show(id, end) })
	return func() {
		close(end)
		shown.Wait()
	}
}

func (p *Progress) show(id wire.TokenID, end <-chan struct{}) {
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
			fmt.Fprintln(p.w, "interrupted: the key is removed as soon as the token has made it; interrupt again to stop waiting")
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
