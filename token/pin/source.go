package pin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// commandTimeout is how long a pin-source command may take.
const commandTimeout = time.Minute

// A Source is where the PIN for a key comes from when no person is asked.
type Source interface {
	// Check fails when the PIN must not go to the token as it is now.
	Check() error
	// Read returns the PIN, which the caller wipes, and its Origin.
	Read(ctx context.Context) (*secret.Secret, Origin, error)
	// Bind notes that the PIN is for this token alone, before the token gets it. It fails when
	// the PIN is for another token.
	Bind() error
}

// fromSource logs in with a PIN that the configuration or a client names. No person judges a
// failure. So a PIN that was refused once is never tried again, and the last try is left to a
// person. The PIN goes to no other token and module than those it was used for first.
func (l *Login) fromSource(ctx context.Context, tries Tries) error {
	if tries == TriesLast {
		return l.refused(tries, errors.New(
			"one try is left, and a configured PIN must not use it up: log in to the token by hand with another program once"))
	}
	if err := l.Source.Check(); err != nil {
		return l.refused(tries, err)
	}
	pin, origin, err := l.Source.Read(ctx)
	if err != nil {
		return fmt.Errorf("the PIN for token %q: %w", l.Token.Label, err)
	}
	defer pin.Wipe()
	origin.token = l.Token
	if l.Refusals.has(origin, pin) {
		return l.refused(tries, fmt.Errorf("%s was refused before, and is not tried again until %s", origin.What, origin.Until))
	}
	if err := l.Source.Bind(); err != nil {
		return l.refused(tries, err)
	}
	err = l.Target.Try(ctx, Trial{PIN: pin})
	if err == nil {
		l.Target.Proved(false)
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok && e.Tried {
		l.Refusals.add(origin, pin)
		e.Err = fmt.Errorf("%s: %w", origin.What, e.Err)
	}
	return err
}

// CheckSource fails when the pin-source of a URI cannot be used. It reads a file and does not
// run a command. A URI without a pin-source is fine.
func CheckSource(u *pkcs11uri.URI) error {
	if u.PINSource == nil || u.PINSource.Kind == pkcs11uri.PINCommand {
		return nil
	}
	path, err := SourcePath(u.PINSource)
	if err != nil {
		return err
	}
	pin, _, err := filePIN(path, u.PINSource.Kind == pkcs11uri.PINCredential)
	pin.Wipe()
	return err
}

// CheckURI fails when a URI has a PIN or a pin-source and does not name one token, by its label
// or serial number.
func CheckURI(u *pkcs11uri.URI) error {
	if u.PIN() == nil && u.PINSource == nil || u.NamesToken() {
		return nil
	}
	return errors.New("a PIN is for one token, and this URI names none: add the token attribute, and the serial attribute where several tokens have one label")
}

// CheckClientURI fails when a client may not name the source of a URI.
func CheckClientURI(u *pkcs11uri.URI) error {
	if u.PINSource != nil && u.PINSource.Kind != pkcs11uri.PINFile {
		return fmt.Errorf("a pin-source that begins with %q counts in the configuration file only", u.PINSource)
	}
	return CheckURI(u)
}

// SourcePath returns the file that a source of any kind but PINCommand names.
func SourcePath(src *pkcs11uri.PINSource) (string, error) {
	if src.Kind != pkcs11uri.PINCredential {
		return src.Path(), nil
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("pin-source: there are no credentials (CREDENTIALS_DIRECTORY is not set): the service needs LoadCredential=%s:/path", src.Credential())
	}
	return filepath.Join(dir, src.Credential()), nil
}

// ReadSource gets the PIN of a source from its file or command.
func ReadSource(ctx context.Context, src *pkcs11uri.PINSource) (*secret.Secret, Origin, error) {
	if src.Kind == pkcs11uri.PINCommand {
		pin, err := commandPIN(ctx, src.Command())
		return pin, Origin{
			What: "the PIN of the configured command", Until: "the command changes or the agent is restarted", state: src.Command(),
		}, err
	}
	path, err := SourcePath(src)
	if err != nil {
		return nil, Origin{}, err
	}
	pin, state, err := filePIN(path, src.Kind == pkcs11uri.PINCredential)
	return pin, Origin{What: "the PIN in " + path, Until: "the file changes", state: state, disk: true}, err
}

// filePIN reads a PIN file: one line, owned by this user or root, and closed to all others.
// state changes when the file changes.
//
// A service may have a user of its own. Its credential belongs to root, and from systemd 254
// on an access control list lets that user read it. Then the mode is 0440: the group bits show
// the most that the list gives, and the group is root's. Only root can have let others in.
func filePIN(path string, credential bool) (_ *secret.Secret, state string, err error) {
	// O_NONBLOCK: the open call of a FIFO would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", fmt.Errorf("pin-source: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, "", fmt.Errorf("pin-source: %w", err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.Mode().IsRegular() || !ok:
		return nil, "", fmt.Errorf("pin-source: %s is not a regular file", path)
	case sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return nil, "", fmt.Errorf("pin-source: %s belongs to user %d: the file must belong to you or root", path, sys.Uid)
	case st.Mode().Perm()&0o077 != 0 && !(credential && sys.Uid == 0 && sys.Gid == 0 && st.Mode().Perm()&0o037 == 0):
		return nil, "", fmt.Errorf("pin-source: %s can be read or changed by others (mode %#o): run chmod 600 on it", path, st.Mode().Perm())
	}
	pin, err := readSecret(f)
	if err != nil {
		return nil, "", fmt.Errorf("pin-source: %s %w", path, err)
	}
	return pin, fmt.Sprintf("%d %d %d %d", sys.Dev, sys.Ino, st.Size(), st.ModTime().UnixNano()), nil
}

