package token

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/statefile"
	"p11-agent/token/wire"
)

// commandTimeout is how long a pin-source command may take.
const commandTimeout = time.Minute

// A pinSource says where the PIN for a key comes from.
type pinSource struct {
	uri   *pkcs11uri.URI
	says  *pkcs11uri.URI // a copy: the PIN of uri may be wiped at any time
	added bool           // a client has named it
	shown shown          // what the token showed then
}

// An addedSource is a URI with a PIN that a client has named. It is for the one token and
// module that it was added for.
type addedSource struct {
	uri   *pkcs11uri.URI
	token *Token
	shown shown // what the token showed then
}

// source returns where the PIN for a key comes from, nil when a person is to be asked.
func (s *Store) source(k *Key) *pinSource {
	s.mu.Lock()
	configured, added := s.configured, s.added
	s.mu.Unlock()
	for _, u := range configured {
		if k.MayMatch(u) {
			return s.newSource(u, false, shown{})
		}
	}
	for _, a := range added {
		if a.token.ID == k.token.ID && a.token.module == k.token.module && k.MayMatch(a.uri) {
			return s.newSource(a.uri, true, a.shown)
		}
	}
	return nil
}

// newSource makes a pinSource. SetSources and RemoveSource wipe URIs under the same lock.
func (s *Store) newSource(u *pkcs11uri.URI, added bool, shows shown) *pinSource {
	s.mu.Lock()
	defer s.mu.Unlock()
	says := *u
	return &pinSource{uri: u, says: &says, added: added, shown: shows}
}

// AddSource makes the pin-source or pin-value of a URI count for the token of the keys
// that it selects now, through their module, after those of the configuration. The URI
// has to name exactly one token. Commands are refused: only the configuration may name
// one. Without a PIN in the URI it does nothing.
func (s *Store) AddSource(u *pkcs11uri.URI, keys []*Key) error {
	if u.PIN() == nil && u.PINSource == nil {
		return nil
	}
	if err := checkAdded(u); err != nil {
		return err
	}
	if len(keys) == 0 {
		return ErrNoMatch
	}
	t := keys[0].token
	if all := s.matching(u); len(all) > 1 || slices.ContainsFunc(keys, func(k *Key) bool { return k.token != t }) {
		return fmt.Errorf("a PIN is for one token, and %s names several: add the serial attribute (token %s is one of them)", selection(u), t.name())
	}
	if belongs, _ := t.claims(); belongs != "" && !s.names(u, t.module) {
		return &GuestError{Token: t.ID.Label, Module: t.module.identity, Home: belongs}
	}
	shows := t.shows()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.added = append(slices.Clip(s.added), addedSource{u, t, shows})
	return nil
}

// checkAdded tells whether a client may name the source of a URI.
func checkAdded(u *pkcs11uri.URI) error {
	if u.PINSource != nil && u.PINSource.Kind != pkcs11uri.PINFile {
		return fmt.Errorf("a pin-source that begins with %q counts in the configuration file only", u.PINSource)
	}
	return CheckPIN(u)
}

// SetSources replaces the URIs of the configuration that say where PINs come
// from; those added by AddSource stay. The old ones are wiped.
func (s *Store) SetSources(all []*pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.configured {
		if !slices.Contains(all, u) {
			u.Wipe()
		}
	}
	s.configured = slices.Clone(all)
}

// RemoveSource undoes AddSource and Select, and wipes the PIN in the URI.
func (s *Store) RemoveSource(u *pkcs11uri.URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unwantLocked(u)
	s.added = slices.DeleteFunc(slices.Clone(s.added), func(o addedSource) bool { return o.uri == u })
	u.Wipe()
}

// fromSource logs in with a PIN that the configuration names. There is no
// person to judge a failure: a PIN that was refused once is never tried again,
// and the last try is left to a person.
//
// The PIN goes to no other token or module than the one it was used for first, whatever
// became of it there.
func (t *Token) fromSource(ctx context.Context, src *pinSource, tries Tries, use usePIN) error {
	if tries == TriesLast {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New(
			"one try is left, and a configured PIN must not use it up: log in to the token by hand with another program once")}
	}
	if src.added && t.isOther(src.shown) {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: errors.New("another card of the same name is there now: add the PIN again for this one")}
	}
	if !src.added {
		if err := t.mayUse(src.says); err != nil {
			return &PINError{Token: t.ID.Label, Tries: tries, Err: err}
		}
	}
	pin, mark, err := t.module.store.readPIN(ctx, src)
	if err != nil {
		return fmt.Errorf("the PIN for token %q: %w", t.ID.Label, err)
	}
	defer pin.Wipe()
	refused := t.module.store.refused
	mark.token = t.ID
	if refused.has(mark, pin) {
		return &PINError{Token: t.ID.Label, Tries: tries, Err: fmt.Errorf(
			"%s was refused before, and is not tried again until %s", mark.what, mark.until)}
	}
	if !src.added {
		if err := t.module.store.bindings.add(bindingOf(selection(src.says), t)); err != nil {
			return &PINError{Token: t.ID.Label, Tries: tries, Err: fmt.Errorf("the PIN of %v: %w", src.says, err)}
		}
	}
	err = t.judge(use(ctx, pin, false, false))
	if wrong, ok := errors.AsType[*PINError](err); ok && wrong.Tried {
		refused.add(mark, pin)
		wrong.Err = fmt.Errorf("%s: %w", mark.what, wrong.Err)
	}
	return err
}

