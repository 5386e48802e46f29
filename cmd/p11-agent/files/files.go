// Package files changes files of the user, such as ssh's configuration. A file is replaced as a whole or not at
// all, so a reader never sees a part, and a full disk costs nothing that was there. The callers decide
// what is in the files.
package files

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// maxText bounds the files that Prepend and AppendLine change, in bytes.
const maxText = 1 << 20

// maxSmall bounds what ReadSmall reads, in bytes.
const maxSmall = 64 << 10

// Replace writes a file. Where the file is a link, the link stays, and its target is replaced.
// A link to a file that does not exist is an error.
func Replace(file string, b []byte, mode fs.FileMode) error {
	if to, err := filepath.EvalSymlinks(file); err == nil {
		file = to
	} else if _, lerr := os.Lstat(file); lerr == nil {
		return err
	}
	return Overwrite(file, b, mode)
}

// Overwrite writes a file. Where the file is a link, the file replaces the link.
func Overwrite(file string, b []byte, mode fs.FileMode) error {
	f, err := pending(file, b, mode)
	if err != nil {
		return err
	}
	return errors.Join(f.CloseAtomicallyReplace(), f.Cleanup())
}

// Create writes a new file. A file that is there already stays, and the error is [fs.ErrExist].
func Create(file string, b []byte, mode fs.FileMode) error {
	f, err := pending(file, b, mode)
	if err != nil {
		return err
	}
	err = f.Sync()
	if err == nil {
		err = os.Link(f.Name(), file)
	}
	return errors.Join(err, f.Cleanup())
}

// pending writes b into a new file beside the one that it is to become. Its mode does not depend on the umask.
func pending(file string, b []byte, mode fs.FileMode) (*renameio.PendingFile, error) {
	f, err := renameio.NewPendingFile(file, renameio.WithTempDir(filepath.Dir(file)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(err, f.Cleanup())
	}
	return f, nil
}

// Prepend puts text before the text of a file, which keeps its mode. A new file is for its owner only.
func Prepend(file, text string) error {
	was, mode, err := read(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Replace(file, []byte(text), 0o600)
	}
	if err != nil {
		return err
	}
	return Replace(file, append([]byte(text), was...), mode)
}

// AppendLine adds a line to the end of a file, which keeps its mode. A new file is readable by all. The line
// has its newline.
func AppendLine(file, line string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	was, mode, err := read(file)
	if errors.Is(err, fs.ErrNotExist) {
		mode, err = 0o644, nil
	}
	if err != nil {
		return err
	}
	if len(was) > 0 && !bytes.HasSuffix(was, []byte("\n")) {
		was = append(was, '\n')
	}
	return Replace(file, append(was, line...), mode)
}

// read reads a file that is to be changed.
func read(file string) (b []byte, mode fs.FileMode, err error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, 0, err
	case !st.Mode().IsRegular() || st.Size() > maxText:
		return nil, 0, fmt.Errorf("%s stays as it is: only a regular file of at most %d bytes is changed", file, maxText)
	}
	b, err = io.ReadAll(io.LimitReader(f, maxText))
	return b, st.Mode().Perm(), err
}

// Read reads a regular file of at most 1 MiB. A longer file is an error.
func Read(file string) ([]byte, error) {
	b, _, err := read(file)
	return b, err
}

// ReadSmall reads a regular file, or its first 64 KiB.
func ReadSmall(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file", file), err)
	}
	return io.ReadAll(io.LimitReader(f, maxSmall))
}