// readSecret reads a PIN into locked memory and drops the end of its line. The error follows the
// name of what was read.
func readSecret(r io.Reader) (*secret.Secret, error) {
	pin, err := secret.New(wire.MaxPIN + len("\r\n") + 1)
	if err != nil {
		return nil, err
	}
	n, err := io.ReadFull(r, pin.Buffer())
	switch {
	case err == nil:
		pin.Wipe()
		return nil, fmt.Errorf("is longer than a PIN can be (%d bytes)", wire.MaxPIN)
	case err != io.EOF && err != io.ErrUnexpectedEOF:
		pin.Wipe()
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	b := pin.Buffer()[:n]
	b = bytes.TrimSuffix(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	pin.SetLen(len(b))
	switch {
	case len(b) > wire.MaxPIN:
		pin.Wipe()
		return nil, fmt.Errorf("is longer than a PIN can be (%d bytes)", wire.MaxPIN)
	case len(b) == 0:
		pin.Wipe()
		return nil, errors.New("is empty")
	case bytes.ContainsAny(b, "\n\x00"):
		pin.Wipe()
		return nil, errors.New("holds more than one line: a PIN file is one line")
	}
	return pin, nil
}

// commandPIN runs a command of the configuration with the shell and reads the PIN from its
// output.
func commandPIN(ctx context.Context, command string) (*secret.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	// The pipe of os/exec would copy the PIN through buffers that are not locked.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd.Stdout = w
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return nil, fmt.Errorf("run the pin-source command: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })()
	pin, err := readSecret(r)
	_ = r.Close() // the rest of the output is lost
	werr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("the pin-source command: %w", ctx.Err())
	case err != nil && werr != nil:
		err = fmt.Errorf("the pin-source command failed: %w (its output %w)", werr, err)
	case err != nil:
		err = fmt.Errorf("the output of the pin-source command %w", err)
	case werr != nil:
		err = fmt.Errorf("the pin-source command failed: %w", werr)
	default:
		return pin, nil
	}
	pin.Wipe()
	return nil, err
}
