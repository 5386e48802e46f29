package export

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/output"
)

// Write writes the files of the keys into dir, and says so on told. It looks at all files before it writes the first.
// A file with another content is replaced only by force. An error has the next step as its hint.
func Write(told io.Writer, keys []Key, dir string, force bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cannotWrite(dir, err)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return cannotWrite(dir, err)
	}
	var wrong []error
	for _, e := range keys {
		file := filepath.Join(dir, e.Name+".pub")
		if err := mayWrite(file, e, force); err != nil {
			wrong = append(wrong, err)
		}
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	for _, e := range keys {
		file := filepath.Join(dir, e.Name+".pub")
		if same, _ := Holds(file, e.Public); same {
			fmt.Fprintf(told, "%s is there already\n", output.HomePath(file))
			continue
		}
		write := files.Create
		if force {
			write = files.Overwrite
		}
		if err := write(file, []byte(e.Line), 0o644); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return &existsError{file: file, uri: e.Token.URI()}
			}
			return cannotWrite(file, err)
		}
		fmt.Fprintf(told, "wrote %s\n", output.HomePath(file))
	}
	return nil
}

// mayWrite returns an error if the file cannot be written, or has another content and force is not given.
func mayWrite(file string, e Key, force bool) error {
	same, err := Holds(file, e.Public)
	switch st, serr := os.Stat(file); {
	case errors.Is(err, fs.ErrNotExist), err == nil && (same || force):
		return nil
	case err == nil:
		return &existsError{file: file, uri: e.Token.URI()}
	case serr == nil && st.IsDir():
		return cannotWrite(file, syscall.EISDIR)
	case force && errors.Is(err, fs.ErrPermission) && serr == nil:
		return nil // it is replaced, not read
	default:
		return cannotWrite(file, err)
	}
}

// cannotWrite says why a file or directory cannot be written.
func cannotWrite(path string, err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		path, err = p.Path, p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		err = l.Err
	}
	return exit.WithHint(fmt.Errorf("cannot write %s: %w", path, err), "--dir names another directory")
}

// existsError says that a file has another content.
type existsError struct{ file, uri string }

func (e *existsError) Error() string {
	return fmt.Sprintf("%s stays as it is: it has another content", e.file)
}

func (e *existsError) Hint() string {
	return fmt.Sprintf("--force replaces it; or give the key another name in the configuration:\n[[key]]\nuri = %q\nname = \"...\"", e.uri)
}

// Holds tells whether a file has this public key. The error is that of reading the file.
func Holds(file string, pub ssh.PublicKey) (bool, error) {
	b, err := files.ReadSmall(file)
	if err != nil {
		return false, err
	}
	there, _, _, _, perr := ssh.ParseAuthorizedKey(b)
	return perr == nil && bytes.Equal(there.Marshal(), pub.Marshal()), nil
}