// CheckSource tells what is wrong with the pin-source of a URI, as far as that
// can be seen without using it: commands are not run.
func CheckSource(u *pkcs11uri.URI) error {
	if u.PINSource == nil || u.PINSource.Kind == pkcs11uri.PINCommand {
		return nil
	}
	path, err := sourcePath(u.PINSource)
	if err != nil {
		return err
	}
	pin, _, err := filePIN(path, u.PINSource.Kind == pkcs11uri.PINCredential)
	pin.Wipe()
	return err
}

// sourcePath returns the file that a source of any kind but PINCommand names.
func sourcePath(src *pkcs11uri.PINSource) (string, error) {
	if src.Kind != pkcs11uri.PINCredential {
		return src.Path(), nil
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("pin-source: there are no credentials (CREDENTIALS_DIRECTORY is not set): the service needs LoadCredential=%s:/path", src.Credential())
	}
	return filepath.Join(dir, src.Credential()), nil
}

// sourceMark says which PIN of a source was used, without telling the PIN.
type sourceMark struct {
	token wire.TokenID
	what  string // for a person
	until string // what has to happen for another try
	state string // what changes when the PIN is changed; empty: the PIN is compared
	disk  bool   // may be remembered on disk
}

func (m sourceMark) key() string {
	t := m.token
	text := fmt.Appendf(nil, "{%q %q %q %q} %q %q", t.Label, t.Manufacturer, t.Model, t.Serial, m.what, m.state)
	if t.Twin != 0 {
		text = fmt.Appendf(text, " %d", t.Twin)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// readPIN gets the PIN that a URI carries or names.
func (s *Store) readPIN(ctx context.Context, from *pinSource) (*secret.Secret, sourceMark, error) {
	u := from.uri
	s.mu.Lock() // RemoveSource wipes it
	given := u.PIN()
	pin, err := given.Clone()
	s.mu.Unlock()
	if given != nil {
		if err == nil && pin.Len() == 0 {
			err = errors.New("pin-value is empty")
		}
		if err != nil {
			pin.Wipe()
			return nil, sourceMark{}, err
		}
		return pin, sourceMark{what: "pin-value", until: "it changes"}, nil
	}
	pin.Wipe()
	src := u.PINSource
	switch {
	case src == nil:
		return nil, sourceMark{}, errors.New("the configured PIN was just removed")
	case src.Kind == pkcs11uri.PINCommand:
		pin, err := commandPIN(ctx, src.Command())
		return pin, sourceMark{
			what: "the PIN of the configured command", until: "the command changes or the agent is restarted", state: src.Command(),
		}, err
	default:
		path, err := sourcePath(src)
		if err != nil {
			return nil, sourceMark{}, err
		}
		if from.added && s.configuredFile(path) {
			return nil, sourceMark{}, fmt.Errorf("pin-source: %s is for another token in the configuration", path)
		}
		pin, state, err := filePIN(path, src.Kind == pkcs11uri.PINCredential)
		return pin, sourceMark{what: "the PIN in " + path, until: "the file changes", state: state, disk: true}, err
	}
}

// configuredFile tells whether the configuration takes a PIN from a file, for other keys
// than a client that names it. Otherwise a client could have the PIN of one token tried
// on another, or handed to another module, without being able to read the file.
func (s *Store) configuredFile(path string) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false // reading it says so
	}
	s.mu.Lock()
	configured := s.configured
	s.mu.Unlock()
	return slices.ContainsFunc(configured, func(u *pkcs11uri.URI) bool {
		if u.PINSource == nil || u.PINSource.Kind == pkcs11uri.PINCommand {
			return false
		}
		own, err := sourcePath(u.PINSource)
		if err != nil {
			return false
		}
		other, err := os.Stat(own)
		return err == nil && os.SameFile(st, other)
	})
}

// filePIN reads a PIN file: one line, of this user or root, and closed to
// everybody else.
//
// A credential of a service that has a user of its own belongs to root, and that
// user may read it by an access control list, from systemd 254 or so on. Its mode
// is 0440 then: the bits of the group are the most that the list gives to anybody,
// and the group is root's. Only root could have let others in.
func filePIN(path string, credential bool) (_ *secret.Secret, state string, err error) {
	// Not to wait for a writer should it be a FIFO.
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
		return nil, "", fmt.Errorf("pin-source: %s belongs to user %d: only your own files and root's are believed", path, sys.Uid)
	case st.Mode().Perm()&0o077 != 0 && !(credential && sys.Uid == 0 && sys.Gid == 0 && st.Mode().Perm()&0o037 == 0):
		return nil, "", fmt.Errorf("pin-source: %s can be read or changed by others (mode %#o): run chmod 600 on it", path, st.Mode().Perm())
	}
	pin, err := readSecret(f)
	if err != nil {
		return nil, "", fmt.Errorf("pin-source: %s %w", path, err)
	}
	return pin, fmt.Sprintf("%d %d %d %d", sys.Dev, sys.Ino, st.Size(), st.ModTime().UnixNano()), nil
}

// readSecret reads a PIN into locked memory and drops the end of its line.
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

// commandPIN runs a command of the configuration with the shell and reads the
// PIN from what it prints.
func commandPIN(ctx context.Context, command string) (*secret.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	// A pipe of our own: that of os/exec would copy the PIN through its buffers.
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
	// What it still has to say, it says to nobody.
	_ = r.Close()
	werr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("the pin-source command: %w", ctx.Err())
	case err != nil && werr != nil:
		err = fmt.Errorf("the pin-source command failed: %w (what it printed %w)", werr, err)
	case err != nil:
		err = fmt.Errorf("what the pin-source command printed %w", err)
	case werr != nil:
		err = fmt.Errorf("the pin-source command failed: %w", werr)
	default:
		return pin, nil
	}
	pin.Wipe()
	return nil, err
}

// refusedSources remembers PINs of the configuration that a token has refused.
// Those from files are remembered on disk too, by the file's identity and age,
// so that an agent that is restarted again and again does not lock a token.
//
// The values of pin-value are kept themselves, in Secrets. A digest would leave a
// copy of the PIN in the memory of the hash function.
type refusedSources struct {
	log  *slog.Logger
	path string

	mu     sync.Mutex
	keys   map[string]bool
	values []refusedValue
}

// A refusedValue is a pin-value that a token has refused.
type refusedValue struct {
	key string // of its mark
	pin *secret.Secret
}

const (
	maxRefused = 256 // bounds the file; the oldest entries go
	maxValues  = 64  // bounds the values; the oldest go
)

func loadRefused(dir string, log *slog.Logger) *refusedSources {
	r := &refusedSources{log: log, keys: make(map[string]bool)}
	if dir == "" {
		return r
	}
	r.path = filepath.Join(dir, "refused-pins")
	b, err := os.ReadFile(r.path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("cannot tell which PIN files were refused before", "reason", err)
		}
		return r
	}
	for line := range strings.Lines(string(b)) {
		r.keys[strings.TrimSpace(line)] = true
	}
	return r
}

// has tells whether the PIN of a source was refused.
func (r *refusedSources) has(m sourceMark, pin *secret.Secret) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.state == "" {
		return slices.ContainsFunc(r.values, func(v refusedValue) bool { return v.key == m.key() && v.pin.Equal(pin) })
	}
	return r.keys[m.key()]
}

// add remembers that the PIN of a source was refused.
func (r *refusedSources) add(m sourceMark, pin *secret.Secret) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.state == "" {
		r.addValueLocked(m, pin)
		return
	}
	r.keys[m.key()] = true
	if r.path == "" || !m.disk {
		return
	}
	if err := r.save(m.key()); err != nil {
		r.log.Warn("cannot remember that a PIN file was refused", "reason", err)
	}
}

func (r *refusedSources) addValueLocked(m sourceMark, pin *secret.Secret) {
	kept, err := pin.Clone()
	if err != nil {
		r.log.Warn("cannot remember that a pin-value was refused", "reason", err)
		return
	}
	if len(r.values) == maxValues {
		r.values[0].pin.Wipe()
		r.values = slices.Delete(r.values, 0, 1)
	}
	r.values = append(r.values, refusedValue{m.key(), kept})
}

// save adds a line to the file, which is replaced as a whole.
func (r *refusedSources) save(key string) error {
	b, err := os.ReadFile(r.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lines := strings.Fields(string(b))
	lines = append(lines, key)
	lines = lines[max(0, len(lines)-maxRefused):]
	return statefile.Write(r.path, []byte(strings.Join(lines, "\n")+"\n"))
}
